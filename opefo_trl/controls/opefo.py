"""OPEFO, On-Policy Entropy Flow Optimization (arXiv 2605.11491): balance what raises entropy and what lowers it.

    w_t = 1 + lambda where d_t > 0,  1 - lambda where d_t < 0,   lambda* = (E- - E+) / (E- + E+)

over the whole batch and all ranks, weights detached, the loss' denominator unchanged. Since sign(d_t) =
-sign(A_t) sign(log p_t + H_t), the weighted advantage is A_t - lambda |A_t| sign(log p_t + H_t): an entropy push in
sign form, whose coefficient is solved for.

It acts strictly on-policy, which is what it was made for. Ours, not the paper's: the bound `flow_lambda_max`
(lambda* reaches 0.5 on short completions, where the unbounded rule destroys the reward; 1 is the literal paper), and
`flow_target`: lambda acts, bounded by 1 only, while the last measured entropy is below the target, and is 0 above it.
Below a target lambda is never negative: it does not hold back an entropy that is already on its way up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.target import SCHEDULES, EntropyTarget
from opefo_trl.flow import SIDES, FlowTotals, balance, flow_weights

# `sign` is the paper's 1 +- lambda.
SHAPES = ("sign",)


class OPEFO(Control):
    """
    Args:
        sides (`str`): rescale `both` groups (the paper), or only the tokens that `increase` or `decrease` entropy.
        static_lambda (`float`, *optional*): a fixed lambda in [-1, 1] instead of lambda*, the paper's ablation.
        flow_lambda_max, flow_target, flow_schedule, flow_shape: see `OPEFOConfig`.
    """

    def __init__(
        self,
        *,
        sides: str = "both",
        static_lambda: float | None = None,
        flow_lambda_max: float = 0.1,
        flow_target: float | str | None = None,
        flow_schedule: str = "constant",
        flow_shape: str = "sign",
    ):
        if sides not in SIDES:
            raise ValueError(
                f"`sides={sides!r}` in `control_kwargs` is unknown. Choose one of {', '.join(map(repr, SIDES))}."
            )
        if static_lambda is not None and not -1 <= _number("static_lambda", static_lambda) <= 1:
            raise ValueError(f"`static_lambda={static_lambda!r}` in `control_kwargs` must be in [-1, 1].")
        if static_lambda is not None and flow_target is not None:
            raise ValueError(
                f"`static_lambda={static_lambda}` fixes lambda for the whole run and `flow_target={flow_target!r}` "
                "moves it. Drop one of them."
            )
        if not 0 < _number("flow_lambda_max", flow_lambda_max) <= 1:
            raise ValueError(
                f"`flow_lambda_max={flow_lambda_max!r}` must be in (0, 1]: the weights are 1 +- lambda and must not "
                "change sign. 1.0 is the paper's unbounded rule."
            )
        if flow_shape not in SHAPES:
            raise ValueError(f"`flow_shape={flow_shape!r}` is unknown. Choose one of {', '.join(map(repr, SHAPES))}.")
        if flow_schedule not in SCHEDULES:
            raise ValueError(
                f"`flow_schedule={flow_schedule!r}` is unknown. Choose one of {', '.join(map(repr, SCHEDULES))}."
            )
        self.sides = sides
        self.static_lambda = None if static_lambda is None else float(static_lambda)
        self.target = None if flow_target is None else EntropyTarget(flow_target, flow_schedule)
        self.bound = float(flow_lambda_max) if self.target is None else 1.0
        self.lam: Tensor | float = self.static_lambda or 0.0
        self.anchor: Tensor | None = None  # the first step's entropy, kept without a target too: one may come later
        self.target_now: Tensor | None = None

    by_row = keeps_zeros = True  # a factor for each token

    @property
    def shapes_tokens(self) -> bool:
        return self.static_lambda != 0

    @property
    def needs_totals(self) -> bool:
        return self.static_lambda is None

    @property
    def idle_fields(self) -> dict[str, str]:
        if self.static_lambda is not None:
            return {"flow_lambda_max": "`static_lambda` is set"}
        return {} if self.target is None else {"flow_lambda_max": "`flow_target` is set, whose lambda is bounded by 1"}

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        anchor = totals.entropy if self.anchor is None else self.anchor.to(totals.entropy.device)
        self.anchor = torch.where(anchor.isnan(), totals.entropy, anchor)
        if self.static_lambda is not None:
            return
        self.lam = balance(totals).clamp(-self.bound, self.bound)
        if self.target is not None:
            self.target_now = self.target.at(self.anchor, step, max_steps)
            self.lam = torch.where(totals.entropy < self.target_now, self.lam.clamp(min=0), torch.zeros_like(self.lam))

    def advantages(self, tokens: Tokens) -> Tensor:
        if self.static_lambda == 0:
            return tokens.advantages
        return tokens.advantages * flow_weights(tokens.flow, self.lam, self.sides)

    def metrics(self) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {"flow/lambda": self.lam}
        if self.target_now is not None:
            metrics["flow/target"] = self.target_now
        return metrics

    def state_dict(self) -> dict[str, Any]:
        known = self.anchor is not None and not self.anchor.isnan()
        return {"anchor": self.anchor.item() if known and self.anchor is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.anchor = None if state["anchor"] is None else torch.tensor(state["anchor"])


def _number(name: str, value: Any) -> float:
    """A number, also one that YAML takes for text (`1e-3`)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}={value!r}` is not a number.") from None
