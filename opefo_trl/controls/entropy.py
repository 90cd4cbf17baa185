"""Controls that use the entropy itself: a bonus in the loss, a bonus on the advantage, a selection of tokens.

`entropy_bonus`, `adaptive_entropy` and `high_entropy_tokens` set TRL's own fields, so that they can be compared with
the rest. `aer` is in the style of AER (arXiv 2510.10959), whose exact update is not public; the class below states
ours. All have an effect strictly on-policy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import number
from opefo_trl.controls.target import EntropyTarget, FirstEntropy
from opefo_trl.flow import FlowTotals

__all__: list[str] = []  # of use inside this package only


def toward(value: Tensor | float, condition: Tensor, step: float, low: float, high: float) -> Tensor:
    """Return `value` plus `step` where the condition holds, else minus `step`, within the bounds."""
    return (value + torch.where(condition, step, -step)).clamp(low, high)


class EntropyControl(Control):
    """
    Base of controls with a coefficient that follows the entropy, once per optimizer step.

    The entropy may be that of the previous step, so that no scoring pass is needed. Subclasses define `next_coef`.
    """

    needs_totals = False
    state_fields: tuple[str, ...] = ("coef",)  # numbers that a checkpoint keeps beside the first entropy

    def __init__(self, coef: float):
        self.coef: Tensor | float = coef
        self.first = FirstEntropy()
        self._step = -1

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        """Return this step's coefficient from the last one; `first` is the first entropy that the run measured."""
        raise NotImplementedError

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        if step == self._step:  # another micro-batch of the same step
            return
        self._step = step
        entropy = totals.entropy
        coef = torch.as_tensor(self.coef, device=entropy.device, dtype=entropy.dtype)
        following = self.next_coef(coef, entropy, self.first.record(entropy), step, max_steps)
        self.coef = torch.where(entropy.isnan(), coef, following)

    def metrics(self) -> dict[str, Tensor | float]:
        return {"coef": self.coef}

    def state_dict(self) -> dict[str, Any]:
        return {**{name: float(getattr(self, name)) for name in self.state_fields}, "anchor": self.first.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_fields:
            setattr(self, name, state[name])
        self.first.load(state["anchor"])


class EntropyBonus(Control):
    """
    TRL's `entropy_coef`: loss - coef mean H.

    Args:
        coef (`float`): verl's default, 0.001; TRL's is 0, no bonus.
    """

    def __init__(self, *, coef: float = 1e-3):
        self.presets = {"entropy_coef": number("coef", coef), "use_adaptive_entropy": False}


class AdaptiveEntropy(Control):
    """
    TRL's `use_adaptive_entropy`, after Skywork-OR1 (arXiv 2505.22312): a bonus while entropy is at or below a target,
    whose coefficient takes a step up below the target and a step down above it.

    Args:
        target (`float`): nats. TRL's and Skywork's default, 0.2.
        step, coef_max (`float`): TRL's defaults, 0.005 and 1; Skywork's are 0.0001 and 0.005.
        coef (`float`): the initial coefficient. TRL's default, 0.
    """

    def __init__(self, *, target: float = 0.2, step: float = 0.005, coef: float = 0.0, coef_max: float = 1.0):
        ceiling = number("coef_max", coef_max, 0)
        self.presets = {
            "use_adaptive_entropy": True,
            "entropy_target": number("target", target, above=0),
            "entropy_coef_delta": number("step", step, 0),
            "entropy_coef_max": ceiling,
            "entropy_coef": number("coef", coef, 0, ceiling),
        }


class AER(EntropyControl):
    """
    An adaptive entropy bonus for hard questions, in the style of AER (arXiv 2510.10959):

        loss - mean(c_q H_t),   c_q = c max(0, 1 - g / ease),   g = share of right answers to the question q

    c takes a step up when entropy is below the target and a step down when it is above.

    Args:
        target (`float` or `str`): nats, or a multiple of the first step's entropy. Second-hand: `"0.4x"` is reported
            to be the paper's best.
        step, coef_max (`float`): step and bound of c. Our choice: TRL's defaults for its adaptive bonus.
        ease (`float`): share of right answers at which the bonus reaches 0. Our choice.
    """

    by_row = True
    source = (
        "its update is not public; the rule, `step`, `coef_max` and `ease` are our choice, the default of `target` is "
        "second-hand"
    )

    def __init__(self, *, target: float | str = "0.4x", step: float = 0.005, coef_max: float = 1.0, ease: float = 1.0):
        self.target = EntropyTarget(target, name="target")
        self.step, self.coef_max = number("step", step, 0), number("coef_max", coef_max, 0)
        self.ease = number("ease", ease, 0, 1, above=0)
        super().__init__(0.0)

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        return toward(coef, entropy < self.target.at(first, step, max_steps), self.step, 0.0, self.coef_max)

    def penalty(self, tokens: Tokens) -> Tensor:
        if tokens.solved is None:
            hardness = torch.ones_like(tokens.advantages)
        else:
            hardness = (1 - tokens.solved / self.ease).clamp(min=0)
        return -self.coef * hardness * tokens.entropies


class EntropyAdvantage(Control):
    """
    Raise the advantage of uncertain tokens (arXiv 2506.14758): A + min(alpha H, |A| / kappa), H detached.

    Args:
        alpha, kappa (`float`): 0.4 and 2. Second-hand: the authors' values for GRPO, from memory.
    """

    by_row = keeps_zeros = True
    source = "the defaults of `alpha` and `kappa` are second-hand, from memory"

    def __init__(self, *, alpha: float = 0.4, kappa: float = 2.0):
        self.alpha, self.kappa = number("alpha", alpha, 0), number("kappa", kappa, above=0)

    def advantages(self, tokens: Tokens) -> Tensor:
        bonus = self.alpha * tokens.entropies.detach().clamp(min=0)
        return tokens.advantages + torch.minimum(bonus, tokens.advantages.abs() / self.kappa)


class HighEntropyTokens(Control):
    """
    TRL's `top_entropy_quantile` (arXiv 2506.01939): train only on the tokens with the highest entropy.

    Args:
        share (`float`): share of the tokens to train on. The paper's, 0.2.
    """

    def __init__(self, *, share: float = 0.2):
        self.presets = {"top_entropy_quantile": number("share", share, 0, 1, above=0)}
