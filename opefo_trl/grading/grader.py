r"""Grading of mathematical answers by math-verify, in child processes that can be ended.

    with Grader() as grader:
        grades = grader.grade(["1/2", "7"], [r"... \boxed{0.5}", "I do not know"])
    [grade.outcome for grade in grades]  # correct, no_answer

A grade is one of five outcomes, each counted in `grader.counts`:

    correct, wrong   math-verify compared the answer with the gold
    no_answer        the policy (see `answers.py`) found no answer
    timeout          the comparison took more than `timeout` seconds of processor time
    error            the comparison failed: math-verify raised, or ran out of memory

The deadline is processor time, enforced by the kernel, so verdicts do not depend on the load of the machine. The child
is `worker.py`, started as a program of its own: a pool that forks would copy a process with threads and CUDA in it,
and a pool that spawns would run a user's script a second time if it has no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from opefo_trl.grading.answers import POLICIES, answer_of, bare, is_answer, without_thinking
from opefo_trl.validation import check_choice, check_number

WORKER = Path(__file__).with_name("worker.py")
_RULES = 2  # of worker.py: count up where a verdict changes, so that results of both are not mixed
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
LONGEST = 10_000  # characters; a longer answer is wrong without being compared
_TAIL = 2_000  # characters at the end of a completion that the lenient policy searches
_CACHED_VERDICTS = 100_000
_START_TIMEOUT = 300.0  # seconds by the clock for a worker to start, even on a busy machine


class Outcome(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"


class Grade(NamedTuple):
    outcome: Outcome
    answer: str | None = None  # as written in the completion

    @property
    def correct(self) -> bool:
        return self.outcome is Outcome.CORRECT


class _Question(NamedTuple):
    """A comparison for a worker. `answer=None` asks whether the gold can be read."""

    gold: str
    answer: str | None
    boxed: bool  # False: the worker searches the text `answer` for an answer


_Verdict = tuple[str, str | None]  # outcome, and the answer that the worker found


class Grader:
    """
    Grades completions in child processes, which start on first use. Threads may share a grader, and a forked process
    starts workers of its own.

    Args:
        workers (`int`, *optional*): number of child processes; at most, and by default, the cores of this rank.
        timeout (`float`): seconds of processor time for an answer.
        policy (`str`): which part of a completion is its answer: `boxed`, `answer_line` or `lenient`.
        memory (`float`): GiB of address space for a worker.
    """

    def __init__(
        self, workers: int | None = None, timeout: float = 5.0, policy: str = "boxed", memory: float = 4.0
    ) -> None:
        self.policy = check_choice("policy", policy, POLICIES)
        self.timeout = check_number("timeout", timeout, above=0, high=1e9)
        self.memory = check_number("memory", memory, above=0, high=1e9)
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ValueError(f"`workers={workers!r}` must be a whole number, 1 or more.")
        if workers is not None and workers > cores_of_rank():
            warnings.warn(
                f"`workers={workers}` is more than the {cores_of_rank()} cores of this rank, which are used.",
                stacklevel=2,
            )
        self.max_workers = workers
        self.counts: Counter[str] = Counter()
        self._reset()

    def _reset(self) -> None:
        """Start from nothing in this process: no workers, no remembered verdicts."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[_Question, _Verdict] = OrderedDict()
        self._workers: list[_Worker] = []
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def workers(self) -> int:
        """Number of workers that it starts."""
        cores = cores_of_rank()  # asked again, because a launcher may set LOCAL_WORLD_SIZE after __init__
        return cores if self.max_workers is None else min(self.max_workers, cores)

    def grade(self, golds: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        """Return a grade for each completion, in order. A gold may be bare, in a box, or after `####`."""
        if len(golds) != len(completions):
            raise ValueError(
                f"There are {len(golds)} golds and {len(completions)} completions; give one gold to each."
            )
        questions = [self._question(bare(gold), text) for gold, text in zip(golds, completions, strict=True)]
        verdicts = self._ask(question for question in questions if question is not None)
        grades = [
            Grade(Outcome.NO_ANSWER) if question is None else _grade(question, verdicts[question])
            for question in questions
        ]
        with self._lock:
            self.counts.update(str(grade.outcome) for grade in grades)
        return grades

    def unreadable(self, golds: Iterable[Any]) -> list[int]:
        """Return the indices of golds that are no answers: sentences, and what math-verify cannot read."""
        indices: dict[_Question, list[int]] = {}
        for index, gold in enumerate(golds):
            indices.setdefault(_Question(bare(gold), None, True), []).append(index)
        integers = {question for question in indices if re.fullmatch(r"-?\d{1,18}", question.gold)}
        verdicts = self._ask(question for question in indices if question not in integers)
        bad = [
            question
            for question, (outcome, _) in verdicts.items()
            if outcome != Outcome.CORRECT or not is_answer(question.gold)
        ]
        return sorted(index for question in bad for index in indices[question])

    def _question(self, gold: str, completion: str) -> _Question | None:
        completion = without_thinking(completion)
        answer = answer_of(completion, self.policy)
        if answer is not None:
            return _Question(gold, answer, True)
        return _Question(gold, completion[-_TAIL:], False) if self.policy == "lenient" and completion.strip() else None

    def _ask(self, questions: Iterable[_Question]) -> dict[_Question, _Verdict]:
        """Return the verdict on each question, remembered or from the workers."""
        if self._process != os.getpid():  # forked: the workers belong to the parent
            self._reset()
        unique = list(dict.fromkeys(questions))
        with self._lock:
            verdicts = {question: self._verdicts[question] for question in unique if question in self._verdicts}
            new = [question for question in unique if question not in verdicts]
            if new and self._threads is None:
                self._start_workers()
        if new:
            assert self._threads is not None
            judged = dict(zip(new, self._threads.map(self._judge, new), strict=True))
            verdicts |= judged
            with self._lock:
                self._verdicts |= judged
                while len(self._verdicts) > _CACHED_VERDICTS:
                    self._verdicts.popitem(last=False)
        return verdicts

    def _start_workers(self) -> None:
        count = self.workers
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="grader")
        self._workers = [_Worker(self.timeout, self.memory) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)

    def _judge(self, question: _Question) -> _Verdict:
        if question.answer is not None and len(question.answer) > LONGEST:
            return "wrong", question.answer[:LONGEST]
        worker = self._idle.get()
        try:
            return worker.ask(json.dumps(question._asdict()))
        finally:
            self._idle.put(worker)

    @property
    def alive(self) -> int:
        """Number of workers that are running now."""
        return sum(worker.running for worker in self._workers)

    def close(self) -> None:
        """End the workers. Grading again starts new ones."""
        if self._process == os.getpid():
            if self._threads is not None:
                self._threads.shutdown()
            for worker in self._workers:
                worker.end()
        self._reset()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _grade(question: _Question, verdict: _Verdict) -> Grade:
    outcome, answer = verdict
    return Grade(Outcome(outcome), question.answer if question.boxed else answer)


def grader_version() -> str:
    """Return the versions of the packages that verdicts depend on, and of our rules."""
    packages = [f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")]
    return ", ".join([*packages, f"rules {_RULES}"])


def cores_of_rank() -> int:
    """Return the number of cores of this process, divided among the ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's share: microseconds in a period, or "max"
        quota, period = _CPU_QUOTA.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class _Worker:
    """One child process, started on the first question. One that ends is replaced at once."""

    def __init__(self, timeout: float, memory: float):
        self.command = [sys.executable, "-P", str(WORKER), str(timeout), str(int(memory * 2**30))]
        self.patience = max(60.0, 20 * timeout)  # seconds by the clock until a silent worker is ended
        self.child: subprocess.Popen[bytes] | None = None
        self.ready = False

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def ask(self, question: str) -> _Verdict:
        """Return the verdict. A worker may end for a reason of its own, so a fresh one is asked a second time."""
        for _ in range(2):
            verdict, status = self._try(question)
            if verdict is not None:
                return verdict
            if status == -signal.SIGPROF:
                return "timeout", None
        return ("timeout" if status is None else "error"), None

    def _try(self, question: str) -> tuple[_Verdict | None, int | None]:
        """Return the verdict, or else the exit status of the child; (None, None) if the child had to be killed."""
        child = self.child or self._start()
        if not self.ready:
            self._wait_until_ready()
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(question.encode() + b"\n")
        line = self._read_line(self.patience)
        if line is not None and line.endswith(b"\n"):
            outcome, answer = json.loads(line)
            return (outcome, answer), None
        status = None if line is None else child.wait()
        self.end()
        self._start()
        return None, status

    def _start(self) -> subprocess.Popen[bytes]:
        self.child = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self.ready = False
        return self.child

    def _wait_until_ready(self) -> None:
        if self._read_line(_START_TIMEOUT) != b"ready\n":
            status = self.end()
            raise ChildProcessError(
                f"A grading worker could not be started (status {status}). To see why: {' '.join(self.command)} < "
                "/dev/null"
            )
        self.ready = True

    def _read_line(self, seconds: float) -> bytes | None:
        """Read a line from the child. Return it without a newline if the child ended, None if it stayed silent."""
        assert self.child is not None and self.child.stdout is not None
        poll = select.poll()
        poll.register(self.child.stdout, select.POLLIN | select.POLLHUP)
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = self.child.stdout.read(65536)
            if not chunk:
                break
            line += chunk
        return line

    def end(self) -> int | None:
        """Kill the child if there is one, and return its exit status."""
        child, self.child = self.child, None
        if child is None:
            return None
        child.kill()
        status = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        return status
