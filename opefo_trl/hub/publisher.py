"""Uploads beside a training: one at a time, in a process of its own, tried again until they are done.

The training only links files into the outbox. What talks to the Hub is a process of its own for each attempt: one that
hangs, crashes or is slow costs the training nothing, and one that is killed leaves its save in the outbox. A thread
starts these processes, reads what came of each, and waits longer after each failure.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, get_token

from opefo_trl.hub import outbox, upload
from opefo_trl.hub.outbox import Outcome, Target

logger = logging.getLogger(__name__)

# Seconds after the first failure in a row, the second, and all from the last
PAUSES = (10.0, 30.0, 60.0, 120.0, 300.0)
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
        self._failed = self._failures = self._waiting = 0  # attempts: in all, and since the last that did not
        self._not_before, self._error, self._refused = 0.0, "", False
        self._unkept: list[str] = []  # saves that the outbox had no room for
        self._closed = self._told = False
        self._owner = os.getpid()
        self._process: subprocess.Popen[str] | None = None
        self._pushed: Outcome | None = None
        self._known = len(outbox.outcomes(run))  # outcomes of earlier runs in this folder
        outbox.sweep(run)
        known = Target.read(run)
        if known is not None and known.repo != target.repo:  # what an earlier run could not push there, say
            outbox.readdress(run, target)
        self._write_target()
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    # ---- called by the training

    def _write_target(self) -> None:
        with suppress(OSError):  # a full disk: there may be room at the next save
            self.target.write(self.run)

    def save(self, checkpoint: Path | None, message: str, revision: str | None = None) -> None:
        """Put a save into the outbox. A full disk costs the push, never the run."""
        target = self.target if revision is None else replace(self.target, revision=revision)
        if Target.read(self.run) is None:
            self._write_target()
        try:
            outbox.stage(self.run, outbox.parts_of(self.run, checkpoint, target.strategy), message, target)
        except OSError as error:
            self._unkept.append(message)
            logger.warning(f"{message!r} could not be kept for the Hub: {error}. The end of the run tries again.")
        with self._changed:
            self._told = False
            self._changed.notify_all()

    def finish(self, told: bool = True) -> CommitInfo:
        """
        Wait until all is on the Hub, and say so; or raise an error that says what is not, after a few attempts more.
        `told=False` where nobody may hear it: then the end of the process says it again.
        """
        self._keep_again()
        with self._changed:
            failed, patience = self._failed, 1 + len(upload.PAUSES)
            self._waiting, self._not_before = self._waiting + 1, 0.0
            self._changed.notify_all()
            try:
                while not self._at_rest() and self._failed < failed + (1 if self._refused else patience):
                    self._changed.wait(60.0)
            finally:
                self._waiting -= 1
        if self._unkept or self._wanted():
            self._told = told
            raise NotPushedError(self.sentence())
        commits = [outcome for outcome in outbox.outcomes(self.run) if outcome.commit]  # also of a push by hand
        pushed = self._pushed or (commits[-1] if commits else None)
        if pushed is None:
            raise NotPushedError(f"There was nothing to push to {self.repo}.")
        url, message, oid = pushed.url or "", pushed.messages[-1], pushed.commit or ""
        return CommitInfo(url, message, "", oid, _endpoint=url.split(f"/{self.repo}/commit/")[0])

    def stop(self) -> list[str]:
        """End at once; returns what is not on the Hub."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
        atexit.unregister(self._at_exit)
        self._thread.join(timeout=10)
        return self._unkept + outbox.missing(self.run)

    # ---- what came of it

    def outcomes(self) -> list[Outcome]:
        return outbox.outcomes(self.run)[self._known :]

    def sentence(self) -> str:
        left = outbox.missing(self.run) + self._unkept
        what = f"{left[-1]!r}" + (f" and {len(left) - 1} more" if len(left) > 1 else "") if left else "the run"
        why = self._error or ("there was no room to keep it" if self._unkept else "it was not tried")
        later = f"python -m opefo_trl.hub push {self.run}"
        return f"NOT on the Hub, in {self.repo}: {what}. The reason: {why}. To push it later: {later}"

    def report(self) -> str:
        """A line for every save."""
        return report(self.repo, self.outcomes(), outbox.missing(self.run) + self._unkept)

    def _keep_again(self) -> None:
        """What there was no room for, as far as the run still has it."""
        if not self._unkept:
            return
        with suppress(OSError):
            state = outbox.state_of(self.run, self.target.strategy)
            outbox.stage(self.run, state, f"{self._unkept[-1]}, once more", self.target)
            self._unkept.clear()

    # ---- the thread

    def _wanted(self) -> bool:
        return self._greets or bool(outbox.missing(self.run))

    def _at_rest(self) -> bool:
        return self._closed or not self._thread.is_alive() or not (self._process or self._wanted())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (self._wanted() and time.monotonic() >= self._not_before):
                    rest = max(self._not_before - time.monotonic(), 0.0)
                    self._changed.wait(rest if self._wanted() else None)
                if self._closed:
                    return
            try:
                outcome = self._attempt()
            except Exception as error:  # no memory for a process, say
                outcome = Outcome([], error=f"{type(error).__name__}: {error}")
            with self._changed:
                self._process = None
                self._take_in(outcome)
                self._changed.notify_all()

    def _attempt(self) -> Outcome:
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        token = self.token or get_token()  # which a process of its own may not find: Colab's, for one
        if token is not None:
            environment["HF_TOKEN"] = str(token)
        process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, "attempt", str(self.run.absolute())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is the training's
        )
        with self._changed:
            self._process = process
            if self._closed:
                process.kill()
        return _read(process)

    def _take_in(self, outcome: Outcome) -> None:
        """Under the lock: remember what came of an attempt, and when to try again."""
        self._failed += not outcome.ok
        if self._closed:
            return
        self.repo = outcome.repo or self.repo
        self._refused = not outcome.ok and (outcome.refused or outcome.wait > upload.LONGEST_WAIT)
        if outcome.ok:
            self._greets, self._failures, self._not_before, self._error = False, 0, 0.0, ""
            if outcome.commit:
                self._pushed = outcome
                logger.info(f"Pushed to {self.repo}: {outcome.messages[-1]}, {sizes_of(outcome)}, {outcome.url}")
            return
        if outcome.error != self._error:  # once, and not at every attempt
            logger.warning(f"Not pushed to {self.repo}: {outcome.error}. The training goes on.")
        self._error = outcome.error or ""
        pauses = upload.PAUSES if self._waiting else PAUSES
        pause = max(outcome.wait, pauses[min(self._failures, len(pauses) - 1)])
        self._failures += 1
        self._not_before = time.monotonic() + pause

    def _at_exit(self) -> None:
        """Of a process that has not called `finish` since its last save: one more try, and the truth."""
        if self._closed or self._told or self._owner != os.getpid() or not (self._unkept or outbox.missing(self.run)):
            return
        try:
            print(f"Pushing to {self.repo} what is left ...", file=sys.stderr)
            print(f"Pushed: {self.finish().commit_url}", file=sys.stderr)
        except NotPushedError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print(self.sentence(), file=sys.stderr)
        self.stop()


def _read(process: subprocess.Popen) -> Outcome:
    """What an attempt says of itself in its last line, or what its end says."""
    said, problems = process.communicate()
    try:
        return Outcome.from_json(said.strip().splitlines()[-1])
    except (IndexError, TypeError, ValueError):
        last = [line for line in problems.strip().splitlines() if line.strip()][-1:]
        problem = " ".join(["the upload ended with status", str(process.returncode), *last])
        return Outcome([], error=upload.without_token(problem))


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

    def after(message: str) -> str:
        return f", after {failures[message]} failed attempts" if message in failures else ""

    for outcome in outcomes:
        for message in outcome.messages:
            if outcome.commit:
                lines.append(f"  {message}: {outcome.commit[:7]}, {sizes_of(outcome)}{after(message)}")
            elif outcome.superseded:
                lines.append(f"  {message}: left out, a newer one came before it was sent")
            else:
                failures[message] = failures.get(message, 0) + 1
    lines += [f"  {message}: NOT there{after(message)}" for message in left]
    return "\n".join([f"On the Hub, in {repo}:", *lines])
