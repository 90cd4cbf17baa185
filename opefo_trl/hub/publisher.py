"""Uploads beside a training: one at a time, in a process of its own, tried again until they are done.

The training only links files into the outbox. What talks to the Hub is a process of its own for each attempt: one that
hangs, crashes or is slow costs the training nothing, and one that is killed leaves its save in the outbox. A thread
starts these processes, reads what came of each, and waits longer after each failure.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from opefo_trl.hub import commit, outbox
from opefo_trl.hub.outbox import Outcome, Target

logger = logging.getLogger(__name__)

PAUSES = (
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)  # seconds after the first failure in a row, the second, and all from the last
# The training comes first, from the first import on
ATTEMPT = (
    "import os, sys; hasattr(os, 'nice') and os.nice(19); from opefo_trl.hub.__main__ import main; sys.exit(main())"
)
PACKAGE = Path(__file__).parents[2]


class NotPushedError(RuntimeError):
    """Something is not on the Hub; the message says what, why, and how to push it later."""


class Publisher:
    """
    Pushes what a run saves.

    Args:
        run (`Path`): the output folder.
        target (`Target`): repository and strategy.
        token (`str`, *optional*): instead of the one that huggingface_hub finds.
    """

    def __init__(self, run: Path, target: Target, token: str | None = None):
        self.run, self.target, self.token = run, target, token
        self.repo = target.repo  # with its owner, once the Hub has told
        self._changed = threading.Condition()
        self._greets = True  # the repository is made, and the token tried, before there is anything to push
        self._failures, self._not_before, self._error = 0, 0.0, ""
        self._ending: list[float] | None = None  # pauses that are left, once the run has ended
        self._closed, self._owner = False, os.getpid()
        self._process: subprocess.Popen | None = None
        self._known = len(outbox.outcomes(run))  # outcomes of earlier runs in this folder
        target.write(run)
        shutil.rmtree(run / outbox.FOLDER / "making", ignore_errors=True)  # of a run that was killed
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    # ---- called by the training

    def save(self, checkpoint: Path | None, message: str) -> None:
        """Put a save into the outbox. A full disk costs the push, never the run."""
        try:
            parts = outbox.parts_of(self.run, checkpoint, self.target.strategy)
            outbox.stage(self.run, parts, message, self.target.every)
        except OSError as error:
            logger.warning(f"{message!r} could not be kept for the Hub ({error}); the end of the run pushes the rest.")
        with self._changed:
            self._changed.notify_all()

    def turn_to(self, revision: str | None, token: str | None) -> None:
        """Another branch, or another token, from here on."""
        if revision != self.target.revision:
            self.target = replace(self.target, revision=revision)
            self.target.write(self.run)
        self.token = token or self.token

    def finish(self) -> CommitInfo:
        """Wait until all is on the Hub, and say so; or raise an error that says what is not."""
        with self._changed:
            self._ending, self._not_before = list(commit.PAUSES), 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or (not self._process and not self._wanted()) or self._gave_up)
            self._ending = None
            self._not_before = min(self._not_before, time.monotonic() + PAUSES[-1])
        left = outbox.missing(self.run)
        if left:
            raise NotPushedError(self.sentence(left))
        last = self.commits()[-1] if self.commits() else None
        if last is None:
            raise NotPushedError(f"NOT pushed to {self.repo}: {self._error or 'there was nothing to push'}.")
        url = last.url or ""
        return CommitInfo(
            commit_url=url,
            commit_message=last.messages[-1],
            commit_description="",
            oid=last.commit or "",
            _endpoint=url.split(f"/{self.repo}/commit/")[0],
        )

    def stop(self) -> list[str]:
        """End at once; returns what is not on the Hub."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
        atexit.unregister(self._at_exit)
        self._thread.join(timeout=10)
        return outbox.missing(self.run)

    # ---- what came of it

    def outcomes(self) -> list[Outcome]:
        return outbox.outcomes(self.run)[self._known :]

    def commits(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes() if outcome.commit]

    def sentence(self, left: list[str]) -> str:
        what = f"{left[-1]!r}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
        return (
            f"NOT on the Hub, in {self.repo}: {what}. {self._error or 'It was not tried'}. It is kept in "
            f"{self.run / outbox.FOLDER}; push it later: python -m opefo_trl.hub push {self.run}"
        )

    def report(self) -> str:
        """A line for every save."""
        return report(self.repo, self.outcomes(), outbox.missing(self.run))

    # ---- the thread

    def _wanted(self) -> bool:
        return self._greets or bool(outbox.missing(self.run))

    @property
    def _gave_up(self) -> bool:
        return self._ending is not None and self._not_before == float("inf")

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (self._wanted() and time.monotonic() >= self._not_before):
                    rest = self._not_before - time.monotonic()
                    self._changed.wait(min(max(rest, 0.0), 3600.0) if self._wanted() else None)
                if self._closed:
                    return
                self._process = process = self._start()
            outcome = _read(process)
            with self._changed:
                self._process = None
                self._take_in(outcome)
                self._changed.notify_all()

    def _start(self) -> subprocess.Popen | None:
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        if self.token is not None:
            environment["HF_TOKEN"] = str(self.token)
        command = [sys.executable, "-c", ATTEMPT, "attempt", str(self.run.absolute())]
        try:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is the training's
            )
        except OSError as error:  # no memory to fork with, say
            self._error = str(error)
            return None

    def _take_in(self, outcome: Outcome) -> None:
        """Under the lock: remember what came of an attempt, and when to try again."""
        if self._closed:
            return
        self.repo = outcome.repo or self.repo
        if outcome.ok:
            self._greets, self._failures, self._not_before, self._error = False, 0, 0.0, ""
            if outcome.commit:
                logger.info(f"Pushed to {self.repo}: {outcome.messages[-1]}, {sizes_of(outcome)}, {outcome.url}")
            return
        if outcome.error != self._error:  # once, and not at every attempt
            logger.warning(f"Not pushed to {self.repo}: {outcome.error}. The training goes on.")
        self._error = outcome.error or ""
        pause = max(outcome.wait, PAUSES[min(self._failures, len(PAUSES) - 1)])
        if self._ending is not None:
            patient = self._ending and not outcome.refused and outcome.wait <= commit.LONGEST_WAIT
            pause = max(outcome.wait, self._ending.pop(0)) if patient else float("inf")
        self._failures += 1
        self._not_before = time.monotonic() + pause

    def _at_exit(self) -> None:
        """Of a process that has not called `finish`: one more try for what is left, and the truth."""
        if self._closed or self._owner != os.getpid() or not outbox.missing(self.run):
            return
        try:
            print(f"Pushing to {self.repo} what is left ...", file=sys.stderr)
            self.finish()
        except (NotPushedError, KeyboardInterrupt) as error:
            self.stop()
            print(error or self.sentence(outbox.missing(self.run)), file=sys.stderr)


def _read(process: subprocess.Popen | None) -> Outcome:
    """What an attempt says of itself in its last line, or what its end says."""
    if process is None:
        return Outcome([], error="no process could be started")
    said, problems = process.communicate()
    try:
        return outbox.of_json(said.strip().splitlines()[-1])
    except (IndexError, TypeError, ValueError):
        last = [line for line in problems.strip().splitlines() if line.strip()][-1:]
        return Outcome([], error=" ".join(["the upload ended with status", str(process.returncode), *last]))


def in_background(function: Callable[[], Any]) -> Future:
    with_one = ThreadPoolExecutor(max_workers=1, thread_name_prefix="end of the push")
    future = with_one.submit(function)
    with_one.shutdown(wait=False)
    return future


def sizes_of(outcome: Outcome) -> str:
    return f"{outcome.files} files, {outcome.bytes / 1e6:.1f} MB"


def report(repo: str, outcomes: list[Outcome], left: list[str]) -> str:
    lines: list[str] = []
    failures: dict[str, int] = {}
    for outcome in outcomes:
        for message in outcome.messages:
            if outcome.commit:
                after = f", after {failures[message]} failed attempts" if message in failures else ""
                lines.append(f"  {message}: {outcome.commit[:7]}, {sizes_of(outcome)}{after}")
            elif outcome.superseded:
                lines.append(f"  {message}: left out, a newer one came before it was sent")
            else:
                failures[message] = failures.get(message, 0) + 1
    lines += [f"  {message}: NOT there, after {failures.get(message, 0)} failed attempts" for message in left]
    return "\n".join([f"On the Hub, in {repo}:", *lines])
