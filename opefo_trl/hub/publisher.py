"""Uploads beside a training: a daemon thread uploads what waits in the outbox, and retries until it is done."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from huggingface_hub import CommitInfo

from opefo_trl.files import HUB_FOLDER, list_files
from opefo_trl.hub import upload
from opefo_trl.hub.outbox import Outbox, Save, Target, files_to_publish

logger = logging.getLogger(__name__)

PAUSES = (5.0, 15.0, 45.0, 120.0, 300.0)  # seconds after each failure in a row
ATTEMPTS = 4  # before somebody who waits hears that it failed
HANGS, SLOWEST = 1200.0, 0.5e6  # an upload hangs if it takes longer than these seconds, plus bytes at this rate


class NotPushedError(RuntimeError):
    """Something is not on the Hub; the message says what, why, and how to push it later."""


class Publisher:
    """
    Pushes the snapshots of the run in a folder. `token` takes the place of the one that huggingface_hub finds.

    A thread is enough: requests have time-outs, and who waits for a client that hangs nevertheless is told so. The
    process may end at any moment. The next run in the folder, or `python -m opefo_trl.hub push`, goes on.
    """

    def __init__(self, run: Path, target: Target, token: str | None = None):
        self.run, self.target, self.token = run, target, token
        self.repo = target.repo  # with its owner as soon as the Hub has told
        self.outbox = Outbox(run, target.every or target.strategy == "all_checkpoints")
        self._changed, self._wake, self._closed = threading.Condition(), threading.Event(), False
        self._repo_pending = True  # create the repository, and try the token, before there is anything to push
        self._failures, self._failures_in_row, self._deadline = 0, 0, float("inf")
        self._error = upload.UploadError("nothing was waiting, another process may have pushed it")
        self._unstaged: list[str] = []  # messages of saves that the disk had no room for
        self._lines: list[str] = []  # of the report
        self._commit: CommitInfo | None = None
        upload.set_timeouts()
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit, os.getpid())

    def stage(self, checkpoints: Sequence[Path], message: str, revision: str | None = None) -> None:
        """Put a save into the outbox. A full disk costs the push, never the run."""
        try:
            files = files_to_publish(self.run, checkpoints, self.target.strategy)
            self.outbox.stage(files, message, revision)
            self._unstaged.clear()  # this save is newer
        except OSError as error:
            self._error = upload.UploadError(f"it could not be kept: {error}")
            self._unstaged.append(message)
            logger.warning(f"{message!r} could not be kept for the Hub: {error}. The next save takes its place.")
        self._wake.set()

    def finish(self, attempts: int = ATTEMPTS) -> CommitInfo:
        """Wait until everything is on the Hub, or raise `NotPushedError` after a few more attempts."""
        first, self._failures_in_row = self._failures, 0
        self._wake.set()
        with self._changed:
            while self._repo_pending or self.outbox.waiting():
                if self._failures >= first + (1 if self._error.wait > upload.LONGEST_WAIT else attempts):
                    break
                if time.monotonic() > self._deadline:
                    self._error = upload.UploadError("the upload hangs")
                    break
                self._changed.wait(1.0)
        if self._commit is None or self.missing():
            *others, last = [repr(message) for message in self.missing()] or ["the repository"]
            raise NotPushedError(
                f"NOT on the Hub, in {self.repo}: {last}{f' and {len(others)} more' if others else ''}. The reason: "
                f"{self._error}. To push it later: python -m opefo_trl.hub push {self.run}"
            )
        return self._commit

    def stop(self) -> list[str]:
        """Start no other upload; return the saves that are not on the Hub."""
        self._closed = True
        self._wake.set()
        atexit.unregister(self._at_exit)
        self._thread.join(timeout=3)
        return self.missing()

    def report(self) -> str:
        """Return a line for every save."""
        superseded = [f"{message}: superseded by a newer save" for message in self.outbox.superseded]
        missing = [f"{message}: NOT there" for message in self.missing()]
        return "\n  ".join([f"On the Hub, in {self.repo}:", *self._lines, *superseded, *missing])

    def missing(self) -> list[str]:
        """Return the messages of the saves that are not on the Hub."""
        return [save.message for save in self.outbox.waiting()] + self._unstaged

    def _work(self) -> None:
        while not self._closed:
            self._wake.clear()
            pause = None
            try:
                self.target.write(self.run)
                with FileLock(self.run / HUB_FOLDER / "lock", timeout=upload.SILENCE):
                    while not self._closed and (self._repo_pending or self.outbox.waiting()):
                        self._push(self.outbox.take())
            except BaseException as raised:  # a panic of huggingface_hub's Rust client is no Exception
                error = upload.explain(raised, self.token)
                if str(error) != str(self._error):  # once, and not at every attempt
                    logger.warning(f"Not pushed to {self.repo}: {error}. It is kept, and retried.")
                pause = max(error.wait, PAUSES[min(self._failures_in_row, len(PAUSES) - 1)])
                with self._changed:
                    self._error, self._failures = error, self._failures + 1
                    self._failures_in_row += 1
                    self._changed.notify_all()
            self._deadline = time.monotonic() + HANGS + (pause or 0)
            self._wake.wait(pause)

    def _push(self, save: Save | None) -> None:
        """Upload a save, or without one create the repository."""
        files, message = (list_files(save.folder / "files"), save.message) if save else ({}, "")
        self._deadline = time.monotonic() + HANGS + sum(file.stat().st_size for file in files.values()) / SLOWEST
        target = replace(self.target, revision=save.revision) if save and save.revision else self.target
        self.repo, commit, size = upload.push(target, files, message, self.token)
        if save is not None and commit is not None:
            self._commit = commit
            self._lines.append(f"{message}: {commit.oid[:7]}, {size}")
            self.outbox.discard(save.folder)
        with self._changed:
            self._repo_pending, self._failures_in_row = False, 0
            self._changed.notify_all()

    def _at_exit(self, process: int) -> None:
        """At exit, retry unsent saves once and report failures."""
        if process == os.getpid() and self.missing():  # not in a fork
            print(f"Pushing to {self.repo} what is left ...", file=sys.stderr)
            try:
                print(f"Pushed: {self.finish(attempts=1).commit_url}", file=sys.stderr)
            except (NotPushedError, KeyboardInterrupt) as error:
                print(error, file=sys.stderr)
