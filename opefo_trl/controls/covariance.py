"""Controls that act on high-covariance tokens, which drive entropy collapse.

"The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (arXiv 2505.22617):

    Cov_t = (A_t - mean A) (log p_t - mean log p)

Means are over the micro-batch, as in the authors' code, so a smaller micro-batch selects other tokens. `clip_cov` and
`kl_cov` are verified against that code; `covariance_kernel` is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import number
from opefo_trl.controls.statistics import at_random, covariance, largest, mean, std, token_budget

__all__: list[str] = []  # of use inside this package only


class ClipCov(Control):
    """
    Zero the advantage of a few random tokens whose covariance lies within the bounds (the denominator is unchanged).

    Has an effect strictly on-policy.

    Args:
        ratio (`float`): share of the trained tokens to draw, at least one token. The authors' default, 0.0002, also
            used in their 7B runs.
        low, high (`float`): bounds on the covariance. The authors' defaults, 1 and 5.
        epsilon, epsilon_high: the run's clip range, used to skip tokens that PPO clipping already removes.
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
        clipped_low = (tokens.ratio < 1 - self.clip_low) & (tokens.advantages < 0)
        clipped_high = (tokens.ratio > 1 + self.clip_high) & (tokens.advantages > 0)
        eligible = (cov > self.low) & (cov < self.high) & tokens.mask.bool() & ~clipped_low & ~clipped_high
        drawn = at_random(eligible, token_budget(tokens.mask, self.ratio))
        return tokens.advantages.expand_as(cov).masked_fill(drawn, 0)


class KLCov(Control):
    """
    Add coef * |log p - log p_old| on the tokens of highest covariance, and disable ratio clipping for all tokens.

    In strictly on-policy runs both log-probabilities are equal and the term has no gradient: it needs several updates
    per rollout.

    Args:
        ratio (`float`): share of the trained tokens, at least one token. verl's default, 0.0002; the authors' 7B runs
            use 0.002.
        coef (`float`): weight of the term. The authors' default, 1.
        noise (`float`): |log p - log p_old| at or below this is treated as rounding and ignored; it would otherwise
            get a full-size gradient of random sign. Our choice, 0.0001; the authors' code has no such threshold.
    """

    acts_on_policy = False
    unclipped = True
    uses_clip_range = False  # it only switches clipping off, so a loss without a clip range suits it as well
    source = "the threshold `noise` is our choice; 0 gives the authors' formula"

    def __init__(self, *, ratio: float = 2e-4, coef: float = 1.0, noise: float = 1e-4):
        self.ratio, self.coef = number("ratio", ratio, 0, 1), number("coef", coef, 0)
        self.noise = number("noise", noise, 0)

    def clip_range(self, tokens: Tokens) -> tuple[float, float]:
        return 1.0, torch.inf

    def penalty(self, tokens: Tokens) -> Tensor:
        cov = covariance(tokens.logps.detach(), tokens.advantages, tokens.mask)
        penalised = largest(cov, tokens.mask.bool(), token_budget(tokens.mask, self.ratio))
        distance = (tokens.logps - tokens.old_logps).abs()
        return self.coef * torch.where(penalised & (distance > self.noise), distance, 0)


class CovarianceKernel(Control):
    """
    Weight tokens by exp(-z^2 / (2 width^2)), with z the distance of their covariance from the mean, in standard
    deviations: a smooth form of `clip_cov`, on both tails. Has an effect strictly on-policy.

    Args:
        width (`float`): standard deviations at which the weight is 0.61. Our choice, tuned on the playground only.
    """

    source = "the formula and the default of `width` are our choice"

    def __init__(self, *, width: float = 2.0):
        self.width = number("width", width, above=0)

    def advantages(self, tokens: Tokens) -> Tensor:
        cov = covariance(tokens.logps.detach(), tokens.advantages, tokens.mask)
        z = (cov - mean(cov, tokens.mask)) / std(cov, tokens.mask).clamp(min=1e-8)
        return tokens.advantages * (-0.5 * (z / self.width).square()).exp()
