"""Means and selections over the trained tokens of a micro-batch, without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []  # of use inside this package only


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens where `mask` is 1, or 0 if there are none."""
    return torch.where(mask.bool(), values, 0).sum() / mask.sum().clamp(min=1)


def std(values: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation over the tokens where `mask` is 1."""
    return mean((values - mean(values, mask)).square(), mask).sqrt()


def covariance(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return (A - mean A)(log p - mean log p) of each token, with means over the micro-batch, (B, T)."""
    advantages = advantages.expand_as(logps)
    return (advantages - mean(advantages, mask)) * (logps - mean(logps, mask))


def largest(values: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Return a mask of the `count` largest values among the eligible, or of all eligible if they are fewer, (B, T)."""
    order = values.masked_fill(~eligible, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = order.argsort().view_as(values)  # ties, as between identical completions, go to the first
    return eligible & (rank < count)


def at_random(eligible: Tensor, count: Tensor) -> Tensor:
    """Return a mask of `count` of the eligible tokens, drawn uniformly, (B, T)."""
    return largest(torch.rand(eligible.shape, device=eligible.device), eligible, count)


def token_budget(mask: Tensor, share: float) -> Tensor:
    """Return the number of tokens in a share of the trained ones, rounded down, at least 1."""
    return (mask.sum() * share).floor().clamp(min=1)
