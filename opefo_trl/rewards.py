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
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def math_reward(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    r"""1 if the completion's last `\boxed{}` (or, without one, its last expression) equals `answer`, else 0.

    `answer` is a bare answer, one in `\boxed{}` in a solution, or one behind `####`. None, which TRL leaves out of the
    group, where the answer itself cannot be read.
    """
    from math_verify import parse, verify

    rewards: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        expected = parse(_bare(str(gold)))
        rewards.append(float(verify(expected, parse(text_of(completion)))) if expected else None)
    return rewards


def _bare(gold: str) -> str:
    """What math-verify reads without guessing: the answer in a box."""
    gold = gold.rsplit("####", 1)[-1].strip()
    return gold if _BOXED.search(gold) else f"\\boxed{{{gold.strip('$')}}}"


def format_reward(completions: list[Any], **_: Any) -> list[float | None]:
    r"""1 if the completion gives its answer in one closed, non-empty `\boxed{}`, else 0."""
    return [float(_boxes(text_of(completion)) == 1) for completion in completions]


def _boxes(text: str) -> int:
    """Closed, non-empty boxes in a text; a box that is left open spoils them all."""
    count = 0
    for match in _BOXED.finditer(text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth or not text[match.end() : end - 1].strip():
            return 0
        count += 1
    return count


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
            f"The reward function {name!r} is unknown. Choose of {', '.join(REWARDS)}, or give a dotted path: "
            "my_rewards.exact, for `exact` in my_rewards.py."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The reward function {name!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"The reward function {name!r} is not a function, but {found!r}.")
    return found
