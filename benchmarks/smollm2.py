"""A small language model on a task with many right answers: settings over seeds, in one process, one after the other.

    python benchmarks/smollm2.py --task words --model out/smollm2 --json out/words.jsonl
    python benchmarks/smollm2.py --task words --model out/smollm2 --device cuda --steps 150 --seeds 0 1 2 \\
        --settings "none: --control none" "opefo: --flow_target 1.0" --json out/words.jsonl

A setting is a name and arguments of train.py, which override the recipe configs/smollm2-TASK.yaml. The file gets a
line for every optimizer step as it is taken, and a line at the end of every run. That has the scores on held-out
prompts after the last step: `--samples` answers to each, drawn with a seed of its own, and what was written. The first
entry, `base`, is the model before training. The same command skips runs that are done and repeats one that was
interrupted; with --checkpoints FOLDER it goes on where that was ten steps ago at most. Several processes divide the
runs by --share 0/2 and --share 1/2, with a file each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.measures import graded
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig

import train as script
from opefo_trl import OPEFOConfig
from opefo_trl.cli.parser import Parser
from opefo_trl.cli.progress import EDGE
from opefo_trl.cli.run_folder import newest_checkpoint, step_of
from opefo_trl.evaluation.engines import Decoding, ModelSource, Transformers
from opefo_trl.evaluation.metrics import pass_at_k
from opefo_trl.evaluation.samples import TaskGrader, load_problems, tokenize_problems
from opefo_trl.files import write_whole
from opefo_trl.playground import TASKS

ROOT = Path(__file__).parents[1]
BASE = "base"
SETTINGS = {
    "words": [
        "none: --control none",
        "opefo, target: --flow_target 1.0",
        "opefo, literal: --flow_target none --flow_lambda_max 1.0",
        """adaptive_entropy: --control adaptive_entropy --flow_target none --control_kwargs '{"target": 1.0}'""",
    ],
    "sentences": ["none: --control none", "opefo, target: --flow_target 1.0"],
}
KEPT = ("step", "entropy", "reward", "loss", "grad_norm", "learning_rate", "frac_reward_zero_std")
KEPT_GROUPS = ("answers/", "flow/", "control/")


@dataclass(frozen=True)
class Run:
    setting: str
    seed: int
    arguments: list[str]  # of train.py

    @property
    def label(self) -> dict[str, Any]:
        return {"setting": self.setting, "seed": self.seed}


class Lines:
    """The file of results: a JSON object in each line, written as it comes."""

    def __init__(self, path: Path, runs: Sequence[Run], folders: Path | None = None):
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        ended = {(line["setting"], line["seed"]): line["arguments"] for line in lines if "arguments" in line}
        for run in runs:
            before = ended.get((run.setting, run.seed), run.arguments)
            if before != run.arguments:
                raise SystemExit(
                    f"{path} has {run.setting!r}, seed {run.seed}, with {' '.join(before)}. Give another --json."
                )
        self.done = set(ended)
        reached = {(run.setting, run.seed): steps_of(folder_of(run, folders)) for run in runs if folders}
        self.kept = kept = [
            line
            for line in lines
            if (key := (line["setting"], line["seed"])) in self.done or line.get("step", 1) <= reached.get(key, 0)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_text("".join(json.dumps(line) + "\n" for line in kept)))

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class StepLines(TrainerCallback):
    """Writes a line for each optimizer step, from the row of the run's entropy curves."""

    def __init__(self, trainer: Any, run: Run, lines: Lines, every: int):
        self.trainer, self.run, self.lines, self.every = trainer, run, lines, every
        self.rows = [line for line in lines.kept if (line["setting"], line["seed"]) == (run.setting, run.seed)]
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before, self.began = self.began, time.perf_counter()
        row = self.trainer.recorder.curves.frame.iloc[-1].dropna().to_dict()
        kept = {name: value for name, value in row.items() if name in KEPT or name.startswith(KEPT_GROUPS)}
        self.rows.append({**kept, "seconds": self.began - before})
        self.lines.add({**self.run.label, **self.rows[-1]})
        if state.global_step % self.every == 0:
            print(f"  step {state.global_step:4}: {self.mean_row()}", flush=True)

    def seconds_per_step(self) -> float:
        return sum(row["seconds"] for row in self.rows) / max(1, len(self.rows))

    def mean_row(self) -> str:
        last = self.rows[-EDGE:]
        names = {"reward": "reward", "entropy": "entropy", "answers/distinct": "distinct", "flow/lambda": "lambda"}
        means = [f"{label} {sum(row.get(name, 0.0) for row in last) / len(last):.3f}" for name, label in names.items()]
        return f"{', '.join(means)}; {self.seconds_per_step():.2f} s a step"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    disable_progress_bar()
    runs = all_runs(options)[options.share[0] :: options.share[1]]
    lines = Lines(options.json, runs, options.checkpoints)
    begun, longest = time.perf_counter(), 0.0
    remaining = [run for run in runs if (run.setting, run.seed) not in lines.done]
    for number, run in enumerate(remaining):
        started = time.perf_counter()
        if started - begun + longest > 60 * options.minutes:
            print(f"{len(remaining) - number} runs are left, which {options.minutes} minutes do not hold.")
            return
        print(f"{run.setting}, seed {run.seed}", flush=True)
        lines.add({**run.label, **result(run, options, lines), "arguments": run.arguments})
        longest = max(longest, time.perf_counter() - started)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="words", choices=list(SETTINGS))
    parser.add_argument(
        "--model", default=str(ROOT / "out" / "smollm2"), help="folder of opefo_trl.playground.smollm2"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--settings", nargs="+", help="each `name: arguments of train.py`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help="optimizer steps, else the recipe's")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; by default 16 on a CPU, and all on a GPU")
    parser.add_argument("--samples", type=int, default=64, help="answers to each held-out prompt")
    parser.add_argument("--held-out", type=int, help="held-out prompts, else all")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run that would end later")
    parser.add_argument("--share", default="0/1", help="0/3 runs the first, fourth, ... of the runs")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints; without it a run begins anew")
    parser.add_argument("--json", type=Path, required=True, help="file for the results, a JSON object a line")
    options = parser.parse_args(arguments)
    options.share = [int(part) for part in options.share.split("/")]
    return options


def all_runs(options: argparse.Namespace) -> list[Run]:
    """Return the runs: the base, then every setting with the first seed, then with the second."""
    settings = [text.partition(":") for text in options.settings or SETTINGS[options.task]]
    rows = options.prompts * options.generations
    micro_batch = min(options.rows or (16 if options.device == "cpu" else rows), rows)
    common = ["--num_generations", options.generations, "--per_device_train_batch_size", micro_batch]
    common += ["--gradient_accumulation_steps", rows // micro_batch]
    common += ["--use_cpu", "true"] if options.device == "cpu" else ["--use_cpu", "false", "--bf16", "true"]
    common += ["--max_steps", options.steps] if options.steps else []
    runs = [
        Run(name.strip(), seed, [*map(str, common), *shlex.split(rest)])
        for seed in options.seeds
        for name, _, rest in settings
    ]
    return [Run(BASE, 0, []), *runs]


def result(run: Run, options: argparse.Namespace, lines: Lines) -> dict[str, Any]:
    """Train, and return the scores of the end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(folder_of(run, options.checkpoints)) if options.checkpoints else temporary
        model, temperature, numbers = options.model, 0.7, {}
        if run.setting != BASE:
            trainer = make_trainer(run, options, folder)
            temperature = trainer.args.temperature
            steps = StepLines(trainer, run, lines, 25)
            trainer.add_callback(steps)
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.train(resume_from_checkpoint=steps_of(folder) > 0)
            numbers = {"seconds_per_step": steps.seconds_per_step()}
            numbers |= {name: mean_of(steps.rows[-EDGE:], name) for name in ("entropy", "reward", "answers/distinct")}
            if options.device == "cuda":
                numbers["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            print(f"  {len(steps.rows)} steps: {steps.mean_row()}", flush=True)
            model = temporary
            trainer.save_model(model)
            del trainer, steps
        scores = held_out(model, temperature, options)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"  held out: {', '.join(f'{name} {scores[name]:.3f}' for name in scores if name != 'written')}", flush=True)
    print(f"  written: {scores['written']}", flush=True)
    return {**numbers, "held_out": scores}


def folder_of(run: Run, folders: Path) -> Path:
    return folders / f"{run.setting}, seed {run.seed}"


def steps_of(folder: str | Path) -> int:
    """Return the steps that the newest checkpoint in a folder has taken, 0 without one."""
    newest = newest_checkpoint(folder)
    return 0 if newest is None else step_of(newest)


def make_trainer(run: Run, options: argparse.Namespace, folder: str) -> Any:
    """Return the trainer that train.py would make."""
    trainer = script.make_trainer(*parsed(run, options, folder))
    trainer.remove_callback(PrinterCallback)
    return trainer


def parsed(run: Run, options: argparse.Namespace, folder: str) -> tuple[Any, ...]:
    """Return the arguments of a run as train.py reads them."""
    words = ["--config", str(ROOT / "configs" / f"smollm2-{options.task}.yaml"), "--model_name_or_path", options.model]
    words += ["--output_dir", folder, "--eval_prompts", "0", "--disable_tqdm", "true"]
    words += ["--save_strategy", "steps", "--save_steps", "10"] if options.checkpoints else ["--save_strategy", "no"]
    words += ["--seed", str(run.seed), *run.arguments]
    return Parser((script.ScriptArguments, OPEFOConfig, ModelConfig)).parse(words)


def mean_of(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def held_out(model: str, temperature: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return scores on the held-out prompts, and ten of the answers."""
    task, source = TASKS[options.task], ModelSource(model)
    tokenizer, grader = source.tokenizer(), TaskGrader(task)
    problems = load_problems(options.task)[: options.held_out]
    prompts = tokenize_problems(problems, tokenizer, "none", None)
    longest, count = task.max_new_tokens, options.samples
    engine = Transformers(source, Decoding(temperature, 1.0, longest), tokenizer)
    golds = [problem["answer"] for problem in problems]
    answers, right, distinct = graded(engine, grader, prompts, golds, longest, count)
    logp, tokens = (sum(getattr(one, name) for samples in answers for one in samples) for name in ("logp", "tokens"))
    written = [f"{gold}: {samples[0].text.strip()}" for gold, samples in zip(golds, answers, strict=True)]
    passed = {f"pass@{k}": pass_at_k(right, k) for k in (1, 16, 64) if k <= count}
    return {**passed, "distinct": sum(distinct) / len(distinct), "entropy": -logp / tokens, "written": written[:10]}


if __name__ == "__main__":
    main()
