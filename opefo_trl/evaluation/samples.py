"""Sampling of benchmarks: k graded samples for each problem, in a folder where an interrupted run resumes.

out/eval/MODEL/settings.json                    settings that identify the samples; resuming with others is refused
out/eval/MODEL/samples/aime24/00003.parquet     one batch; the batches are the same for any number of processes
out/eval/MODEL/samples/aime24.parquet           all samples, once the last batch is done
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from jinja2 import TemplateError

from opefo_trl.data.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from opefo_trl.data.templates import chat
from opefo_trl.evaluation.engines import Engine, Sample, seed_of
from opefo_trl.files import SAMPLES_FOLDER, SAMPLING_FILE, write_whole
from opefo_trl.grading import Grade, Outcome
from opefo_trl.playground import TASKS
from opefo_trl.playground.embedded import EmbeddedTask

FOR_MATHS = ("prompt_template", "policy", "grading_timeout")  # options: embedded tasks have their own


class Grades(Protocol):
    """A grader: `Grader`, or that of an embedded task."""

    def grade(self, golds: Sequence[Any], completions: Sequence[str]) -> list[Grade]: ...


class TaskGrader:
    """Grades an embedded task, where the whole completion is the answer."""

    def __init__(self, task: EmbeddedTask):
        self.task = task

    def grade(self, golds: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        return [
            Grade(
                Outcome.CORRECT if self.task.is_right(text.strip(), gold) else Outcome.WRONG,
                self.task.normal_form(text),
            )
            for gold, text in zip(golds, completions, strict=True)
        ]


def benchmark_of(name: str) -> Benchmark:
    """Return the title and the protocol of a benchmark or of an embedded task's held-out questions."""
    if name in TASKS:
        return Benchmark(TASKS[name].title, (), (len(TASKS[name].splits["test"]),), k=16)
    return BENCHMARKS[name]


def load_problems(name: str, source: str | None = None) -> list[dict[str, str]]:
    """Load `id`, `problem` and `answer` of each problem of a benchmark, or of an embedded task's test split."""
    if name not in TASKS:
        return load_benchmark(name, source).to_list()
    return [
        {"id": f"{name}-{gold}", "problem": question, "answer": str(gold)}
        for gold, question in TASKS[name].splits["test"].items()
    ]


_Batch = list[tuple[int, int]]  # index of the problem, number of the sample


@dataclass(frozen=True)
class Task:
    """A benchmark to be sampled, k times each problem."""

    name: str
    problems: list[dict[str, str]]  # rows of `id`, `problem`, `answer`
    prompts: list[list[int]]  # token ids of each problem's prompt
    k: int
    max_new_tokens: int | None = None  # enough for any right answer, where that is known
    grader: Grades | None = None  # if it is not the one that all benchmarks share
    golds: Sequence[Any] | None = None  # of each problem, if its grader takes something else than `answer`

    def gold(self, problem: int) -> Any:
        """Return the gold of a problem, as the grader takes it."""
        return self.problems[problem]["answer"] if self.golds is None else self.golds[problem]

    def identity(self) -> dict[str, Any]:
        """Return k, and a hash of the problems and prompts: the settings that identify samples of this task."""
        content = json.dumps([self.problems, self.prompts]).encode()
        return {"k": self.k, "problems": hashlib.blake2b(content, digest_size=8).hexdigest()}

    def batches(self, size: int) -> list[_Batch]:
        """Divide the samples into batches of prompts of similar length, as a batch is padded to its longest prompt."""
        order = sorted(range(len(self.problems)), key=lambda problem: len(self.prompts[problem]))
        pairs = [(problem, sample) for problem in order for sample in range(self.k)]
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]


@dataclass(frozen=True)
class Evaluation:
    """Tasks, and the folder that their samples are written to."""

    folder: Path
    tasks: list[Task]
    batch_size: int  # samples
    context: int  # tokens that a prompt and its completion may have together
    max_new_tokens: int
    seed: int  # that each sample's own seed is derived from

    def remaining(self, rank: int = 0, ranks: int = 1) -> list[tuple[Task, int, _Batch]]:
        """Return this rank's share of the batches that are not written yet, each with its task and number."""
        return [
            (task, number, batch)
            for task in self.tasks
            if not self._task_file(task).exists()
            for number, batch in enumerate(task.batches(self.batch_size))
            if number % ranks == rank and not self._batch_file(task, number).exists()
        ]

    def _task_file(self, task: Task) -> Path:
        return self.folder / SAMPLES_FOLDER / f"{task.name}.parquet"

    def _batch_file(self, task: Task, number: int) -> Path:
        return self.folder / SAMPLES_FOLDER / task.name / f"{number:05}.parquet"

    def problems_without_room(self) -> int:
        """Return the number of problems whose prompt leaves no room for a completion in the context."""
        return sum(len(prompt) >= self.context for task in self.tasks for prompt in task.prompts)

    def longest_sample(self) -> int:
        """Return the most tokens that a prompt and its completion can have together."""
        longest_prompt = max((len(prompt) for task in self.tasks for prompt in task.prompts), default=1)
        return min(self.context, longest_prompt + self.max_new_tokens)

    def sample(self, task: Task, number: int, batch: _Batch, engine: Engine, grader: Grades) -> pd.DataFrame:
        """Sample and grade a batch, and write it with one row for each sample."""
        problems = [task.problems[problem] for problem, _ in batch]
        seeds = [
            seed_of(self.seed, task.name, row["id"], sample) for row, (_, sample) in zip(problems, batch, strict=True)
        ]
        longest = min(self.max_new_tokens, task.max_new_tokens or self.max_new_tokens)
        samples = self._complete([task.prompts[problem] for problem, _ in batch], seeds, longest, engine)
        grades = grader.grade([task.gold(problem) for problem, _ in batch], [sample.text for sample in samples])
        frame = pd.DataFrame(
            {
                "id": row["id"],
                "sample": sample_id,
                "seed": seed,
                "gold": row["answer"],
                "completion": sample.text.encode("utf-8", "replace").decode(),
                "outcome": str(grade.outcome),
                "answer": grade.answer,
                "tokens": sample.tokens,
                "truncated": sample.truncated,
                "logp": sample.logp,
            }
            for row, (_, sample_id), seed, sample, grade in zip(problems, batch, seeds, samples, grades, strict=True)
        )
        path = self._batch_file(task, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, frame.to_parquet)
        return frame

    def _complete(self, prompts: list[list[int]], seeds: list[int], longest: int, engine: Engine) -> list[Sample]:
        """Sample a completion of each prompt. A prompt that fills the context gets an empty, truncated one."""
        limits = [min(longest, self.context - len(prompt)) for prompt in prompts]
        with_room = [index for index, limit in enumerate(limits) if limit > 0]
        samples = [Sample("", 0, True, 0.0)] * len(prompts)
        if with_room:
            completions = engine.sample(
                [prompts[index] for index in with_room],
                [seeds[index] for index in with_room],
                [limits[index] for index in with_room],
            )
            for index, sample in zip(with_room, completions, strict=True):
                samples[index] = sample
        return samples

    def gather(self, task: Task) -> pd.DataFrame:
        """Return all samples of a task in the order of its problems, and join the batches into one file."""
        path = self._task_file(task)
        if not path.exists():
            count = len(task.batches(self.batch_size))
            frame = pd.concat(pd.read_parquet(self._batch_file(task, number)) for number in range(count))
            if len(frame) != len(task.problems) * task.k or frame.duplicated(["id", "sample"]).any():
                raise RuntimeError(f"{self.folder} holds other samples of {task.name} than expected. Delete them.")
            order = {row["id"]: index for index, row in enumerate(task.problems)}
            frame = frame.sort_values(
                ["id", "sample"], key=lambda column: column.map(order) if column.name == "id" else column
            )
            write_whole(path, frame.reset_index(drop=True).to_parquet)
            shutil.rmtree(self._batch_file(task, 0).parent)
        return pd.read_parquet(path)


def tokenize_problems(
    problems: Sequence[dict[str, str]], tokenizer: Any, template: str, system: str | None, **chat_options: Any
) -> list[list[int]]:
    """Return the token ids of each problem in its template, as the one message after the system's. `chat_options` are
    those of the chat template, as in `tokenize_prompts`."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return tokenize_prompts([[*first, *chat(row["problem"], template)] for row in problems], tokenizer, **chat_options)


def tokenize_prompts(
    prompts: Iterable[str | list[dict[str, str]]], tokenizer: Any, **chat_options: Any
) -> list[list[int]]:
    """Return the token ids of texts and conversations; the latter as texts if the tokenizer has no chat template."""
    tokenized = []
    for prompt in prompts:
        if tokenizer.chat_template is None and not isinstance(prompt, str):
            prompt = "\n\n".join(message["content"] for message in prompt)
        if isinstance(prompt, str):
            tokenized.append(tokenizer(prompt)["input_ids"])
            continue
        try:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **chat_options)
        except TemplateError as error:
            raise ValueError(f"The model's chat template does not take these messages: {error}") from error
        tokenized.append(list(ids))
    return tokenized


def check_same_settings(folder: Path, settings: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """Raise if the folder has samples of other settings; write and return the settings of all its samples. Embedded
    tasks have no settings of maths benchmarks, and stand beside any of them."""
    path, of_maths = folder / SAMPLING_FILE, (*FOR_MATHS, "grader")
    saved = json.loads(path.read_text()) if path.exists() else {}
    if not any((folder / SAMPLES_FOLDER).rglob("*.parquet")):
        saved = {}  # an earlier run ended before its first batch
    saved_tasks = saved.pop("tasks", {})
    new_tasks = {task.name: task.identity() for task in tasks}
    pairs = {name: (saved.get(name), settings.get(name)) for name in {**saved, **settings}} if saved else {}
    for task, identity in new_tasks.items():
        pairs |= {f"{task} {name}": (saved_tasks.get(task, identity)[name], identity[name]) for name in identity}
    different = [
        f"{name}={old!r} (now {new!r})"
        for name, (old, new) in pairs.items()
        if old != new and not (name in of_maths and None in (old, new))
    ]
    if different:
        raise ValueError(
            f"{str(folder)!r} holds samples with {', '.join(different)}. Set another --output_dir, or delete that one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: saved[name] for name in of_maths if name in saved and settings.get(name) is None}
    content = {**settings, **kept, "tasks": {**saved_tasks, **new_tasks}}
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))
    return content
