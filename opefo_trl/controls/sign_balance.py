"""Controls that hold or calibrate entropy by the balance between positive and negative advantages.

`entropic` (EntroPIC, arXiv 2511.15248) and `entrocraft` (arXiv 2604.26326) hold an entropy, `asym_grpo` (AsymGRPO,
arXiv 2604.04894) has no target. Formulas and defaults of the first two are verified in the authors' code, except for
what the classes name; the third is second-hand. All have an effect strictly on-policy.

As in the authors' code, `entropic` and `entrocraft` act on the entropy of the batch that is being trained on. With
`flow_scope: running` they take that of the previous step, which saves a scoring pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.entropy import EntropyControl
from opefo_trl.controls.options import choice, number
from opefo_trl.controls.target import FROM_START, SCHEDULES, EntropyTarget

__all__: list[str] = []  # of use inside this package only


class EntroPIC(EntropyControl):
    """
    A proportional-integral controller of the weight of positive and negative advantages (arXiv 2511.15248).

        A + alpha |A| where p > threshold,   alpha = clamp(k_p e + k_i sum of earlier e, -1, 1),   e = entropy - target

    On likely tokens, positive advantages count 1 + alpha times and negative ones 1 - alpha times. The authors' code
    averages alpha |A| over these tokens alone; here it is averaged over all tokens like A itself, so it is smaller by
    their share of all tokens.

    Args:
        target (`float` or `str`): nats, or a multiple of the first step's entropy. The authors', 0.1.
        proportional, integral (`float`): k_p and k_i. The authors', 1 and 0.01.
        threshold (`float`): probability above which a token counts as likely. The authors', 0.95.
        schedule (`str`): how the target moves over the run, see `flow_schedule` in `OPEFOConfig`. The authors' is
            constant.
    """

    by_row = keeps_zeros = True
    needs_totals = True
    state_fields = ("coef", "total")
    source = "adding alpha |A| without the authors' average over the tokens above `threshold` is our choice"

    def __init__(
        self,
        *,
        target: float | str = 0.1,
        proportional: float = 1.0,
        integral: float = 0.01,
        threshold: float = 0.95,
        schedule: str = "constant",
    ):
        self.target = EntropyTarget(target, choice("schedule", schedule, SCHEDULES), name="target")
        self.proportional, self.integral = number("proportional", proportional, 0), number("integral", integral, 0)
        self.threshold = number("threshold", threshold, 0, 1)
        self.total: Tensor | float = 0.0  # sum of the errors of all earlier steps
        self.target_now: Tensor | None = None
        super().__init__(0.0)

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        self.target_now = self.target.at(first, step, max_steps)
        error = entropy - self.target_now
        total = torch.as_tensor(self.total, device=entropy.device, dtype=entropy.dtype)
        self.total = torch.where(error.isnan(), total, total + error)
        return (self.proportional * error + self.integral * total).clamp(-1, 1)

    def advantages(self, tokens: Tokens) -> Tensor:
        likely = tokens.logps.detach() > (math.log(self.threshold) if self.threshold > 0 else -math.inf)
        return tokens.advantages + self.coef * likely * tokens.advantages.abs()

    def metrics(self) -> dict[str, Tensor | float]:
        target = {} if self.target_now is None else {"flow/target": self.target_now}
        return {**super().metrics(), **target}


class Entrocraft(EntropyControl):
    """
    Train on one sign of the advantage while entropy is outside a band (arXiv 2604.26326).

        entropy < low:   only A <= 0       entropy > high:   only A >= 0       inside the band:   all, plain GRPO

    Dropped completions have advantage 0 and still count in the loss' denominator. Outside the band the authors' code
    trains on raw rewards, of which a wrong answer's must be negative; here the group's advantages stay.

    Args:
        low, high (`float` or `str`): the band, in nats, or multiples of the first step's entropy. The authors', 0.4
            and 0.5 (also 0.2 and 0.3, 0.6 and 0.7).
        schedule (`str`): `constant`; `linear` or `cosine` from `low_start` and `high_start` to `low` and `high`; or
            another one of `flow_schedule` in `OPEFOConfig`, which moves both bounds by the same factor.
        low_start, high_start (`float` or `str`, *optional*): where `linear` and `cosine` begin. The authors', 0.6 and
            0.7.
    """

    by_row = keeps_zeros = True
    needs_totals = True
    shapes_tokens = False
    source = (
        "keeping the group's advantages outside the band, where the authors' code takes raw rewards, is our choice"
    )

    def __init__(
        self,
        *,
        low: float | str = 0.4,
        high: float | str = 0.5,
        schedule: str = "constant",
        low_start: float | str | None = None,
        high_start: float | str | None = None,
    ):
        choice("schedule", schedule, SCHEDULES)
        starts: tuple[EntropyTarget | None, EntropyTarget | None] = (None, None)
        if schedule in FROM_START:
            if low_start is None or high_start is None:
                raise ValueError(
                    f"`schedule={schedule!r}` in `control_kwargs` moves the band from its start to `low` and `high`. "
                    "Set `low_start` and `high_start` as well, such as the authors' 0.6 and 0.7."
                )
            starts = _band(low_start, high_start, "low_start", "high_start")
        elif low_start is not None or high_start is not None:
            raise ValueError(
                f"`low_start={low_start!r}` and `high_start={high_start!r}` in `control_kwargs` are where a `linear` "
                f"or `cosine` schedule begins, and `schedule={schedule!r}` is neither. Set `schedule`, or drop them."
            )
        _band(low, high, "low", "high")
        self.low, self.high = (
            EntropyTarget(value, schedule, name, start)
            for value, name, start in zip((low, high), ("low", "high"), starts, strict=True)
        )
        self.band_now: tuple[Tensor, Tensor] | None = None
        super().__init__(0.0)  # -1 below the band, 1 above it, 0 inside

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        self.band_now = low, high = self.low.at(first, step, max_steps), self.high.at(first, step, max_steps)
        return (entropy > high).to(entropy.dtype) - (entropy < low).to(entropy.dtype)

    def advantages(self, tokens: Tokens) -> Tensor:
        side, advantages = torch.as_tensor(self.coef), tokens.advantages
        positive, negative = 1 + side.clamp(max=0), 1 - side.clamp(min=0)
        return torch.where(advantages > 0, advantages * positive, advantages * negative)

    def metrics(self) -> dict[str, Tensor | float]:
        if self.band_now is None:
            return super().metrics()
        low, high = self.band_now
        return {**super().metrics(), "low": low, "high": high, "flow/target": (low + high) / 2}


def _band(low: float | str, high: float | str, *names: str) -> tuple[EntropyTarget, EntropyTarget]:
    """Return both bounds, or raise if they are not in the same unit, or not in order."""
    bounds = EntropyTarget(low, name=names[0]), EntropyTarget(high, name=names[1])
    if bounds[0].relative != bounds[1].relative or bounds[0].number > bounds[1].number:
        raise ValueError(
            f"`{names[0]}={low!r}` and `{names[1]}={high!r}` in `control_kwargs` must be a band: both in nats or both "
            f"multiples of the first step's entropy, and `{names[0]}` at most `{names[1]}`."
        )
    return bounds


class AsymGRPO(Control):
    """
    Advantages from the group's share p of right answers, with an exponent for each sign (arXiv 2604.04894).

        A > 0:  ((1 - p) / p)^positive_exponent        A < 0:  -(p / (1 - p))^negative_exponent

    With both exponents at 0.5 it is GRPO for rewards of 0 and 1. A group without right or without wrong answers keeps
    its advantages: with one reward they are 0; with several, or with a first reward that judges no answer, they are
    GRPO's.

    Args:
        positive_exponent, negative_exponent (`float`): 0.9 and 0.4. Second-hand.
    """

    by_row = keeps_zeros = True
    shapes_tokens = False
    source = (
        "formula and exponents are second-hand, from a summary of the paper; what groups without right or without "
        "wrong answers keep is our choice"
    )

    def __init__(self, *, positive_exponent: float = 0.9, negative_exponent: float = 0.4):
        self.positive = number("positive_exponent", positive_exponent, 0)
        self.negative = number("negative_exponent", negative_exponent, 0)

    def advantages(self, tokens: Tokens) -> Tensor:
        advantages, solved = tokens.advantages, tokens.solved
        if solved is None:  # no reward judges the answers
            return advantages
        odds = (solved / (1 - solved)).to(advantages.dtype)
        shaped = torch.where(advantages > 0, odds**-self.positive, -(odds**self.negative))
        return torch.where((advantages != 0) & (solved > 0) & (solved < 1), shaped, advantages)
