"""Controls of the clip range. In strictly on-policy runs every ratio is 1 and nothing is clipped, so they need several
updates per rollout. TRL's losses `cispo`, `sapo` and `vespo` have no such range, or only its upper end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.entropy import EntropyControl
from opefo_trl.controls.options import choice, number

__all__: list[str] = []  # of use inside this package only

_Bounds = tuple[Tensor | float, Tensor | float]


class ClipHigher(Control):
    """
    Sets TRL's `epsilon` and `epsilon_high` as in DAPO (arXiv 2503.14476): unlikely tokens may rise further.

    Args:
        low, high (`float`): the paper's, 0.2 and 0.28. Verified.
    """

    acts_on_policy = False

    def __init__(self, *, low: float = 0.2, high: float = 0.28):
        self.presets = {"epsilon": number("low", low, 0, 1), "epsilon_high": number("high", high, 0)}


class ClipLow(ClipHigher):
    """
    Sets TRL's `epsilon` below `epsilon_high`: clipping at the lower bound raises entropy (arXiv 2509.26114).

    Args:
        low, high (`float`): 0.1 and 0.2. `low` is our choice: the paper's tuned value is not known; its baseline is
            0.2 and 0.2.
    """

    source = "the effect is second-hand, and the default of `low` is our choice"

    def __init__(self, *, low: float = 0.1, high: float = 0.2):
        super().__init__(low=low, high=high)


_SCHEDULES = ("increase_decrease", "decrease_increase_decrease", "oscillating")
_FLOOR = 0.2  # as a fraction of the first entropy


class DynamicClip(EntropyControl):
    """
    Bounds that depend on a token's probability and move over the run (Flexible Entropy Control, arXiv 2602.09782).

    With p = pi_old, an upper bound that is wide for unlikely tokens lets entropy rise, and a lower bound that is tight
    for likely ones lets it fall:

        upper(p) = (1 + b) / (1 - a p) - 1,        a = -0.25,  b = 0.5
        lower(p) = 1 - (1 - b') / (1 + a' p),      a' = -0.13, b' = 0.3

    `increase_decrease`: from (eps, upper) to (eps, eps) in the first half of the run, from (lower, eps) to (eps, eps)
    in the second.
    `decrease_increase_decrease`: from (eps, eps) to (eps, upper), then from (lower, upper) to (eps, upper).
    `oscillating`: (eps, upper) once entropy is below a fifth of the first step's, (lower, eps) once it is above a
    ceiling that falls from the first step's entropy to that fifth over the run.

    Schedules are verified against the authors' page. Slopes and intercepts are second-hand: a third party's defaults.

    Args:
        schedule (`str`): one of the three.
        epsilon (`float`): eps. The authors', 0.2.
        upper_slope, upper_intercept, lower_slope, lower_intercept (`float`): a, b, a', b'.
    """

    acts_on_policy = False
    by_row = True
    state_fields = ("coef", "low", "high")
    source = "the default slopes and intercepts are second-hand, from a third party"

    def __init__(
        self,
        *,
        schedule: str = "increase_decrease",
        epsilon: float = 0.2,
        upper_slope: float = -0.25,
        upper_intercept: float = 0.5,
        lower_slope: float = -0.13,
        lower_intercept: float = 0.3,
    ):
        self.schedule = choice("schedule", schedule, _SCHEDULES)
        self.epsilon = number("epsilon", epsilon, 0, 1)
        self.upper_slope = number("upper_slope", upper_slope, high=0.9)
        self.upper_intercept = number("upper_intercept", upper_intercept, 0)
        self.lower_slope = number("lower_slope", lower_slope, low=-0.9)
        self.lower_intercept = number("lower_intercept", lower_intercept, 0, 1)
        self.low: float = 0.0  # weight of the dynamic lower bound; epsilon has the rest
        self.high: float = 1.0 if schedule == "increase_decrease" else 0.0
        super().__init__(1.0)  # `oscillating`: 1 while entropy should rise, else 0

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        done = step / max(1, max_steps)
        # From 1 to 0 over each half; the second is 0 before it begins
        first_half, second_half = max(0.0, 1 - 2 * done), 2 - 2 * done if done > 0.5 else 0.0
        if self.schedule == "increase_decrease":
            self.low, self.high = second_half, first_half
        elif self.schedule == "decrease_increase_decrease":
            self.low, self.high = second_half, 1 - first_half
        floor = _FLOOR * first
        ceiling = floor + (first - floor) * (1 - done)
        falling = torch.where(entropy > ceiling, torch.zeros_like(coef), coef)
        return torch.where(entropy <= floor, torch.ones_like(coef), falling)

    def clip_range(self, tokens: Tokens) -> _Bounds:
        p = tokens.old_logps.exp()
        upper = (1 + self.upper_intercept) / (1 - self.upper_slope * p) - 1
        lower = 1 - (1 - self.lower_intercept) / (1 + self.lower_slope * p)
        low, high = (1 - self.coef, self.coef) if self.schedule == "oscillating" else (self.low, self.high)
        return (
            (low * lower + (1 - low) * self.epsilon).clamp(0, 1),
            (high * upper + (1 - high) * self.epsilon).clamp(min=0),
        )


class CEGPPO(Control):
    """
    Keep the gradient of clipped tokens, at a chosen size (CE-GPPO, arXiv 2509.20712).

        r < 1 - low,  A < 0:  beta_low (1 - low) / r        r > 1 + high, A > 0:  beta_high (1 + high) / r

    times the advantage. Clipping is switched off; tokens with A < 0 and r above `dual_clip` get no gradient. Verified
    against the authors' code, whose loss has the same gradient and another value.

    Args:
        beta_low, beta_high (`float`): the authors' values for 7B, 0.75 and 1 (for 1.5B 0.5 and 1).
        low, high (`float`): bounds of the ratio. The authors', 0.2 and 0.2.
        dual_clip (`float`): the authors', 3.
    """

    acts_on_policy = False
    unclipped = True
    by_row = keeps_zeros = True

    def __init__(
        self,
        *,
        beta_low: float = 0.75,
        beta_high: float = 1.0,
        low: float = 0.2,
        high: float = 0.2,
        dual_clip: float = 3.0,
    ):
        self.beta_low, self.beta_high = number("beta_low", beta_low, 0), number("beta_high", beta_high, 0)
        self.low, self.high = number("low", low, 0, 1), number("high", high, 0)
        self.dual_clip = number("dual_clip", dual_clip, above=1)

    def clip_range(self, tokens: Tokens) -> _Bounds:
        return 1.0, torch.inf

    def advantages(self, tokens: Tokens) -> Tensor:
        r, advantages = tokens.ratio, tokens.advantages
        weights = torch.where((r < 1 - self.low) & (advantages < 0), self.beta_low * (1 - self.low) / r, 1.0)
        weights = torch.where((r > 1 + self.high) & (advantages > 0), self.beta_high * (1 + self.high) / r, weights)
        weights = torch.where((r > self.dual_clip) & (advantages < 0), 0.0, weights)
        return advantages * weights


class BAPO(Control):
    """
    Widen the clip range until positive samples have enough weight (BAPO, arXiv 2510.18927).

        P(high) = sum over A >= 0 of min(r, high) A          N(low) = sum over A < 0 of max(r, low) |A|

    First `low` rises in steps from its start to its end until P / N reaches the target, then `high` does. Verified
    against the authors' code, except that it sums over all ranks, and we over the micro-batch of this rank.

    Args:
        target (`float`): the P / N to reach. The code's, 1.
        low, low_end, high, high_end, step (`float`): the code's, 0.6 to 0.8 and 1.2 to 2.0, in steps of 0.05.
        dual_clip (`float`): ratio above which tokens with A < 0 get no gradient. The code's, 3.
    """

    acts_on_policy = False

    def __init__(
        self,
        *,
        target: float = 1.0,
        low: float = 0.6,
        low_end: float = 0.8,
        high: float = 1.2,
        high_end: float = 2.0,
        step: float = 0.05,
        dual_clip: float = 3.0,
    ):
        self.target, step = number("target", target, above=0), number("step", step, above=0)
        low, high = number("low", low, 0, 1), number("high", high, 1)
        self.lows = _steps(low, number("low_end", low_end, low, 1), step)
        self.highs = _steps(high, number("high_end", high_end, high), step)
        self.dual_clip = number("dual_clip", dual_clip, above=1)
        self._metrics: dict[str, Tensor | float] = {}

    def clip_range(self, tokens: Tokens) -> _Bounds:
        r = tokens.ratio.clamp(max=torch.finfo(torch.float32).max)
        advantages, mask = tokens.advantages.expand_as(r), tokens.mask.bool()
        positive, negative = mask & (advantages >= 0), mask & (advantages < 0)
        lows, highs = (torch.tensor(steps, device=r.device) for steps in (self.lows, self.highs))
        gain = torch.stack([torch.where(positive, r.clamp(max=high) * advantages, 0).sum() for high in self.highs])
        loss = torch.stack([torch.where(negative, r.clamp(min=low) * -advantages, 0).sum() for low in self.lows])
        index = _first_true(gain[:1] >= self.target * loss)
        low = lows.gather(0, index).squeeze()
        high = highs.gather(0, _first_true(gain >= self.target * loss.gather(0, index))).squeeze()
        self._metrics = {"clip_low": low, "clip_high": high}
        return 1 - low, high - 1

    def advantages(self, tokens: Tokens) -> Tensor:
        stopped = (tokens.ratio > self.dual_clip) & (tokens.advantages < 0)
        return tokens.advantages.expand_as(stopped).masked_fill(stopped, 0)

    def metrics(self) -> dict[str, Tensor | float]:
        return self._metrics


class DCPO(Control):
    """
    Bounds from a token's old probability (DCPO, arXiv 2509.02333): wide for unlikely tokens.

        r_low = (1 + sqrt(max(1 - 4 low / q, 0))) / 2        r_high = min((1 + sqrt(1 + 4 high / q)) / 2, most)

    with q = pi_old. Verified against the authors' code. Its smoothed advantages are left out: they need the reward
    history of every prompt.

    Args:
        low, high (`float`): the authors', 0.16 and 0.2.
        most (`float`): the code's, 10.
    """

    acts_on_policy = False
    by_row = True

    def __init__(self, *, low: float = 0.16, high: float = 0.2, most: float = 10.0):
        self.low, self.high = number("low", low, 0), number("high", high, 0)
        self.most = number("most", most, above=1)

    def clip_range(self, tokens: Tokens) -> _Bounds:
        q = tokens.old_logps.exp().clamp(min=1e-8)
        low = (1 + (1 - 4 * self.low / q).clamp(min=0).sqrt()) / 2
        high = ((1 + (1 + 4 * self.high / q).sqrt()) / 2).clamp(max=self.most)
        return 1 - low, high - 1


def _steps(start: float, end: float, step: float) -> list[float]:
    count = int((end - start) / step + 1e-6)
    return [round(start + index * step, 10) for index in range(count + 1)]


def _first_true(condition: Tensor) -> Tensor:
    """Return the index of the first True, or the last index if there is none, (1,)."""
    last = torch.arange(len(condition), device=condition.device) == len(condition) - 1
    return (condition | last).int().argmax().unsqueeze(0)
