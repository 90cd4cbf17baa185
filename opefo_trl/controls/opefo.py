"""OPEFO, On-Policy Entropy Flow Optimization (arXiv 2605.11491): balance tokens that raise and that lower entropy.

    w_t = 1 + lambda where d_t > 0,  1 - lambda where d_t < 0,   lambda* = (E- - E+) / (E- + E+)

over the whole batch and all ranks, weights detached, the loss' denominator unchanged. Since sign(d_t) =
-sign(A_t) sign(log p_t + H_t), the weighted advantage is A_t - lambda |A_t| sign(log p_t + H_t): an entropy push in
sign form, whose coefficient is solved for.

It was designed for strictly on-policy runs. The estimate d_t is the paper's Eq. 6; the rescaling rule is second-hand,
from two sources that agree. Our own additions:

- `flow_lambda_max` bounds |lambda|, by 0.1 by default; not used with `flow_target` or `static_lambda`. lambda* reaches
  0.5 on short completions, where the unbounded rule destroys the reward. 1 is the literal paper.
- `flow_target`: hold an entropy instead of always balancing. With e = (target - entropy) / target, entropy: mean
  entropy of the observed totals,

      share <- clamp(share + 0.2 e, 0, 1.5)       lambda = clamp(share * lambda* + 3 e, 0, 1)

  `share` is how much of the balance the target needs: 0 is GRPO, 1 the paper's rule. Learning it during the run avoids
  both a steady offset and on-off switching. Lambda is never negative, so a rising entropy is not held back. A moving
  target may fall faster than entropy does under plain GRPO; once first reached, lambda may go down to -1 to follow it.
- `flow_shape: minimal`: of all weights w that move the predicted flow as far, those with the smallest sum of
  A^2 (w - 1)^2, which change the learning signal least,

      w_t = 1 + mu d_t / A_t^2,   mu = lambda (E+ + E-) / sum d_t^2 / A_t^2,   within [0, 3]

  It is the default with a constant target and `sides="both"`. The paper's weights follow a moving target more closely.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import choice, number
from opefo_trl.controls.target import SCHEDULES, EntropyTarget, FirstEntropy
from opefo_trl.flow import SIDES, FlowTotals, balance, flow_weights, minimal_weights
from opefo_trl.validation import check_choice, check_number

PAPER = {
    "title": "On-Policy Entropy Flow Optimization",
    "id": "2605.11491",
    "citation": """@article{opefo2026,
    title  = {{On-Policy Entropy Flow Optimization}},
    year   = 2026,
    eprint = {arXiv:2605.11491},
}""",
}
_SHAPES = ("sign", "minimal")
_GAIN, _RATE, _SHARE_MAX = 3.0, 0.2, 1.5  # of the rule that holds a target


class OPEFO(Control):
    """
    Rescales tokens so that their entropy flow balances, or holds a target.

    Args:
        sides (`str`): rescale `both` groups (the paper), or only the tokens that `increase` or `decrease` entropy.
        static_lambda (`float`, *optional*): a constant lambda in [-1, 1] instead of lambda*, the paper's ablation.
        flow_lambda_max, flow_target, flow_schedule, flow_shape: see `OPEFOConfig`.
    """

    by_row = keeps_zeros = True  # each token has a factor of its own

    def __init__(
        self,
        *,
        sides: str = "both",
        static_lambda: float | None = None,
        flow_lambda_max: float = 0.1,
        flow_target: float | str | None = None,
        flow_schedule: str = "constant",
        flow_shape: str | None = None,
    ):
        self.sides = choice("sides", sides, SIDES)
        if static_lambda is not None:
            static_lambda = number("static_lambda", static_lambda, -1, 1)
        if static_lambda is not None and flow_target is not None:
            raise ValueError(
                f"`static_lambda={static_lambda}` keeps lambda constant and `flow_target={flow_target!r}` moves it. "
                "Drop one of them."
            )
        self.static_lambda = static_lambda
        why = "The weights are 1 +- lambda and must not change sign; 1.0 is the paper's unbounded rule."
        bound = check_number("flow_lambda_max", flow_lambda_max, above=0, high=1, why=why)
        if flow_shape is not None:
            check_choice("flow_shape", flow_shape, _SHAPES)
        if flow_shape == "minimal" and sides != "both":
            raise ValueError(
                f"`sides={sides!r}` scales one group of tokens, but `flow_shape='minimal'` has no groups. "
                "Drop one of them."
            )
        held = flow_target is not None and flow_schedule == "constant" and sides == "both"
        self.shape = flow_shape or ("minimal" if held else "sign")
        check_choice("flow_schedule", flow_schedule, SCHEDULES)
        if flow_schedule != "constant" and flow_target is None:
            raise ValueError(f"`flow_schedule={flow_schedule!r}` moves a target: set `flow_target` as well.")
        self.target = None if flow_target is None else EntropyTarget(flow_target, flow_schedule)
        self.target_moves = flow_schedule != "constant"
        self.bound = bound if self.target is None else 1.0
        self.lam: Tensor | float = static_lambda or 0.0
        self.mu: Tensor | float = 0.0
        self.share: Tensor | float = 0.0  # of the balance that the target needs
        self.first = FirstEntropy()  # kept without a target too: a resumed run may set one
        self.target_now: Tensor | None = None
        self.reached: Tensor | bool = False
        self._step = -1  # the last step that moved `share`

    @property
    def shapes_tokens(self) -> bool:
        return self.static_lambda != 0

    @property
    def needs_totals(self) -> bool:
        return self.static_lambda is None or self.shape == "minimal"

    @property
    def idle_fields(self) -> dict[str, str]:
        if self.static_lambda is not None:
            return {"flow_lambda_max": "`static_lambda` is set"}
        return {} if self.target is None else {"flow_lambda_max": "`flow_target` is set, whose lambda is bounded by 1"}

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        first = self.first.record(totals.entropy)
        if self.static_lambda is None:
            lambda_star = balance(totals)
            self.lam = lambda_star.clamp(-self.bound, self.bound)
            if self.target is not None:
                self.target_now = self.target.at(first, step, max_steps)
                self.lam = self._holding_lambda(lambda_star, totals.entropy, self.target_now, step)
        self.mu = self.lam * (totals.increase + totals.decrease) / totals.leverage.clamp(min=1e-30)

    def _holding_lambda(self, lambda_star: Tensor, entropy: Tensor, target: Tensor, step: int) -> Tensor:
        """Return the lambda that holds the target, and update `share`."""
        missing = ((target - entropy) / target).nan_to_num(0.0)
        share = torch.as_tensor(self.share, device=entropy.device, dtype=entropy.dtype)
        if step != self._step:  # in the scope `micro` a step is observed once for each micro-batch
            share, self._step = (share + _RATE * missing).clamp(0, _SHARE_MAX), step
        self.share = share
        reached = torch.as_tensor(self.reached, device=entropy.device) | (entropy <= target)
        self.reached = reached
        falls_too_slowly = reached & self.target_moves  # a moving target, once reached, is followed downwards
        return (share * lambda_star + _GAIN * missing).clamp(max=1).maximum(-falls_too_slowly.to(entropy.dtype))

    def advantages(self, tokens: Tokens) -> Tensor:
        if self.static_lambda == 0:
            return tokens.advantages
        if self.shape == "minimal":
            return tokens.advantages * minimal_weights(tokens.flow, tokens.advantages, self.mu)
        return tokens.advantages * flow_weights(tokens.flow, self.lam, self.sides)

    def metrics(self) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {"flow/lambda": self.lam}
        if self.target_now is not None:
            metrics.update({"flow/target": self.target_now, "flow/share": self.share})
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.first.state(), "share": float(self.share), "reached": bool(self.reached)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first.load(state["anchor"])
        self.share, self.reached = state.get("share", 0.0), state.get("reached", False)  # older checkpoints lack them
