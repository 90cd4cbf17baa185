r"""The child process of `opefo_trl.grading.grader`: reads questions as lines of JSON, answers each with a line.

It is run as a file, so that it imports math-verify and nothing of the training. `ITIMER_PROF` counts the processor
time of this process, and SIGPROF ends it by default: in Python code or in the middle of a large power alike, and
however busy the machine is. The parent sees an ended child, and starts another.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

LATEX, ANYTHING = (LatexExtractionConfig(),), (LatexExtractionConfig(), ExprExtractionConfig())
OUT_OF_MEMORY = 3  # exit status


@functools.lru_cache(maxsize=4096)
def read_gold(gold: str) -> list[Any]:
    return read(gold, boxed=True)


def read(answer: str, boxed: bool) -> list[Any]:
    """What math-verify makes of it: an expression, the text it stands in, or nothing."""
    text = f"\\boxed{{{answer}}}" if boxed else answer
    try:
        return parse(text, LATEX if boxed else ANYTHING, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return []


def same(gold: list[Any], answer: list[Any]) -> bool | None:
    """Whether they are equal; None where comparing them fails."""
    try:
        return verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # of one of several readings; another may be equal
        return verify(gold, answer, timeout_seconds=None) or None


def judge(gold: str, answer: str, boxed: bool) -> tuple[str, str | None]:
    found = read(answer, boxed)
    text = answer if boxed else next((part for part in reversed(found) if isinstance(part, str)), None)
    if not found and not boxed:
        return "no_answer", None
    expected = read_gold(gold)
    if not expected:
        return "error", text
    return {True: "correct", False: "wrong", None: "error"}[same(expected, found)], text


def answer_to(question: dict[str, Any]) -> tuple[str, str | None]:
    if question["answer"] is None:  # is this gold readable?
        return ("correct" if read_gold(question["gold"]) else "error"), None
    return judge(question["gold"], question["answer"], question["boxed"])


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not reach the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this loop
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    judge("1", r"\frac{1}{2}", boxed=True)  # the first reading builds math-verify's tables
    with contextlib.suppress(ValueError, OSError):  # systems without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", file=lines, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = answer_to(json.loads(line))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=lines, flush=True)


if __name__ == "__main__":
    main()
