"""k samples for each problem of a benchmark, graded, in a folder that a run which was cut off goes on in.

out/eval/MODEL/settings.json            what makes these samples themselves; other settings are refused here
out/eval/MODEL/samples/aime24/00003.parquet     a batch, whole; the same batches with any number of processes
out/eval/MODEL/samples/aime24.parquet           all of them, once the last one is there
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from jinja2 import TemplateError

from opefo_trl.data.benchmarks import BENCHMARKS, load_benchmark
from opefo_trl.data.loading import chat
from opefo_trl.evaluation.engines import Engine, Sample, seed_of
from opefo_trl.files import SAMPLING_FILE, write_whole
from opefo_trl.grading.grader import Grade, Outcome
from opefo_trl.playground import PLAYGROUND, is_right, playground_dataset


class Grades(Protocol):
    def grade(self, golds: Sequence[Any], completions: Sequence[str]) -> list[Grade]: ...


class PlaygroundGrader:
    """Of the playground's task, where the whole completion is the answer."""

    def grade(self, golds: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        outcomes = {True: Outcome.CORRECT, False: Outcome.WRONG}
        return [
            Grade(outcomes[is_right(text.strip(), int(gold))], text.strip())
            for gold, text in zip(golds, completions, strict=True)
        ]


def playground_problems() -> list[dict[str, str]]:
    """The playground's held-out questions, as a benchmark."""
    return [
        {"id": f"{PLAYGROUND}-{row['target']}", "problem": row["prompt"][0]["content"], "answer": str(row["target"])}
        for row in playground_dataset("test")
    ]


def load_problems(name: str, source: str | None = None) -> list[dict[str, str]]:
    """Problems of a benchmark, or of the playground."""
    return playground_problems() if name == PLAYGROUND else load_benchmark(name, source).to_list()


def samples_of(name: str) -> int:
    """How many samples of each problem the protocol takes."""
    return 16 if name == PLAYGROUND else BENCHMARKS[name].k


def title_of(name: str) -> str:
    return "Playground" if name == PLAYGROUND else BENCHMARKS[name].title


Batch = list[tuple[int, int]]  # numbers of problem and sample


@dataclass(frozen=True)
class Task:
    """A benchmark to be sampled: its problems, the same as tokens, and how many samples of each."""

    name: str
    problems: list[dict[str, str]]
    prompts: list[list[int]]
    k: int

    def facts(self) -> dict[str, Any]:
        """What its samples depend on: how many there are, the problems, and what the model is shown of them."""
        content = json.dumps([self.problems, self.prompts]).encode()
        return {"k": self.k, "problems": hashlib.blake2b(content, digest_size=8).hexdigest()}

    def batches(self, size: int) -> list[Batch]:
        """Prompts of like length side by side: a batch is padded to its longest."""
        order = sorted(range(len(self.problems)), key=lambda problem: len(self.prompts[problem]))
        pairs = [(problem, sample) for problem in order for sample in range(self.k)]
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]


@dataclass(frozen=True)
class Evaluation:
    """Tasks, and the folder that their samples are gathered in."""

    folder: Path
    tasks: list[Task]
    size: int  # of a batch
    context: int  # tokens of a prompt and its completion together
    longest: int  # tokens of a completion
    seed: int

    def left(self, rank: int = 0, ranks: int = 1) -> list[tuple[Task, int, Batch]]:
        """This process' share of the batches that are not written yet."""
        return [
            (task, number, batch)
            for task in self.tasks
            if not self.whole(task).exists()
            for number, batch in enumerate(task.batches(self.size))
            if number % ranks == rank and not self.part(task, number).exists()
        ]

    def whole(self, task: Task) -> Path:
        return self.folder / "samples" / f"{task.name}.parquet"

    def part(self, task: Task, number: int) -> Path:
        return self.folder / "samples" / task.name / f"{number:05}.parquet"

    def without_room(self) -> int:
        """Problems that fill the context by themselves."""
        return sum(len(prompt) >= self.context for task in self.tasks for prompt in task.prompts)

    def longest_sample(self) -> int:
        """Tokens of the longest prompt and completion together, as far as there is room."""
        longest = max((len(prompt) for task in self.tasks for prompt in task.prompts), default=1)
        return min(self.context, longest + self.longest)

    def sample(self, task: Task, number: int, batch: Batch, engine: Engine, grader: Grades) -> pd.DataFrame:
        """A row for each sample, written. A problem without room for a token gets an empty sample, cut off."""
        problems = [task.problems[problem] for problem, _ in batch]
        seeds = [
            seed_of(self.seed, task.name, row["id"], sample) for row, (_, sample) in zip(problems, batch, strict=True)
        ]
        limits = [min(self.longest, self.context - len(task.prompts[problem])) for problem, _ in batch]
        places = [place for place, limit in enumerate(limits) if limit > 0]
        samples = [Sample("", 0, True, 0.0)] * len(batch)
        if places:
            prompts = [task.prompts[batch[place][0]] for place in places]
            found = engine.sample(prompts, [seeds[place] for place in places], [limits[place] for place in places])
            for place, sample in zip(places, found, strict=True):
                samples[place] = sample
        grades = grader.grade([row["answer"] for row in problems], [sample.text for sample in samples])
        frame = pd.DataFrame(
            {
                "id": row["id"],
                "sample": which,
                "seed": seed,
                "gold": row["answer"],
                "completion": sample.text.encode("utf-8", "replace").decode(),
                "outcome": str(grade.outcome),
                "answer": grade.answer,
                "tokens": sample.tokens,
                "truncated": sample.truncated,
                "logp": sample.logp,
            }
            for row, (_, which), seed, sample, grade in zip(problems, batch, seeds, samples, grades, strict=True)
        )
        path = self.part(task, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, frame.to_parquet)
        return frame

    def gather(self, task: Task) -> pd.DataFrame:
        """All samples of a task in the order of its problems, in one file from now on."""
        path = self.whole(task)
        if not path.exists():
            parts = [pd.read_parquet(self.part(task, number)) for number in range(len(task.batches(self.size)))]
            places = {row["id"]: place for place, row in enumerate(task.problems)}
            frame = pd.concat(parts)
            if len(frame) != len(task.problems) * task.k or frame.duplicated(["id", "sample"]).any():
                raise RuntimeError(f"{self.folder} holds other samples of {task.name} than these: delete them.")
            frame = frame.sort_values(
                ["id", "sample"], key=lambda column: column.map(places) if column.name == "id" else column
            )
            write_whole(path, frame.reset_index(drop=True).to_parquet)
            shutil.rmtree(self.part(task, 0).parent)
        return pd.read_parquet(path)


def prompts_of(
    problems: Sequence[dict[str, str]], tokenizer: Any, template: str, system: str | None
) -> list[list[int]]:
    """Each problem as the model's tokens; without a chat template as plain text."""
    prompts = []
    for row in problems:
        messages = chat(row["problem"], template)
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        if tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            prompts.append(tokenizer(text)["input_ids"])
        else:
            try:
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            except TemplateError as error:
                raise ValueError(f"The model's chat template does not take these messages: {error}") from error
            prompts.append(list(ids))
    return prompts


def check_same(folder: Path, settings: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """Samples of two settings do not mix; those of other benchmarks stay beside. The settings of all of them."""
    path = folder / SAMPLING_FILE
    before = json.loads(path.read_text()) if path.exists() else {}
    if not any((folder / "samples").rglob("*.parquet")):
        before = {}  # a start that came to nothing
    known = before.get("tasks", {})
    now = {task.name: task.facts() for task in tasks}
    changed = {name: (before.get(name), settings.get(name)) for name in {**before, **settings} if name != "tasks"}
    changed |= {
        f"{task} {name}": (known[task][name], facts[name])
        for task, facts in now.items()
        if task in known
        for name in facts
    }
    different = [f"{name}={old!r} (now {new!r})" for name, (old, new) in changed.items() if old != new]
    if before and different:
        raise ValueError(
            f"{str(folder)!r} holds samples with {', '.join(different)}. Set another --output_dir, or delete that one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = {**settings, "tasks": {**known, **now}}
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))
    return content
