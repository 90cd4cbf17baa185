"""Counts of distinct right answers, the diversity that is lost with entropy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opefo_trl.data.templates import text_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__: list[str] = []  # of use inside this package only

_NormalForm = Callable[[str], str]
RIGHT = 0.5  # the first reward function judges the answer: above this it is right


@dataclass(frozen=True)
class RolloutAnswers:
    """
    Rewards and right answers of a rollout.

    Attributes:
        rewards (`Tensor`): weighted reward of each completion of this rank, (B,); NaN where none was given.
        right (`Tensor`): whether each completion of this rank is right, (B,).
        solved_share (`Tensor`): share of right answers in the group of each completion of this rank, (B,), among those
            that were judged.
        distinct (`float`): mean number of different right completions in a group, over all ranks.
        solved (`float`): share of groups with a right completion, over all ranks.
    """

    rewards: Tensor
    right: Tensor
    solved_share: Tensor
    distinct: float
    solved: float

    @classmethod
    def count(
        cls,
        rewards: Tensor,
        weights: Tensor,
        completions: list,
        generations: int,
        accelerator: Accelerator,
        normal_form: _NormalForm = str.strip,
    ) -> RolloutAnswers:
        """
        Count right answers, in one collective.

        Args:
            rewards (`Tensor`): rewards over all ranks, (completions, functions); the first function judges the answer.
            weights (`Tensor`): weights of the reward functions.
            completions (`list`): completions of this rank.
            generations (`int`): completions in a group.
            normal_form (`Callable`): completions with the same normal form count as one.
        """
        right = rewards[:, 0] > RIGHT
        total = weighted_sum(rewards, weights)
        judged = (~rewards[:, 0].isnan()).view(-1, generations).sum(1).clamp(min=1)
        share = (right.view(-1, generations).sum(1) / judged).repeat_interleave(generations)
        digests = accelerator.gather(digests_of(completions, rewards.device, normal_form))
        begin = accelerator.process_index * len(completions)
        own = slice(begin, begin + len(completions))
        return cls(total[own], right[own], share[own], *distinct_right(digests, right, generations))

    def right_or_better(self, advantages: Tensor) -> Tensor:
        """Return `right`, or where the advantage is above 0 if no completion of any rank is right: the rewards may
        judge no answers."""
        return self.right if self.solved else advantages > 0


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """Return the reward of each completion, of those that the functions gave, (completions,); NaN without any."""
    return (rewards * weights.to(rewards.device)).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)


def normal_form_of(reward_funcs: Sequence[Any]) -> _NormalForm:
    """Return the normal form of answers, which the first reward function may define as its attribute `normal_form`;
    by default only outer white space is ignored."""
    return getattr(reward_funcs[0], "normal_form", str.strip)


def digest(completion: Any, normal_form: _NormalForm = str.strip) -> int:
    """Return a 63-bit hash of a completion (text or messages) in its normal form, equal on every rank."""
    text = normal_form(text_of(completion)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def digests_of(completions: list[Any], device: torch.device, normal_form: _NormalForm = str.strip) -> Tensor:
    """Return the digests as a tensor that ranks can gather, (N,)."""
    digests = [digest(completion, normal_form) for completion in completions]
    return torch.tensor(digests, dtype=torch.int64, device=device)


def distinct_right(digests: Tensor, right: Tensor, generations: int) -> tuple[float, float]:
    """Return the mean number of distinct right completions in a group, and the share of groups that have any, from
    `digests` and `right`, (N,), in which groups of `generations` completions follow each other."""
    names, are_right = digests.view(-1, generations).tolist(), right.view(-1, generations).tolist()
    groups = [set(compress(*group)) for group in zip(names, are_right, strict=True)]
    return sum(map(len, groups)) / len(groups), sum(map(bool, groups)) / len(groups)
