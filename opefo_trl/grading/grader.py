r"""Is this completion right? math-verify, in child processes that can be ended.

    with Grader() as grader:
        grades = grader.grade(["1/2", "7"], [r"... \boxed{0.5}", "I do not know"])
    [grade.outcome for grade in grades]  # correct, no_answer

A grade is one of five outcomes, each counted in `grader.counts`:

    correct, wrong   math-verify compared the answer with the gold
    no_answer        the extraction policy found none
    timeout          comparing took more than `timeout` seconds of processor time
    error            comparing failed: math-verify raised, or ran out of memory

What counts as the answer is the `policy`. No policy guesses: where it finds several, the last one counts.

    boxed         what stands in the last closed, non-empty \boxed{} or \fbox{}. For training
    answer_line   what stands behind the last "Answer:" that begins a line, as DAPO's prompt asks
    lenient       the last box; without one what math-verify finds in the last 2,000 characters: a final answer that is
                  announced, a formula, or the last number. For evaluation

The deadline is processor time, held by the kernel, so that verdicts do not depend on what else the machine does: an
answer that gets no processor waits. The child is `worker.py`, started as a program of its own. A pool that
forks would copy a process with threads and CUDA in it; one that spawns would run a user's unguarded script again.
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

from opefo_trl.validation import check_choice

WORKER = Path(__file__).with_name("worker.py")
TAIL = 2_000  # characters that the lenient policy looks at
LONGEST = 10_000  # characters; a longer answer equals no gold
REMEMBERED = 100_000  # verdicts
START = 300.0  # seconds for a worker to start, on a machine with much else to do
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}")
_VISIBLE = re.compile(r"\S")
_ANSWER_LINE = re.compile(r"^[ \t*#>]*answer[ \t*]*:[ \t*]*(\S[^\n]*)$", re.IGNORECASE | re.MULTILINE)


class Outcome(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"


class Grade(NamedTuple):
    outcome: Outcome
    answer: str | None = None  # as it stands in the completion

    @property
    def correct(self) -> bool:
        return self.outcome is Outcome.CORRECT


def boxes_of(text: str) -> list[str]:
    r"""What stands in the closed, non-empty boxes of a text, in order; not those within another. `\{` is no brace."""
    open_braces: list[int | None] = []  # of a box where its inside begins
    boxes: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and _VISIBLE.search(text, start, token.start()):
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, token.start()))
        elif word == "{":
            open_braces.append(None)
        elif len(word) > 2:
            open_braces.append(token.end())
    return [text[start:end] for start, end in boxes]


POLICIES = ("boxed", "answer_line", "lenient")


def answer_of(completion: str, policy: str) -> str | None:
    """The answer that a policy sees; of `lenient` only the boxed one, the rest is math-verify's to find."""
    if policy == "answer_line":
        lines = _ANSWER_LINE.findall(completion)
        return lines[-1].strip().removesuffix("**").strip() if lines else None
    boxes = boxes_of(completion)
    return boxes[-1].strip() if boxes else None


def bare(gold: Any) -> str:
    """A gold answer by itself: out of its box, or from behind GSM8K's ####, without dollars around it."""
    if isinstance(gold, list | tuple):
        return ", ".join(bare(one) for one in gold)
    text = "" if gold is None or gold != gold else str(gold).rsplit("####", 1)[-1].strip()
    boxes = boxes_of(text)
    text = boxes[-1].strip() if boxes else text
    inner = text.strip("$")
    return inner.strip() if text.startswith("$") and text.endswith("$") and "$" not in inner else text


def is_answer(gold: str) -> bool:
    """Not a sentence, and with braces that match: math-verify finds something to read in nearly everything."""
    braces = 0
    for token in _TOKEN.findall(gold):
        braces += -1 if token == "}" else token.endswith("{") and token != r"\{"
        if braces < 0:
            return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", _TEXT.sub(" ", gold))
    return braces == 0 and len(words) < (20 if "=" in gold else 3)


class Grader:
    """
    Grades in `workers` child processes, which it starts when it is first needed. Threads may share one, and a process
    that is forked from its owner starts workers of its own.

    Args:
        workers (`int`, *optional*): child processes; at most, and by default, the cores of this rank.
        timeout (`float`): seconds of processor time for an answer.
        policy (`str`): what counts as the answer: `boxed`, `answer_line` or `lenient`.
        memory (`float`): GiB of address space for a worker.
    """

    def __init__(
        self, workers: int | None = None, timeout: float = 5.0, policy: str = "boxed", memory: float = 4.0
    ) -> None:
        check_choice("policy", policy, POLICIES)
        for name, value in (("timeout", timeout), ("memory", memory)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"`{name}={value!r}` must be a number above 0.")
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ValueError(f"`workers={workers!r}` must be a whole number, 1 or more.")
        if workers is not None and workers > cores_of_rank():
            warnings.warn(
                f"`workers={workers}`: this rank has {cores_of_rank()} cores, and uses no more.", stacklevel=2
            )
        self.most, self.timeout, self.policy, self.memory = workers, timeout, policy, memory
        self.counts: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        """Nothing started yet, in this process."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple, tuple[str, str | None]] = OrderedDict()
        self._started: list[Worker] = []
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def workers(self) -> int:
        """As many as it starts."""
        cores = cores_of_rank()  # which a launcher may tell only later
        return cores if self.most is None else min(self.most, cores)

    def grade(self, golds: Sequence[Any], completions: Sequence[str]) -> list[Grade]:
        """A grade for each completion, in their order. A gold may be bare, in a box, or behind `####`."""
        if len(golds) != len(completions):
            raise ValueError(f"There are {len(golds)} golds and {len(completions)} completions: give one to each.")
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
        """Which golds are no answer, by their place: math-verify cannot read them, or they are sentences."""
        places: dict[tuple, list[int]] = {}
        for place, gold in enumerate(golds):
            places.setdefault((bare(gold), None, True), []).append(place)
        plain = {question for question in places if re.fullmatch(r"-?\d{1,18}", question[0])}
        verdicts = self._ask(question for question in places if question not in plain)
        bad = [key for key, verdict in verdicts.items() if verdict[0] != "correct" or not is_answer(key[0])]
        return sorted(place for key in bad for place in places[key])

    def _question(self, gold: str, completion: str) -> tuple | None:
        answer = answer_of(completion, self.policy)
        if answer is not None:
            return gold, answer, True
        return (gold, completion[-TAIL:], False) if self.policy == "lenient" and completion.strip() else None

    def _ask(self, questions: Iterable[tuple]) -> dict[tuple, tuple[str, str | None]]:
        if self._process != os.getpid():  # forked: the workers belong to the parent
            self._begin()
        asked = list(dict.fromkeys(questions))
        with self._lock:
            known = {question: self._known[question] for question in asked if question in self._known}
            new = [question for question in asked if question not in known]
            if new and self._threads is None:
                count = self.workers
                self._threads = ThreadPoolExecutor(count, thread_name_prefix="grader")
                self._started = [Worker(self.timeout, self.memory) for _ in range(count)]
                for worker in self._started:
                    self._idle.put(worker)
        if new:
            assert self._threads is not None
            found = dict(zip(new, self._threads.map(self._judge, new), strict=True))
            known |= found
            with self._lock:
                self._known |= found
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return known

    def _judge(self, question: tuple) -> tuple[str, str | None]:
        gold, answer, boxed = question
        if answer is not None and len(answer) > LONGEST:
            return "wrong", answer[:LONGEST]
        worker = self._idle.get()
        try:
            return worker.ask(json.dumps({"gold": gold, "answer": answer, "boxed": boxed}))
        finally:
            self._idle.put(worker)

    @property
    def alive(self) -> int:
        """Workers that run now. They start when there is something for them to do."""
        return sum(worker.runs for worker in self._started)

    def close(self) -> None:
        """End the workers. Grading again starts new ones."""
        if self._process == os.getpid():
            if self._threads is not None:
                self._threads.shutdown()
            for worker in self._started:
                worker.end()
        self._begin()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _grade(question: tuple, verdict: tuple[str, str | None]) -> Grade:
    outcome, answer = verdict
    return Grade(Outcome(outcome), question[1] if question[2] else answer)


def grader_version() -> str:
    """What verdicts depend on."""
    return ", ".join(f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy"))


def cores_of_rank() -> int:
    """Cores that this process may use, shared among the ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Worker:
    """One child process, started when it is first asked; one that ends is replaced at once."""

    def __init__(self, timeout: float, memory: float):
        self.command = [sys.executable, "-P", str(WORKER), str(timeout), str(int(memory * 2**30))]
        self.patience = max(60.0, 20 * timeout)  # seconds by the clock, before a worker that does nothing is given up
        self.child: subprocess.Popen[bytes] | None = None
        self.ready = False

    def _start(self) -> subprocess.Popen[bytes]:
        self.child = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        self.ready = False
        return self.child

    def _wait_until_ready(self) -> None:
        if self._line(START) != b"ready\n":
            status = self.end()
            raise RuntimeError(
                f"A grading worker could not be started (status {status}). To see why: {' '.join(self.command)} < "
                "/dev/null"
            )
        self.ready = True

    @property
    def runs(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def ask(self, question: str) -> tuple[str, str | None]:
        """The verdict. A worker may end for a reason that is not the answer's: then a fresh one is asked once more."""
        for _ in range(2):
            verdict, status = self._try(question)
            if verdict is not None:
                return verdict
            if status == -signal.SIGPROF:
                return "timeout", None
        return ("timeout" if status is None else "error"), None

    def _try(self, question: str) -> tuple[tuple[str, str | None] | None, int | None]:
        """The verdict, or the status that the child ended with; neither where it had to be ended."""
        child = self.child or self._start()
        if not self.ready:
            self._wait_until_ready()
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(question.encode() + b"\n")
        line = self._line(self.patience)
        if line is not None and line.endswith(b"\n"):
            outcome, answer = json.loads(line)
            return (outcome, answer), None
        status = None if line is None else child.wait()
        self.end()
        self._start()
        return None, status

    def _line(self, seconds: float) -> bytes | None:
        """A line of the child; without its end where the child ended, None where it said nothing for so long."""
        assert self.child is not None and self.child.stdout is not None
        poll = select.poll()
        poll.register(self.child.stdout, select.POLLIN | select.POLLHUP)
        line, until = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                return None
            part = self.child.stdout.read(65536)
            if not part:
                break
            line += part
        return line

    def end(self) -> int | None:
        """The status that it ended with."""
        child, self.child = self.child, None
        if child is None:
            return None
        child.kill()
        status = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        return status
