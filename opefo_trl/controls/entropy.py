"""Controls by the entropy itself: a bonus in the loss, and the controllers that set its size.

`entropy_bonus` and `adaptive_entropy` are TRL's own fields under a name, so that they can be compared with the rest.
`aer` is in the style of AER (arXiv 2510.10959): its exact update is not public, and ours is said below. All act
strictly on-policy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import number
from opefo_trl.controls.target import EntropyTarget, FirstEntropy
from opefo_trl.flow import FlowTotals


def toward(value: Tensor | float, condition: Tensor, step: float, low: float, high: float) -> Tensor:
    """One step up where the condition holds, else one down (a negative `step`: the other way), within the bounds."""
    return (value + torch.where(condition, step, -step)).clamp(low, high)


class EntropyControl(Control):
    """
    A coefficient that moves once a step, by the entropy that was measured last.

    It is content with the step before, so that it costs no scoring pass. A subclass says how, in `moved`.
    """

    needs_totals = False

    def __init__(self, coef: float):
        self.coef: Tensor | float = coef
        self.first = FirstEntropy()
        self._step = -1

    def moved(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        """The coefficient of this step, from that of the last one; `first` is the first entropy that was measured."""
        raise NotImplementedError

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        if step == self._step:  # another micro-batch of the same step
            return
        self._step = step
        entropy = totals.entropy
        coef = torch.as_tensor(self.coef, device=entropy.device, dtype=entropy.dtype)
        moved = self.moved(coef, entropy, self.first.seen(entropy), step, max_steps)
        self.coef = torch.where(entropy.isnan(), coef, moved)

    def metrics(self) -> dict[str, Tensor | float]:
        return {"coef": self.coef}

    def state_dict(self) -> dict[str, Any]:
        return {"coef": float(self.coef), "anchor": self.first.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]
        self.first.load(state["anchor"])


class EntropyBonus(Control):
    """
    TRL's `entropy_coef`: the mean entropy joins the loss.

    Args:
        coef (`float`): TRL's default is 0, which is no bonus; verl's is 0.001.
    """

    def __init__(self, *, coef: float = 1e-3):
        self.presets = {"entropy_coef": number("coef", coef), "use_adaptive_entropy": False}


class AdaptiveEntropy(Control):
    """
    TRL's `use_adaptive_entropy`, after Skywork-OR1 (arXiv 2505.22312): a bonus while entropy is at or below a target,
    its coefficient a step up below and a step down above.

    Args:
        target (`float`): nats. TRL's and Skywork's default, 0.2.
        step, coef_max (`float`): TRL's defaults, 0.005 and 1; Skywork's are 0.0001 and 0.005.
        coef (`float`): to begin with.
    """

    def __init__(self, *, target: float = 0.2, step: float = 0.005, coef: float = 0.0, coef_max: float = 1.0):
        most = number("coef_max", coef_max, 0)
        self.presets = {
            "use_adaptive_entropy": True,
            "entropy_target": number("target", target, above=0),
            "entropy_coef_delta": number("step", step, 0),
            "entropy_coef_max": most,
            "entropy_coef": number("coef", coef, 0, most),
        }


class AER(EntropyControl):
    """
    A bonus for hard questions: loss - mean of c_q H_t, c_q = c max(0, 1 - g / ease), g the share of right answers to
    the question, c a step up below the target entropy and a step down above.

    Args:
        target (`float` or `str`): `"0.4x"`, 0.4 of the first step's entropy, as the paper is said to find best; or
            nats.
        step, coef_max (`float`): of c. Not known; TRL's defaults for its adaptive bonus.
        ease (`float`): share of right answers from which on a question gets no bonus. Ours.
    """

    by_row = True

    def __init__(self, *, target: float | str = "0.4x", step: float = 0.005, coef_max: float = 1.0, ease: float = 1.0):
        self.target = EntropyTarget(target, name="target")
        self.step, self.most = number("step", step, 0), number("coef_max", coef_max, 0)
        self.ease = number("ease", ease, 0, 1, above=0)
        super().__init__(0.0)

    def moved(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        return toward(coef, entropy < self.target.at(first, step, max_steps), self.step, 0.0, self.most)

    def penalty(self, tokens: Tokens) -> Tensor:
        hard = torch.ones_like(tokens.advantages) if tokens.solved is None else tokens.solved
        if tokens.solved is not None:
            hard = (1 - tokens.solved / self.ease).clamp(min=0)
        return -self.coef * hard * tokens.entropies


class EntropyAdvantage(Control):
    """
    More advantage for uncertain tokens (arXiv 2506.14758): A + min(alpha H, |A| / kappa), H detached.

    Args:
        alpha, kappa (`float`): 0.4 and 2, the authors' for GRPO as we recall them; not verified.
    """

    by_row = keeps_zeros = True

    def __init__(self, *, alpha: float = 0.4, kappa: float = 2.0):
        self.alpha, self.kappa = number("alpha", alpha, 0), number("kappa", kappa, above=0)

    def advantages(self, tokens: Tokens) -> Tensor:
        bonus = self.alpha * tokens.entropies.detach().clamp(min=0)
        return tokens.advantages + torch.minimum(bonus, tokens.advantages.abs() / self.kappa)


class HighEntropyTokens(Control):
    """
    TRL's `top_entropy_quantile` (arXiv 2506.01939): learn from the most uncertain tokens alone.

    Args:
        share (`float`): of the tokens. The paper's, 0.2.
    """

    def __init__(self, *, share: float = 0.2):
        self.presets = {"top_entropy_quantile": number("share", share, 0, 1, above=0)}
