"""Reward functions by name, for `--reward_funcs math format overlong --reward_weights 1 0.1 1`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl.rewards import get_soft_overlong_punishment

from opefo_trl.data.templates import text_of
from opefo_trl.grading import Grader, Outcome
from opefo_trl.grading.answers import boxes_of
from opefo_trl.playground import playground_reward, sentences_reward, words_reward
from opefo_trl.validation import check_choice

Reward = Callable[..., list[float | None]]

_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_UNGRADED = (Outcome.TIMEOUT, Outcome.ERROR)


def _texts(completions: list[Any]) -> list[str]:
    """Return the text of each completion, or of its last message."""
    return [text_of(completion, last_only=True) for completion in completions]


class MathReward:
    """
    Reward of 1 for a right answer, 0 for a wrong answer or none, and None for a completion that could not be graded
    (outcome `timeout` or `error`), because it may be right.

    With `judges` set, `OPEFOTrainer` leaves a completion without this reward out of its group, whatever other rewards
    it has. `GRPOTrainer` does so only if there is no other reward. Shares of the outcomes are logged as `grading/*`.

    Args:
        policy, timeout, workers: of the [`~opefo_trl.grading.Grader`] that it starts on the first call.
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
        grades = self.grader.grade(answer, _texts(completions))
        if log_metric is not None and grades:
            for outcome in Outcome:
                log_metric(f"grading/{outcome}", sum(grade.outcome is outcome for grade in grades) / len(grades))
        if log_extra is not None:
            log_extra("grade", [str(grade.outcome) for grade in grades])
            log_extra("found_answer", [grade.answer for grade in grades])
        return [None if grade.outcome in _UNGRADED else float(grade.correct) for grade in grades]

    def __reduce__(self) -> tuple:  # a copy in another process starts workers of its own
        return MathReward, self.options


math_reward = MathReward()


def format_reward(completions: list[Any], **_: Any) -> list[float | None]:
    r"""Return 1 for each completion with exactly one `\boxed{}` that is closed and not empty, else 0."""
    return [float(len(boxes_of(text)) == len(_OPEN_BOX.findall(text)) == 1) for text in _texts(completions)]


def overlong_reward(max_completion_length: int, margin: float = 0.2) -> Reward:
    """Return DAPO's soft punishment (TRL's function): 0, falling to -1 over the last `margin` of the length."""
    return get_soft_overlong_punishment(max_completion_length, max(1, round(margin * max_completion_length)))


REWARDS: dict[str, Callable[[int], Reward]] = {  # name -> reward function, given `max_completion_length`
    "math": lambda _: math_reward,
    "math_answer_line": lambda _: MathReward("answer_line"),
    "format": lambda _: format_reward,
    "overlong": overlong_reward,
    "playground": lambda _: playground_reward,
    "words": lambda _: words_reward,
    "sentences": lambda _: sentences_reward,
}


def find_reward(name: str, max_completion_length: int) -> Reward:
    """Return a reward function by its name in `REWARDS`, or by the dotted path of a user's own: `my_rewards.exact`."""
    if name in REWARDS:
        return REWARDS[name](max_completion_length)
    module, _, attribute = name.rpartition(".")
    if not module:
        check_choice(
            "reward_funcs", name, REWARDS, otherwise=", or a dotted path: my_rewards.exact is `exact` in my_rewards.py"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing the user's module may raise anything
        raise ValueError(
            f"The reward function {name!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if not callable(function):
        raise ValueError(f"The reward function {name!r} is not a function, but {function!r}.")
    return function
