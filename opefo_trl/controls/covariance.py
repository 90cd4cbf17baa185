"""Tokens whose advantage and log-probability move together, the few that entropy collapses by (arXiv 2505.22617).

    Cov_t = (A_t - mean A) (log p_t - mean log p)

with means over the micro-batch, as the authors' code takes them, so that a smaller micro-batch selects otherwise.
`clip_cov` and `kl_cov` follow that code, read directly; the formula of `covariance_kernel` is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import number
from opefo_trl.controls.statistics import at_random, covariance, largest, mean, share_of, spread


class ClipCov(Control):
    """
    Take a few tokens of high covariance out of the loss, drawn at random among those between the bounds.

    Acts strictly on-policy. Tokens that TRL's loss clips already are not drawn.

    Args:
        ratio (`float`): of the tokens that train, at least one. The authors' default, 0.0002; their 7B runs, too.
        low, high (`float`): bounds on the covariance. The authors' defaults, 1 and 5.
        epsilon, epsilon_high: the run's clip range, by which a token counts as clipped already.
    """

    def __init__(
        self,
        *,
        ratio: float = 2e-4,
        low: float = 1.0,
        high: float = 5.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
    ):
        self.ratio = number("ratio", ratio, 0, 1)
        self.low, self.high = number("low", low), number("high", high)
        if self.low >= self.high:
            raise ValueError(f"`low={low!r}` in `control_kwargs` must be below `high={high!r}`.")
        self.clip_low, self.clip_high = epsilon, epsilon if epsilon_high is None else epsilon_high

    def advantages(self, tokens: Tokens) -> Tensor:
        cov = covariance(tokens.logps.detach(), tokens.advantages, tokens.mask)
        lowered = (tokens.ratio < 1 - self.clip_low) & (tokens.advantages < 0)
        raised = (tokens.ratio > 1 + self.clip_high) & (tokens.advantages > 0)
        eligible = (cov > self.low) & (cov < self.high) & tokens.mask.bool() & ~lowered & ~raised
        drawn = at_random(eligible, share_of(tokens.mask, self.ratio))
        return tokens.advantages.expand_as(cov).masked_fill(drawn, 0)


class KLCov(Control):
    """
    Hold the tokens of highest covariance at the policy that sampled: a term |log p - log p_old|, and no clipping.

    Strictly on-policy both are equal and the term has no gradient: it needs several updates per rollout.

    Args:
        ratio (`float`): of the tokens that train, at least one. Default of verl, 0.0002; the authors' 7B runs 0.002.
        coef (`float`): of the term. The authors' default, 1.
        noise (`float`): what is taken for rounding, whose gradient would have full size and a random sign. Ours; 0 is
            the authors'.
    """

    acts_on_policy = False
    clips = False  # it switches clipping off, where there is any

    def __init__(self, *, ratio: float = 2e-4, coef: float = 1.0, noise: float = 1e-4):
        self.ratio, self.coef = number("ratio", ratio, 0, 1), number("coef", coef, 0)
        self.noise = number("noise", noise, 0)

    def clip_range(self, tokens: Tokens) -> tuple[float, float]:
        return 1.0, torch.inf

    def penalty(self, tokens: Tokens) -> Tensor:
        cov = covariance(tokens.logps.detach(), tokens.advantages, tokens.mask)
        held = largest(cov, tokens.mask.bool(), share_of(tokens.mask, self.ratio))
        distance = (tokens.logps - tokens.old_logps).abs()
        return self.coef * torch.where(held & (distance > self.noise), distance, 0)


class CovarianceKernel(Control):
    """
    Weigh tokens down the further their covariance is from the mean: exp(-z^2 / 2 width^2), z in standard deviations.

    A smooth form of `clip_cov`, on both tails; ours. Acts strictly on-policy.

    Args:
        width (`float`): standard deviations at which the weight is 0.61. Ours, not tuned on anything but the
            playground.
    """

    def __init__(self, *, width: float = 2.0):
        self.width = number("width", width, above=0)

    def advantages(self, tokens: Tokens) -> Tensor:
        cov = covariance(tokens.logps.detach(), tokens.advantages, tokens.mask)
        z = (cov - mean(cov, tokens.mask)) / spread(cov, tokens.mask).clamp(min=1e-8)
        return tokens.advantages * (-0.5 * (z / self.width).square()).exp()
