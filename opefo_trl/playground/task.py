"""The playground's task: write an expression equal to N. Its many right answers make diversity countable.

    Make 24   ->   3*8    (7-1)*4    30-6    48/2    ...

An answer is right if it is an arithmetic expression of at least two positive integers whose value is exactly N.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from opefo_trl.playground.embedded import EmbeddedTask, judge

__all__: list[str] = []

TARGETS = range(10, 100)
# Targets of the test split, never trained on: 36 of the 90, since runs differ in which few questions they fail, and a
# mean over half as many followed that more than the method. They end in 0, 2, 5 and 7, odd and even in every decade.
# The other 54 still fill a rollout of 32 questions.
HELD_OUT = sorted([*TARGETS[::5], *TARGETS[2::5]])
MAX_ANSWER = 11  # characters; with its end token an answer fits in 12 tokens

_TOKEN = re.compile(r"[1-9][0-9]*|[-+*/()]")


def question(target: int) -> str:
    return f"Make {target}"


def value(answer: str) -> Fraction | None:
    """Return the value of an expression of at least two positive integers, or None if `answer` is anything else."""
    tokens = _TOKEN.findall(answer)
    if "".join(tokens) != answer or sum(token.isdigit() for token in tokens) < 2 or len(tokens) > 100:
        return None
    rest = iter([*tokens, "end"])
    try:
        result, following = _sum(next(rest), rest)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return result if following == "end" else None


def _sum(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    total, token = _product(token, rest)
    while token in ("+", "-"):
        term, following = _product(next(rest), rest)
        total, token = (total + term if token == "+" else total - term), following
    return total, token


def _product(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    total, token = _atom(token, rest)
    while token in ("*", "/"):
        factor, following = _atom(next(rest), rest)
        total, token = (total * factor if token == "*" else total / factor), following
    return total, token


def _atom(token: str, rest: Iterator[str]) -> tuple[Fraction, str]:
    if token.isdigit():
        return Fraction(int(token)), next(rest)
    if token == "(":
        total, token = _sum(next(rest), rest)
        if token == ")":
            return total, next(rest)
    raise ValueError(token)


def is_right(answer: str, target: int) -> bool:
    return value(answer) == target


def playground_reward(completions: list[Any], target: list[int], **_: Any) -> list[float | None]:
    """Return 1 for an expression equal to `target`, else 0; completions are plain or conversational, as in TRL."""
    return judge(completions, target, is_right)


TASK = EmbeddedTask(
    title="Playground",
    gold="target",
    splits={
        "train": {target: question(target) for target in TARGETS if target not in HELD_OUT},
        "test": {target: question(target) for target in HELD_OUT},
    },
    is_right=lambda answer, target: is_right(answer, int(target)),
    normal_form=str.strip,
    max_new_tokens=MAX_ANSWER + 1,
)


def random_expression(generator: random.Random) -> tuple[str, int]:
    """Return an expression of two to four numbers whose value is one of `TARGETS`, and the value."""
    while True:
        count = generator.choices((2, 3, 4), (5, 4, 1))[0]
        numbers = [str(generator.randint(1, generator.choice((9, 20, 99)))) for _ in range(count)]
        signs = [generator.choice("+-*/+-*") for _ in range(count - 1)] + [""]
        parts = [part for pair in zip(numbers, signs, strict=True) for part in pair]
        if count > 2 and generator.random() < 0.4:
            first = generator.randrange(count - 1)
            parts[2 * first] = "(" + parts[2 * first]
            parts[2 * first + 2] += ")"
        answer = "".join(parts)
        if len(answer) > MAX_ANSWER:
            continue
        result = value(answer)
        if result is not None and result.denominator == 1 and result in TARGETS:
            return answer, int(result)
