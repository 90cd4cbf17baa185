"""Uploads beside a training: a daemon thread uploads what waits in the outbox, and retries until it is done."""

import atexit
import logging
import os
import shlex
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
HANGS, SLOWEST = 1200.0, 0.5e6  # an upload hangs if it takes longer than these seconds, plus bytes at this rate


class NotPushedError(RuntimeError):
    """Something is not on the Hub; the message says what, why, and how to push it later."""


class Publisher:
    """
    Pushes the snapshots of the run in a folder, in a thread: requests have time-outs, waiting for a client that hangs
    nevertheless ends, and the process may exit at any moment. The next run in the folder or the command line goes on.
    """

    def __init__(self, run: Path, target: Target, token: str | None = None):
        self.run, self.target, self.token = run, target, token
        self.repo = target.repo  # with its owner as soon as the Hub has told
        self.outbox = Outbox(run, target.every or target.strategy == "all_checkpoints")
        self._repo_pending = True  # create the repository, and try the token, before there is anything to push
        self._failures, self._pauses, self._deadline, self._busy = 0, iter(PAUSES), 0.0, False
        self._error = upload.UploadError("nothing was waiting, another process may have pushed it")
        self._unstaged: list[str] = []  # messages of saves that the disk had no room for
        self._lines: list[str] = []  # of the report
        self._commit: CommitInfo | None = None
        upload.set_timeouts()  # here: it closes the client, which another thread may be using later
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit, os.getpid())

    def stage(self, checkpoints: Sequence[Path], message: str, revision: str | None = None) -> None:
        """Put a save into the outbox. A full disk costs the push, never the run."""
        try:
            self.outbox.stage(files_to_publish(self.run, checkpoints, self.target.strategy), message, revision)
            self._unstaged.clear()  # this save is newer
        except OSError as error:
            self._error = upload.UploadError(f"it could not be kept: {error}")
            self._unstaged.append(message)
            self.outbox.sweep()
            logger.warning(f"{message!r} could not be kept for the Hub: {error}. The next save takes its place.")
        self._wake.set()

    def finish(self, attempts: int = 4) -> CommitInfo:
        """Wait until everything is on the Hub, or raise `NotPushedError` after that many more attempts."""
        first, self._pauses = self._failures, iter(PAUSES)
        self._deadline = max(self._deadline, time.monotonic() + HANGS)
        self._wake.set()
        while (self._busy or self._repo_pending or self.outbox.waiting()) and self._thread.is_alive():
            if self._failures >= first + (1 if self._error.wait > upload.LONGEST_WAIT else attempts):
                break
            if time.monotonic() > self._deadline:
                self._error = upload.UploadError("the upload hangs")
                break
            time.sleep(0.1)
        if self._commit is None or self.missing():
            *others, last = [repr(message) for message in self.missing()] or ["the repository"]
            what = f"{self.repo}: {last} and {len(others)} more" if others else f"{self.repo}: {last}"
            later = f"To push it later: opefo-trl hub push {shlex.quote(str(self.run))}"
            raise NotPushedError(f"NOT on the Hub, in {what}. The reason: {self._error}. {later}")
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
        lines = [f"{message}: superseded by a newer save" for message in self.outbox.superseded]
        lines += [f"{message}: NOT there" for message in self.missing()]
        return "\n  ".join([f"On the Hub, in {self.repo}:", *self._lines, *lines])

    def missing(self) -> list[str]:
        return [save.message for save in self.outbox.waiting()] + self._unstaged

    def _work(self) -> None:
        while not self._closed:
            self._wake.clear()
            self._busy, self._deadline, pause = True, time.monotonic() + HANGS, None
            try:
                self.target.write(self.run)
                with FileLock(self.run / HUB_FOLDER / "lock", timeout=upload.SILENCE):
                    if self._repo_pending:
                        self.repo, _ = upload.push(self.target, {}, "", self.token)
                        self._repo_pending = False
                    while not self._closed and (save := self.outbox.take()) is not None:
                        self._push(save)
                self._pauses = iter(PAUSES)
            except BaseException as raised:  # a panic of huggingface_hub's Rust client is no Exception
                error = upload.explain(raised, self.token)
                if str(error) != str(self._error):  # once, and not at every attempt
                    logger.warning(f"Not pushed to {self.repo}: {error}. It is kept, and retried.")
                pause = max(error.wait, next(self._pauses, PAUSES[-1]))
                self._error, self._failures = error, self._failures + 1
            self._busy = False
            self._wake.wait(pause)

    def _push(self, save: Save) -> None:
        files = list_files(save.folder / "files")
        size = sum(file.stat().st_size for file in files.values())
        self._deadline = time.monotonic() + HANGS + size / SLOWEST
        target = replace(self.target, revision=save.revision or self.target.revision)
        self.repo, commit = upload.push(target, files, save.message, self.token)
        self._lines.append(f"{save.message}: {commit.oid[:7]}, {len(files)} files, {size / 1e6:.1f} MB")
        self._commit = commit
        self.outbox.discard(save.folder)

    def _at_exit(self, process: int) -> None:
        """At exit, retry unsent saves once and report failures."""
        if process == os.getpid() and self.missing():  # not in a fork
            print(f"Pushing to {self.repo} what is left ...", file=sys.stderr)
            try:
                print(f"Pushed: {self.finish(attempts=1).commit_url}", file=sys.stderr)
            except (NotPushedError, KeyboardInterrupt) as error:
                print(error, file=sys.stderr)
