"""Reward functions by name: what `--reward_funcs math format overlong --reward_weights 1 0.1 1` means."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl.rewards import get_soft_overlong_punishment

from opefo_trl.grading.grader import Grader, Outcome, boxes_of
from opefo_trl.playground import playground_reward
from opefo_trl.validation import check_choice

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def text_of(completion: Any) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""


class MathReward:
    """
    1 for a right answer, 0 for a wrong one or none, and None for one that could not be graded (`timeout`, `error`):
    that is not known to be wrong. `OPEFOTrainer` leaves such a completion out of its group, whatever other rewards it
    has (`judges`); `GRPOTrainer` does if this is the only one. Shares of outcomes are logged as `grading/*`.

    Args:
        policy, timeout, workers: of the [`~opefo_trl.grading.grader.Grader`] that it starts when it is first called.
    """

    judges = True

    def __init__(self, policy: str = "boxed", timeout: float = 5.0, workers: int | None = None):
        self.__name__ = "math_reward" if policy == "boxed" else f"math_{policy}_reward"
        self.options = policy, timeout, workers
        self.grader = Grader(workers, timeout, policy)

    def __call__(
        self,
        completions: list[Any],
        answer: list[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        grades = self.grader.grade(answer, [text_of(completion) for completion in completions])
        if log_metric is not None and grades:
            for outcome in Outcome:
                log_metric(f"grading/{outcome}", sum(grade.outcome is outcome for grade in grades) / len(grades))
        if log_extra is not None:
            log_extra("grade", [str(grade.outcome) for grade in grades])
            log_extra("found_answer", [grade.answer for grade in grades])
        return [None if grade.outcome in UNGRADED else float(grade.correct) for grade in grades]

    def __reduce__(self) -> tuple:  # a copy in another process has workers of its own
        return MathReward, self.options


UNGRADED = (Outcome.TIMEOUT, Outcome.ERROR)
math_reward = MathReward()


def format_reward(completions: list[Any], **_: Any) -> list[float | None]:
    r"""1 if the completion gives its answer in one closed, non-empty `\boxed{}`, else 0."""
    texts = [text_of(completion) for completion in completions]
    return [float(len(boxes_of(text)) == len(_BOX.findall(text)) == 1) for text in texts]


def overlong_reward(max_completion_length: int, margin: float = 0.2) -> Callable[..., list[float | None]]:
    """DAPO's soft punishment (TRL's function): 0, falling to -1 over the last `margin` of the length allowed."""
    return get_soft_overlong_punishment(max_completion_length, max(1, round(margin * max_completion_length)))


Reward = Callable[..., list[float | None]]
# Of what a run is told: the length that completions may have
REWARDS: dict[str, Callable[[int], Reward]] = {
    "math": lambda _: math_reward,
    "math_answer_line": lambda _: MathReward("answer_line"),
    "format": lambda _: format_reward,
    "overlong": overlong_reward,
    "playground": lambda _: playground_reward,
}


def find_reward(name: str, max_completion_length: int) -> Reward:
    """A reward function by its name here, or by the dotted path of one's own: `my_rewards.exact`."""
    if name in REWARDS:
        return REWARDS[name](max_completion_length)
    module, _, function = name.rpartition(".")
    if not module:
        check_choice(
            "reward_funcs", name, REWARDS, otherwise=", or a dotted path: my_rewards.exact is `exact` in my_rewards.py"
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
