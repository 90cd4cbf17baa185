"""Runs of a comparison: one process trains and measures many, and each ends as one line of a results file.

A worker imports everything once and calls `main` of train.py, which reads the model anew and sets all seeds, so a run
has the bits of `python train.py` with the same options in a process of its own (tests/test_compare.py).
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from comparison.jobs import Job
from comparison.measures import measure
from comparison.settings import words_of
from opefo_trl.files import write_whole

ROOT = Path(__file__).parents[2]
CODE = ("opefo_trl", "train.py", "configs")  # what a run depends on


class RunFailedError(RuntimeError):
    """A run that ended with an error, which its log has."""


# ---- in the parent


def run_all(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, dict | Exception]]:
    """
    Run jobs on some worker processes, and yield each with its result or its error as soon as it ends.

    A worker that dies is replaced. After a run on a GPU it is replaced too: not all of the memory would be free again.
    """
    waiting, running = deque(jobs), {}
    idle = [_worker() for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or running:
            while waiting and idle:
                worker, job = idle.pop(), waiting.popleft()
                running[worker.submit(run, job)] = job, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, worker = running.pop(future)
                outcome = _outcome(future)
                if isinstance(outcome, BrokenProcessPool) or job.fields.get("use_cpu") is not True:
                    worker.shutdown()
                    worker = _worker()
                idle.append(worker)
                yield job, outcome
    finally:
        for worker in [*idle, *(worker for _, worker in running.values())]:
            worker.shutdown()


def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _outcome(future: Future) -> dict | Exception:
    try:
        return future.result()
    except (RunFailedError, BrokenProcessPool) as error:
        return error


# ---- in a worker


def _end_with_parent() -> None:
    """End this process when its parent has died: nobody would take its results."""

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(job: Job) -> dict[str, Any]:
    """Train and measure, with all output in the job's log; return the row of the results file."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with _output_to(job.log):
        try:
            made = made_with()
            discard_other_run(job, made)
            _train(["--config", str(job.config), *words_of(job.given), "--output_dir", str(job.out)])
            row = {"setting": job.setting, "seed": job.seed, "split": job.split, **measure(job)}
        except BaseException as error:  # also SystemExit, by which train.py reports a mistake
            traceback.print_exc()
            raise RunFailedError(f"{type(error).__name__}: {error}") from None
        finally:
            gc.collect()
    shutil.rmtree(job.out)  # the row has what is needed of it
    job.out.with_suffix(".json").unlink()
    return {**row, "made": made, "fields": job.fields}


def _train(words: list[str]) -> None:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from train import main

    main(words)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append all output of this process to a file, also that of libraries that keep a stream of their own."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, stream in enumerate(kept, 1):
                os.dup2(stream, number)
                os.close(stream)


def discard_other_run(job: Job, made: dict[str, str]) -> None:
    """Delete an interrupted run of other fields or other code: continuing it would mix the two."""
    path, begun = job.out.with_suffix(".json"), {"fields": job.fields, "commit": made["commit"]}
    if job.out.exists() and not (path.exists() and json.loads(path.read_text()) == begun):
        print(f"{job.out} holds an interrupted run of other settings or other code; it begins anew.")
        shutil.rmtree(job.out)
    write_whole(path, lambda part: part.write_text(json.dumps(begun)))


@cache
def made_with() -> dict[str, str]:
    """Return what else a result depends on: the code's commit, versions, and the kind of CPU."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"commit": _commit(), **packages, "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}


def _commit() -> str:
    """Return the last commit of the code, with a hash of changes since then; "unknown" outside of a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=12", "--", *CODE).strip()
        changes = git("diff", "HEAD", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else commit
