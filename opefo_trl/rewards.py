"""Reward functions by name: what `--reward_funcs math format` means."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opefo_trl.playground import playground_reward

_BOXED = re.compile(r"\\boxed\s*\{")


def text_of(completion: Any) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


def math_reward(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    r"""1 if the completion's last `\boxed{}` (without one: what math-verify finds in it) equals `answer`, else 0.

    `answer` is a bare answer, one in `\boxed{}` in a solution, or one behind `####`. None, which TRL leaves out of the
    group, where the answer itself cannot be read.
    """
    from math_verify import parse, verify

    rewards: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        boxes = boxes_of(text_of(completion))
        found = parse(_box(boxes[-1])) if boxes else parse(text_of(completion))
        expected = parse(_bare(str(gold)))
        rewards.append(float(verify(expected, found)) if expected else None)
    return rewards


def _bare(gold: str) -> str:
    """What math-verify reads without guessing: one answer in one box."""
    gold = gold.rsplit("####", 1)[-1].strip()
    boxes = boxes_of(gold)
    return _box(boxes[-1] if boxes else gold.strip("$"))


def _box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def format_reward(completions: list[Any], **_: Any) -> list[float | None]:
    r"""1 if the completion gives its answer in one closed, non-empty `\boxed{}`, else 0."""
    texts = [text_of(completion) for completion in completions]
    return [float(len(boxes_of(text)) == len(_BOXED.findall(text)) == 1) for text in texts]


def boxes_of(text: str) -> list[str]:
    """What stands in the closed, non-empty boxes of a text, in order."""
    found, end = [], 0
    for match in _BOXED.finditer(text):
        if match.start() < end:
            continue  # a box within a box
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth and text[match.end() : end - 1].strip():
            found.append(text[match.end() : end - 1])
    return found


REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "math": math_reward,
    "format": format_reward,
    "playground": playground_reward,
}


def find_reward(name: str) -> Callable[..., list[float | None]]:
    """A reward function by its name here, or by the dotted path of one's own: `my_rewards.exact`."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"The reward function {name!r} is unknown. Choose one of {', '.join(REWARDS)}, or give a dotted path: "
            "my_rewards.exact, for `exact` in my_rewards.py."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"The reward function {name!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"The reward function {name!r} is not a function, but {found!r}.")
    return found
