"""Means and selections over the tokens of a micro-batch that train, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens where `mask` is 1; 0 of none."""
    return torch.where(mask.bool(), values, 0).sum() / mask.sum().clamp(min=1)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation over the tokens where `mask` is 1."""
    return mean((values - mean(values, mask)).square(), mask).sqrt()


def covariance(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(A - mean A)(log p - mean log p) of each token, means over the micro-batch, (B, T)."""
    advantages = advantages.expand_as(logps)
    return (advantages - mean(advantages, mask)) * (logps - mean(logps, mask))


def largest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` largest values among those allowed, or all of these if they are fewer; a boolean (B, T)."""
    order = values.masked_fill(~among, -torch.inf).flatten().argsort(descending=True, stable=True)
    place = order.argsort().view_as(values)  # of equal values, as in identical completions, the first ones
    return among & (place < count)


def at_random(among: Tensor, count: Tensor) -> Tensor:
    """`count` of those allowed, drawn without preference."""
    return largest(torch.rand(among.shape, device=among.device), among, count)


def share_of(mask: Tensor, share: float) -> Tensor:
    """A share of the tokens that train, rounded down, but one at least."""
    return (mask.sum() * share).floor().clamp(min=1)
