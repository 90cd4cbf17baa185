r"""Child process of `opefo_trl.grading.grader`: reads questions as lines of JSON and answers each with a line of JSON.

It is run as a file, so it imports math-verify and nothing of the training. `ITIMER_PROF` counts the processor time of
this process and sends SIGPROF, whose default is to end the process, even in the middle of a large power. The parent
notices that the child has ended and starts another.
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

_LATEX, _ANYTHING = (LatexExtractionConfig(),), (LatexExtractionConfig(), ExprExtractionConfig())
_OUT_OF_MEMORY = 3  # exit status


def read(answer: str, boxed: bool) -> list[Any]:
    """Parse an answer. Return math-verify's expression and the text it was found in, or an empty list."""
    text = f"\\boxed{{{answer}}}" if boxed else answer
    try:
        return parse(text, _LATEX if boxed else _ANYTHING, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return []


@functools.lru_cache(maxsize=4096)
def _read_gold(gold: str) -> list[Any]:
    return read(gold, boxed=True)


def same(gold: list[Any], answer: list[Any]) -> bool | None:
    """Return whether two parsed answers are equal, or None if comparing them fails."""
    try:
        return verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # one of several readings failed; another one may be equal
        return verify(gold, answer, timeout_seconds=None) or None


def judge(gold: str, answer: str, boxed: bool) -> tuple[str, str | None]:
    """Return the outcome, and the text of the answer."""
    parsed = read(answer, boxed)
    text = answer if boxed else next((part for part in reversed(parsed) if isinstance(part, str)), None)
    if not parsed and not boxed:
        return "no_answer", None
    parsed_gold = _read_gold(gold)
    if not parsed_gold:
        return "error", text
    return {True: "correct", False: "wrong", None: "error"}[same(parsed_gold, parsed)], text


def _answer_to(question: dict[str, Any]) -> tuple[str, str | None]:
    if question["answer"] is None:  # the question is whether the gold can be read
        return ("correct" if _read_gold(question["gold"]) else "error"), None
    return judge(question["gold"], question["answer"], question["boxed"])


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever math-verify prints must not reach the parent
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent; the loop below ends with the parent's pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    judge("1", r"\frac{1}{2}", boxed=True)  # the first parse builds math-verify's tables
    with contextlib.suppress(ValueError, OSError):  # systems without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = _answer_to(json.loads(line))
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
