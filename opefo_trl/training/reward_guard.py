"""Checks of rewards: `watch_reward` wraps each reward function, so that an error names it, and `RewardGuard` looks for
NaN and infinity in the rewards of all ranks once they are gathered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opefo_trl.training.guards import NonFiniteError
from opefo_trl.trl_compat import is_async_callable

_SHOWN = 3  # bad rewards in a message
_ATTRIBUTES = ("judges", "normal_form")  # of reward functions, that this package reads


def watch_rewards(functions: list[Any], names: list[str]) -> list[Any]:
    """Wrap all that are not models, see `watch_reward`."""
    return [
        function if isinstance(function, nn.Module) else watch_reward(function, name, is_async_callable(function))
        for function, name in zip(functions, names, strict=True)
    ]


def watch_reward(function: Callable, name: str, is_async: bool) -> Callable:
    """
    Wrap a reward function so that an error names it.

    NaN is passed on as `inf`, since TRL takes NaN for "no reward": this way every rank sees the fault among the
    gathered rewards. An exception is raised again with the function's name.
    """

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"The reward function {name!r} raised {type(error).__name__}: {error}") from error

    if is_async:

        @functools.wraps(function)
        async def watched(**kwargs: Any) -> Any:
            with named():
                rewards = await function(**kwargs)
            return _checked(rewards, name, kwargs.get("completions"))

        return _like(function, watched)

    @functools.wraps(function)
    def watched_sync(**kwargs: Any) -> Any:
        with named():
            rewards = function(**kwargs)
        return _checked(rewards, name, kwargs.get("completions"))

    return _like(function, watched_sync)


def _like(function: Callable, watched: Callable) -> Callable:
    """Copy our attributes: `functools.wraps` leaves out those of a class, such as `MathReward.judges`, and those of
    what a `functools.partial` calls."""
    while isinstance(function, functools.partial) and not any(hasattr(function, name) for name in _ATTRIBUTES):
        function = function.func
    for attribute in _ATTRIBUTES:
        if hasattr(function, attribute):
            setattr(watched, attribute, getattr(function, attribute))
    return watched


def _checked(rewards: Any, name: str, completions: Sequence[Any] | None) -> list:
    """Return rewards as a list of numbers and None; `completions` is None where an environment gives the rewards."""
    if isinstance(rewards, str | Mapping) or not isinstance(rewards, Iterable):
        count = "" if completions is None else f", here {len(completions)}"
        raise TypeError(
            f"The reward function {name!r} returned {rewards!r}; return a list with one reward per completion{count}."
        )
    rewards = list(rewards)
    if completions is not None and len(rewards) != len(completions):
        return rewards  # TRL's own error names the function and both lengths
    return [_checked_reward(reward, name, index) for index, reward in enumerate(rewards)]


def _checked_reward(reward: Any, name: str, index: int) -> Any:
    if reward is None:
        return None
    try:
        value = float("not a number" if isinstance(reward, str) else reward)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The reward function {name!r} returned {reward!r} ({type(reward).__name__}) for completion {index}; a "
            "reward is a number, or None for a completion that it does not judge."
        ) from error
    return math.inf if math.isnan(value) else reward


@dataclass
class RewardGuard:
    """
    Checks the rewards of every rollout, over all ranks.

    Args:
        policy (`str`): `"stop"` or `"skip"`, as `OPEFOConfig.nonfinite`.
        names (`list[str]`): names of the reward functions.
        models (`list[bool]`): whether each of them is a reward model.
        judges (`list[int]`): columns of the functions whose None makes the whole completion unjudged.
    """

    policy: str
    names: list[str]
    models: list[bool]
    judges: list[int]
    rollout_is_bad: bool = False
    step_is_bad: bool = False  # the optimizer step under way has a micro-batch of a bad rollout

    @classmethod
    def watch(cls, policy: str, functions: Sequence[Any], names: Sequence[str]) -> RewardGuard:
        """Make a guard for a trainer's reward functions."""
        return cls(
            policy,
            [name or type(function).__name__ for name, function in zip(names, functions, strict=True)],
            [isinstance(function, nn.Module) for function in functions],
            [column for column, function in enumerate(functions) if getattr(function, "judges", False)],
        )

    def check(
        self, rewards: Tensor, completions: list, rank: int, step: int, training: bool
    ) -> tuple[Tensor, str | None]:
        """Return rewards, (completions of all ranks, functions), with NaN for those that count as no reward, and a
        warning, if any. In training, raise `NonFiniteError` on bad rewards if `policy="stop"`."""
        warning = None
        # A reward model has no None that its NaN could stand for.
        bad = rewards.isinf() | (rewards.isnan() & torch.tensor(self.models, dtype=torch.bool, device=rewards.device))
        any_bad = bool(bad.any())
        if training:
            self.rollout_is_bad = any_bad
        if any_bad:
            warning = self._judge(self._describe(bad, completions, rank), step, training)
            rewards = rewards.masked_fill(bad, torch.nan)
        if self.judges:  # TRL adds up the other rewards: without its verdict the completion would count as wrong
            unjudged = rewards[:, self.judges].isnan().any(1, keepdim=True)
            rewards = rewards.masked_fill(unjudged, torch.nan)
        return rewards, warning

    def _describe(self, bad: Tensor, completions: list, rank: int) -> str:
        faults = []
        for row, column in bad.nonzero().tolist():
            of_rank, index = divmod(row, len(completions))
            where = f"for completion {index} of rank {of_rank}"
            fault = f"reward function {self.names[column]!r} returned NaN or infinity {where}"
            faults.append(f"{fault}: {completions[index]!r}" if of_rank == rank else fault)
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        return "; ".join(faults[:_SHOWN] + more)

    def _judge(self, faults: str, step: int, training: bool) -> str:
        if not training:
            return f"Evaluation after step {step}: {faults}. They count as no reward."
        if self.policy == "stop":
            raise NonFiniteError(
                f"Step {step + 1}: {faults}. No parameter was updated. Return None for a completion that cannot be "
                "judged, or set `nonfinite='skip'` to leave such steps out (not under DeepSpeed)."
            )
        return f"Step {step + 1}: {faults}. The steps of this rollout are skipped."
