"""Controls of the tokens with a high covariance of advantage and log-probability, which drive the collapse.

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


class ClipCov(Control):
    """
    Take a few tokens with a covariance between the bounds out of the loss, drawn at random.

    Acts strictly on-policy. Tokens that TRL's loss clips anyway are not drawn.

    Args:
        ratio (`float`): share of the trained tokens to draw, at least one. The authors' default, 0.0002, also of their
            7B runs.
        low, high (`float`): bounds on the covariance. The authors' defaults, 1 and 5.
        epsilon, epsilon_high: the run's clip range, which tells the tokens that are clipped anyway.
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
    Penalise the tokens of highest covariance for leaving the old policy: + coef |log p - log p_old|, without clipping.

    Strictly on-policy both log-probabilities are equal and the term has no gradient: it needs several updates per
    rollout.

    Args:
        ratio (`float`): share of the trained tokens, at least one. verl's default, 0.0002; the authors' 7B runs 0.002.
        coef (`float`): weight of the term. The authors' default, 1.
        noise (`float`): differences up to this count as rounding, whose gradient would have full size and a random
            sign. Our choice, 0.0001; the authors' code has no such threshold.
    """

    acts_on_policy = False
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
    deviations: a smooth form of `clip_cov`, on both tails. Acts strictly on-policy.

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
