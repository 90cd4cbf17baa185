"""Watching of a run: evaluate its checkpoints as they are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from opefo_trl.cli.parser import split_options
from opefo_trl.cli.run_folder import checkpoints, has_ended, step_of
from opefo_trl.curves import EntropyCurves
from opefo_trl.evaluation.model_source import is_of
from opefo_trl.evaluation.results import read_results
from opefo_trl.files import (
    CHECKPOINT_PREFIX,
    EVAL_FOLDER,
    RESULTS_FILE,
    RUN_FILE,
    SAMPLING_FILE,
    SCORES_FILE,
    SCORES_PICTURE_FILE,
    write_whole,
)

_FINAL = "final"  # folder of the last model's results
_PAUSE = 5.0  # seconds between two looks at the run


def watch(
    folder: str, benchmarks: Sequence[str], settings: Mapping[str, Any], script: Path, arguments: Sequence[str]
) -> None:
    """
    Evaluate each complete checkpoint of the run in `folder`, and its last model, until the run has ended and all have
    results on `benchmarks` with these `settings`. Each gets a process of `script` (eval.py) with the given
    `arguments`, less `--watch`; that refuses a folder with results of other settings.
    """
    run = Path(folder)
    if not folder or not run.is_dir():
        raise ValueError(f"`watch={folder!r}`: there is no such folder. Give the `output_dir` of a run.")
    words = split_options(arguments)
    for option in ("--model", "--output_dir"):
        if option in words:
            raise ValueError(f"`--watch` finds models and folders by itself: leave out {option}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("`--watch` starts evaluations by itself: run it with python, not with accelerate launch.")
    passed_on = [word for before, word in pairwise(["", *words]) if "--watch" not in (before, word)]
    passed_on += ["--watch", "none"]  # a config file may have it too
    begun = "" if (run / RUN_FILE).exists() else ", in which no run has begun yet,"
    print(f"Watching {run}{begun} for checkpoints. Ctrl-C stops; the same command resumes.", flush=True)
    try:
        while True:
            ended = has_ended(run)  # asked before the look at the folder, so that the last model is not missed
            for model, out in _waiting(run, benchmarks, settings):
                _set_aside(model, out)
                _evaluate(model, out, script, passed_on)
                collect(run)
            if ended and not _waiting(run, benchmarks, settings):
                print(f"The run has ended. Its scores are in {run / SCORES_FILE} and {run / SCORES_PICTURE_FILE}.")
                return
            time.sleep(_PAUSE)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _waiting(run: Path, benchmarks: Sequence[str], settings: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    """Return the models that lack such results, each with the folder for its results."""
    models = checkpoints(run)
    if has_ended(run) and _last_step(run) not in [step_of(model) for model in models]:
        models.append(run)
    folders = [run / EVAL_FOLDER / (_FINAL if model == run else model.name) for model in models]
    pairs = zip(models, folders, strict=True)
    return [(model, out) for model, out in pairs if not has_results(model, out, benchmarks, settings)]


def has_results(model: Path, out: Path, benchmarks: Sequence[str], settings: Mapping[str, Any]) -> bool:
    """Return whether `out` has the results of these weights with such settings; yes, if the model is gone."""
    if not (out / RESULTS_FILE).exists():
        return False
    results = read_results(out)
    scores, saved = results["benchmarks"], results["settings"]
    same_settings = all(saved.get(name, value) == value for name, value in settings.items())
    same_k = all(name in scores and settings.get("k") in (None, scores[name]["k"]) for name in benchmarks)
    return same_settings and same_k and _is_of_or_gone(results, model)


def _is_of_or_gone(results: dict[str, Any], model: Path) -> bool:
    try:
        return not model.exists() or is_of(results, model)
    except FileNotFoundError:  # the run deletes it just now
        return True


def _set_aside(model: Path, out: Path) -> None:
    """Rename a folder with samples of other weights: those of an earlier run's checkpoint, or of an earlier end."""
    if not (out / SAMPLING_FILE).exists():
        return
    settings = json.loads((out / SAMPLING_FILE).read_text())
    if not _is_of_or_gone({"settings": settings}, model):
        names = (f"{out.name}-old-{number}" for number in count(1))
        out.rename(next(path for path in map(out.with_name, names) if not path.exists()))


def _last_step(run: Path) -> int | None:
    try:
        return int(EntropyCurves.load(run).frame["step"].max())
    except (OSError, ValueError):
        return None


def _evaluate(model: Path, out: Path, script: Path, arguments: Sequence[str]) -> None:
    command = [sys.executable, str(script), "--model", str(model), "--output_dir", str(out), *arguments]
    code = subprocess.run(command).returncode
    if code and model.exists():  # if it does not, the run has deleted its checkpoint meanwhile
        raise ChildProcessError(f"The evaluation of {model} failed with status {code}; its error is above.")


def collect(run: Path) -> None:
    """Write the scores of all evaluated steps beside the run's curves, and draw them together."""
    rows = []
    for file in (run / EVAL_FOLDER).glob(f"*/{RESULTS_FILE}"):
        name, results = file.parent.name, read_results(file)
        if name == _FINAL and not has_ended(run):  # of an earlier end
            continue
        if not _is_of_or_gone(results, run if name == _FINAL else run / name):
            continue
        checkpoint = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", name)
        step = int(checkpoint[1]) if checkpoint else _last_step(run) if name == _FINAL else None
        if step is None:  # the user's own folder, or the last model of a run without curves
            continue
        for benchmark, scores in results["benchmarks"].items():
            low, high = scores["interval"]
            rows.append({"step": step, "name": benchmark, "avg": scores["avg"], "low": low, "high": high})
    if not rows:
        return
    frame = pd.DataFrame(rows).drop_duplicates(["step", "name"])
    table = frame.pivot(index="step", columns="name", values=["avg", "low", "high"]).sort_index()
    table.columns = [f"eval/{name}" + ("" if kind == "avg" else f"/{kind}") for kind, name in table.columns]
    write_whole(run / SCORES_FILE, table.reset_index().to_parquet)
    with suppress(OSError):  # without curves there are scores all the same, but no picture
        EntropyCurves.load(run).plot(run / SCORES_PICTURE_FILE)
