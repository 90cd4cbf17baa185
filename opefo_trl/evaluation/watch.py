"""Evaluating the checkpoints of a run while it goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd

from opefo_trl.cli.run_folder import checkpoints, has_ended, step_of
from opefo_trl.curves import EntropyCurves
from opefo_trl.evaluation.results import read_results
from opefo_trl.files import CHECKPOINT_PREFIX, RESULTS_FILE, SCORES_FILE, SCORES_PICTURE_FILE, write_whole

FINAL = "final"
PAUSE = 5.0  # seconds between two looks


def watch(
    folder: str, benchmarks: Sequence[str], script: Path, arguments: Sequence[str], pause: float = PAUSE
) -> None:
    """
    Evaluate each checkpoint that is whole, and the model at the end, each in a process of its own with the options
    that were given. Returns when the run has ended and all that it left is evaluated.
    """
    run = Path(folder)
    if not run.is_dir():
        raise ValueError(f"There is no folder {folder!r} to watch. Give the `output_dir` of a run.")
    for option in ("--model", "--output_dir"):
        if any(word == option or word.startswith(f"{option}=") for word in arguments):
            raise ValueError(f"`--watch` finds models and folders by itself: leave out {option}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "`--watch` starts its evaluations by itself: call it with python, not with accelerate launch."
        )
    rest = without(arguments, "--watch")
    print(f"Watching {run} for checkpoints. Ctrl-C stops that, and the same command goes on.", flush=True)
    try:
        while True:
            ended = has_ended(run)  # before the look, so that the last model is not missed
            for model, out in waiting(run, benchmarks):
                evaluate(model, out, script, rest)
                collect(run)
            if ended and not waiting(run, benchmarks):
                print(f"The run has ended; its scores are in {run / SCORES_FILE} and {run / SCORES_PICTURE_FILE}")
                return
            time.sleep(pause)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def waiting(run: Path, benchmarks: Sequence[str]) -> list[tuple[Path, Path]]:
    """Models without results of these benchmarks, each with the folder for them."""
    models = checkpoints(run)
    if has_ended(run) and last_step(run) not in [step_of(model) for model in models]:
        models.append(run)
    outs = [run / "eval" / (FINAL if model == run else model.name) for model in models]
    return [(model, out) for model, out in zip(models, outs, strict=True) if not has_results(out, benchmarks)]


def has_results(out: Path, benchmarks: Sequence[str]) -> bool:
    return (out / RESULTS_FILE).exists() and set(benchmarks) <= set(read_results(out)["benchmarks"])


def last_step(run: Path) -> int | None:
    try:
        return int(EntropyCurves.load(run).frame["step"].max())
    except (OSError, ValueError):
        return None


def evaluate(model: Path, out: Path, script: Path, rest: Sequence[str]) -> None:
    command = [sys.executable, str(script), "--model", str(model), "--output_dir", str(out), *rest]
    code = subprocess.run(command).returncode
    if code and model.exists():  # otherwise the run has deleted it meanwhile
        raise RuntimeError(f"The evaluation of {model} ended with status {code}: what it said is above.")


def collect(run: Path) -> None:
    """A row for each evaluated step, beside the run's curves, and a picture of both."""
    rows = []
    for file in (run / "eval").glob(f"*/{RESULTS_FILE}"):
        name = file.parent.name
        found = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", name)
        step = int(found[1]) if found else last_step(run) if name == FINAL else None
        if step is not None:  # else somebody's own, or a run without curves
            for benchmark, scores in read_results(file)["benchmarks"].items():
                low, high = scores["interval"]
                rows.append({"step": step, "name": benchmark, "avg": scores["avg"], "low": low, "high": high})
    if not rows:
        return
    table = pd.DataFrame(rows).pivot(index="step", columns="name", values=["avg", "low", "high"]).sort_index()
    table.columns = [f"eval/{name}" + ("" if kind == "avg" else f"/{kind}") for kind, name in table.columns]
    write_whole(run / SCORES_FILE, table.reset_index().to_parquet)
    with suppress(OSError):  # a run without curves has its scores all the same
        EntropyCurves.load(run).plot(run / SCORES_PICTURE_FILE)


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Command-line words without an option and its value."""
    words = iter(arguments)
    kept = []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept
