"""Controls that scale or drop positive advantages, which reinforce likely tokens and so lower entropy.

`positive_advantage` and `random_positive_clip` are from arXiv 2511.05993, `advantage_sign` is its ablation; all three
are second-hand, from a summary of the paper. `negative_reinforcement` is the weighted form of arXiv 2506.01347,
second-hand, from memory. All have an effect strictly on-policy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.entropy import EntropyControl, toward
from opefo_trl.controls.options import choice, number
from opefo_trl.controls.statistics import at_random, token_budget

__all__: list[str] = []  # of use inside this package only


def _scaled(advantages: Tensor, positive: Tensor | float, negative: Tensor | float = 1.0) -> Tensor:
    """Return advantages above 0 times `positive`, those below times `negative`."""
    return torch.where(advantages > 0, advantages * positive, advantages * negative)


class PositiveAdvantage(EntropyControl):
    """
    Multiply positive advantages by a weight from 0 to 1 that follows a schedule.

    `entropy`: from 0, a step down whenever the last entropy was below the target, else a step up.
    `stage`: 0 in the first half of the run, then linearly to 1.
    `epoch`: (e - 1) / (E - 1) in epoch e of E.

    Args:
        schedule (`str`): `entropy` (the paper's main form), `stage` or `epoch`.
        target (`float`): nats, for `entropy`. The paper's, 0.2.
        step (`float`): for `entropy`. The paper's, 0.05.
        num_train_epochs, max_steps: the run's, for `epoch`.
    """

    by_row = keeps_zeros = True
    shapes_tokens = False
    source = "formula and defaults are second-hand, from a summary of the paper"

    def __init__(
        self,
        *,
        schedule: str = "entropy",
        target: float = 0.2,
        step: float = 0.05,
        num_train_epochs: float = 1.0,
        max_steps: int = -1,
    ):
        self.schedule = choice("schedule", schedule, ("entropy", "stage", "epoch"))
        self.target, self.step = number("target", target, above=0), number("step", step, 0, 1)
        self.epochs = num_train_epochs
        if schedule == "epoch" and max_steps > 0:
            raise ValueError(
                f"`schedule='epoch'` in `control_kwargs` counts epochs, and `max_steps={max_steps}` ends the run by "
                "steps. Drop `max_steps` and set `num_train_epochs`, or use `schedule='stage'`."
            )
        if schedule == "epoch" and num_train_epochs < 2:
            raise ValueError(
                f"`schedule='epoch'` in `control_kwargs` goes from 0 in the first epoch to 1 in the last: with "
                f"`num_train_epochs={num_train_epochs:g}` there is no second one. Set it to 2 or more, or use "
                "`schedule='stage'`."
            )
        super().__init__(0.0)

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        if self.schedule == "entropy":
            return toward(coef, entropy < self.target, -self.step, 0.0, 1.0)
        steps = max(1, max_steps)
        if self.schedule == "stage":
            return torch.full_like(entropy, max(0.0, 2 * step / steps - 1))
        epoch = math.floor(step * self.epochs / steps)
        return torch.full_like(entropy, min(1.0, epoch / (math.ceil(self.epochs) - 1)))

    def advantages(self, tokens: Tokens) -> Tensor:
        return _scaled(tokens.advantages, self.coef)


class RandomPositiveClip(Control):
    """
    Zero the advantage of a few random tokens whose advantage is positive.

    Args:
        ratio (`float`): share of the trained tokens, at least one token. Our choice: the default of `clip_cov`,
            0.0002; no value of the paper is known.
    """

    source = "the formula is second-hand, from a summary of the paper, and the default of `ratio` is our choice"

    def __init__(self, *, ratio: float = 2e-4):
        self.ratio = number("ratio", ratio, 0, 1)

    def advantages(self, tokens: Tokens) -> Tensor:
        eligible = (tokens.advantages > 0) & tokens.mask.bool()
        drawn = at_random(eligible, token_budget(tokens.mask, self.ratio))
        return tokens.advantages.expand_as(drawn).masked_fill(drawn, 0)


class AdvantageSign(Control):
    """
    Train only on one sign of the advantage.

    Args:
        keep (`str`): `positive` or `negative`.
    """

    by_row = keeps_zeros = True
    shapes_tokens = False
    source = "the formula is second-hand, from a summary of the paper"

    def __init__(self, *, keep: str = "positive"):
        self.keep = choice("keep", keep, ("positive", "negative"))

    def advantages(self, tokens: Tokens) -> Tensor:
        kept = (1.0, 0.0) if self.keep == "positive" else (0.0, 1.0)
        return _scaled(tokens.advantages, *kept)


class NegativeReinforcement(Control):
    """
    Multiply positive advantages by a small weight, to learn mainly from wrong answers.

    Args:
        positive_weight (`float`): 0.1. Second-hand: the paper's value, from memory.
    """

    by_row = keeps_zeros = True
    shapes_tokens = False
    source = "the formula and the default of `positive_weight` are second-hand, from memory"

    def __init__(self, *, positive_weight: float = 0.1):
        self.positive_weight = number("positive_weight", positive_weight, 0)

    def advantages(self, tokens: Tokens) -> Tensor:
        return _scaled(tokens.advantages, self.positive_weight)
