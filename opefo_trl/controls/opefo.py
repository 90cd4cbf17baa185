"""OPEFO, On-Policy Entropy Flow Optimization (arXiv 2605.11491): balance tokens that raise and that lower entropy.

    w_t = 1 + lambda where d_t > 0,  1 - lambda where d_t < 0,   lambda* = (E- - E+) / (E- + E+)

over the whole batch and all ranks, weights detached, the loss' denominator unchanged. Since sign(d_t) =
-sign(A_t) sign(log p_t + H_t), the weighted advantage is A_t - lambda |A_t| sign(log p_t + H_t): an entropy push in
sign form, whose coefficient is solved for.

It was designed for strictly on-policy runs. The estimate d_t is the paper's Eq. 6; the rescaling rule is second-hand,
from two sources that agree. Our own additions:

- `flow_lambda_max` bounds |lambda|, by 0.1 by default; not used with `flow_target` or `static_lambda`. lambda* reaches
  0.5 on short completions, where the unbounded rule destroys the reward. 1 is the literal paper.
- `flow_shape: additive` adds mu H_t to the objective instead of rescaling advantages, on the completions that
  `flow_rows` names: an entropy bonus whose coefficient is solved for,

      mu = (wanted flow - natural flow) / sum_t D_t S_t,   D_t = log p_t + H_t

  Its gradient is that of advantages changed by -mu D_t, averaged over the token that might have been sampled
  (`flow.entropy_score`), so the flow of D_t predicts it. It acts where the advantage is 0, and never switches learning
  off; wrong answers are left to their punishment. lambda is mu times the root mean square of D: the size of the push,
  where advantages are about 1. It is the default with a target. Right rows without an advantage cost a backward pass
  that GRPO does not need. With a target only a share of them is pushed, as many as keep lambda moderate.
- `flow_target`: hold an entropy instead of always balancing. `EntropyTracker` says what flow the push must have;
  lambda follows from the flow that a unit of it has, between -0.5 and 2 (1 with the paper's weights). It is negative
  only once entropy has come near its target, and never with `flow_sides: floor`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import choice, number
from opefo_trl.controls.target import SCHEDULES, EntropyTarget, FirstEntropy
from opefo_trl.controls.tracker import EntropyTracker
from opefo_trl.flow import SIDES, FlowTotals, balance, entropy_score, flow_weights
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
_SHAPES = ("sign", "additive")
_ROWS = ("right", "advantaged", "all")
# Bounds of lambda in a run with a target. The paper's weights 1 +- lambda must not change sign.
_LAMBDA_MIN = -0.5
_LAMBDA_MAX = {"sign": 1.0, "additive": 2.0}
_MODERATE = 0.3  # lambda, on average over some steps: it leaves room for a push that is six times as strong
_SMOOTHING = 0.8  # of lambda, and of what a push does, which scatter with the batch
_LONG_BOUNDED = 20  # steps in a row; a push that reaches its target is cut for a few steps at a time
_LEAST_SHARE = 0.2  # of right rows without an advantage
_SHARE_FALLS, _SHARE_RISES = 0.8, 2.0  # at most, a step: too few rows let entropy sink, too many only cost time


class OPEFO(Control):
    """
    Rescales or pushes tokens so that their entropy flow balances, or holds a target.

    Args:
        sides (`str`): rescale `both` groups (the paper), or only the tokens that `increase` or `decrease` entropy.
        static_lambda (`float`, *optional*): a constant lambda in [-1, 1] instead of lambda*, the paper's ablation.
        flow_lambda_max, flow_target, flow_schedule, flow_shape, flow_rows, flow_sides: see `OPEFOConfig`.
    """

    by_row = keeps_zeros = True  # each token has a factor or a bonus of its own; `pushes` marks completions

    def __init__(
        self,
        *,
        sides: str = "both",
        static_lambda: float | None = None,
        flow_lambda_max: float = 0.1,
        flow_target: float | str | None = None,
        flow_schedule: str = "constant",
        flow_shape: str | None = None,
        flow_rows: str = "right",
        flow_sides: str = "both",
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
        if flow_shape == "additive":
            for name, value, default in (("sides", sides, "both"), ("static_lambda", static_lambda, None)):
                if value != default:
                    raise ValueError(
                        f"`{name}={value!r}` belongs to the paper's weights, and `flow_shape='additive'` has none. "
                        f"Drop `{name}`, or set `flow_shape='sign'`."
                    )
        plain = sides == "both" and flow_target is not None
        self.shape = flow_shape or ("additive" if plain else "sign")
        self.rows = check_choice("flow_rows", flow_rows, _ROWS)
        self.two_sided = check_choice("flow_sides", flow_sides, ("both", "floor")) == "both"
        check_choice("flow_schedule", flow_schedule, SCHEDULES)
        if flow_schedule != "constant" and flow_target is None:
            raise ValueError(f"`flow_schedule={flow_schedule!r}` moves a target: set `flow_target` as well.")
        self.target = None if flow_target is None else EntropyTarget(flow_target, flow_schedule)
        self.bound = bound
        self.lam: Tensor | float = static_lambda or 0.0
        self.mu: Tensor | float = 0.0
        self.first = FirstEntropy()  # kept without a target too: a resumed run may set one
        self.tracker = EntropyTracker()
        self.target_now: float | None = None
        self.bounded = False  # whether the last lambda of a run with a target was cut at its bound
        self._bounded_for = 0  # steps in a row
        self._adapts_share = self.target is not None and self.rows == "right"
        self.flat_share = _LEAST_SHARE if self._adapts_share else 1.0
        self._needed = 0.0  # average lambda of the last steps
        self._push = (0.0, 0.0, 0.0)  # flow, squares and tokens of a unit of push, averaged over the last steps
        self._wanted = 0.0  # flow of the push, per token, that this step should have
        # The last update: natural flow, lambda and its reach, learning rate and momentum; None once it is recorded
        self._update: tuple[float, float, float, float, float] | None = None
        self._step = -1  # the last that was observed
        self._measured: FlowTotals | None = None  # the last totals that were measured

    @property
    def shapes_tokens(self) -> bool:
        return self.static_lambda != 0 and self.shape == "sign"

    @property
    def needs_totals(self) -> bool:
        return self.static_lambda is None

    @property
    def idle_fields(self) -> dict[str, str]:
        idle = {}
        if self.static_lambda is not None:
            idle["flow_lambda_max"] = "`static_lambda` is set"
        elif self.target is not None:
            idle["flow_lambda_max"] = "`flow_target` is set, whose lambda has its own bounds"
        if self.shape != "additive":
            idle["flow_rows"] = f"`flow_shape={self.shape!r}` rescales every row that has an advantage"
        if self.target is None:
            idle["flow_sides"] = "without `flow_target` there is nothing to hold"
        return idle

    @property
    def trained_zeros(self) -> str | None:
        return {"right": "right", "all": "any"}.get(self.rows) if self.shape == "additive" else None

    @property
    def makes_push(self) -> bool:
        return self.shape == "additive"

    def pushes(self, advantages: Tensor, right: Tensor) -> Tensor | None:
        if self.shape != "additive":
            return None
        if self.rows == "all":
            return torch.ones_like(advantages, dtype=torch.bool)
        if self.rows == "advantaged":
            return advantages > 0
        return right.bool()

    def push(self, logps: Tensor, entropies: Tensor) -> Tensor | None:
        return entropy_score(logps, entropies) if self.shape == "additive" else None

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        if self.target is not None:
            self._hold(totals, self.target, step, max_steps)
        else:
            self.first.record(totals.entropy)
            if self.static_lambda is None:
                self.lam = self._balancing(totals).clamp(-self.bound, self.bound)
            self.mu = self.lam / totals.push_size.clamp(min=1e-6)

    def _balancing(self, totals: FlowTotals) -> Tensor:
        """Return the lambda at which the predicted net flow is 0."""
        if self.shape == "sign":
            return balance(totals)
        return torch.where(totals.hold > 0, -totals.net * totals.push_size / totals.hold, 0.0)

    def _hold(self, totals: FlowTotals, target: EntropyTarget, step: int, max_steps: int) -> None:
        """Set the lambda that moves entropy to its target; the step's one transfer to the host."""
        totals = totals.on_host
        tokens = max(1.0, totals.tokens.item())
        entropy, natural = totals.entropy.item(), totals.net.item() / tokens
        new_step, new_totals = step != self._step, totals is not self._measured
        self._step, self._measured = step, totals
        if new_totals:  # several updates on one rollout measure it once
            self._learn_push(totals)
        reach = self._flow_of_unit_lambda(totals) / tokens
        if new_step:
            if self.delayed is None:
                self._record_update()
            if new_totals:
                self.tracker.measure(entropy)
            if self.delayed == "entropy":  # which is from before the last update
                self._record_update()
            elif self.delayed == "totals":  # of which these are the flows
                self._record_update(natural, reach)
            self._wanted = self._wanted_flow(entropy, natural, target, step, max_steps)
        wanted = self._wanted / reach if reach > 0 else 0.0
        low = _LAMBDA_MIN if self.tracker.engaged else 0.0
        self.lam = lam = min(max(wanted, low), _LAMBDA_MAX[self.shape])
        self.mu = self.lam / self._push_size
        self.bounded = self.tracker.engaged and self.lam != wanted
        if new_step:
            self._warn_of_a_bound(entropy)
            self._update = natural, lam, reach, self.learning_rate, self.momentum
            if self._adapts_share and new_totals:  # the rows of a rollout are chosen once
                self._adapt_share(self.lam, self.bounded or (reach <= 0 and self._wanted != 0))

    def _warn_of_a_bound(self, entropy: float) -> None:
        """Warn when lambda has been cut for long: a push that cannot reach its target only costs reward."""
        self._bounded_for = self._bounded_for + 1 if self.bounded else 0
        if self._bounded_for == _LONG_BOUNDED:
            warnings.warn(
                f"lambda has been at its bound ({self.lam:g}) for {_LONG_BOUNDED} steps in a row, and entropy is "
                f"{entropy:.3g} nats, with a target of {self.target_now:.3g}. If it does not come nearer, the target "
                "is out of reach: set `flow_target` nearer to the entropy, or `flow_rows='all'`, which pushes more.",
                UserWarning,
                stacklevel=2,
            )

    def _record_update(self, natural: float | None = None, reach: float = 0.0) -> None:
        """Tell the tracker of the last update, unless it was skipped; without arguments by its predicted flows."""
        if self._update is not None and self.updated:
            predicted, lam, predicted_reach, rate, momentum = self._update
            flows = (predicted, lam * predicted_reach) if natural is None else (natural, lam * reach)
            self.tracker.record_update(*flows, rate, momentum)
        self._update = None

    def _adapt_share(self, lam: float, too_few: bool) -> None:
        """Push more of the right rows without an advantage if they were too few for the wanted flow or lambda is large
        over several steps, and else fewer."""
        self._needed = _SMOOTHING * self._needed + (1 - _SMOOTHING) * lam
        change = _SHARE_RISES if too_few else min(max(abs(self._needed) / _MODERATE, _SHARE_FALLS), _SHARE_RISES)
        self.flat_share = min(max(self.flat_share * change, _LEAST_SHARE), 1.0)

    def _wanted_flow(self, entropy: float, natural: float, target: EntropyTarget, step: int, max_steps: int) -> float:
        first = self.first.record(torch.tensor(entropy, dtype=torch.float64))
        self.target_now = target.at(first, step, max_steps).item()
        slope = target.at(first, step + 1, max_steps).item() - self.target_now
        wanted = self.tracker.aim(natural, self.target_now, slope, self.learning_rate, self.momentum)
        if wanted is None:  # far above the target, or nothing is known yet
            wanted = -natural if entropy < self.target_now else 0.0
        return wanted if self.two_sided else max(wanted, 0.0)

    def _learn_push(self, totals: FlowTotals) -> None:
        """Average what a push does to a token over some steps: in one batch its estimate scatters by half, and the
        gradient of the entropy does not."""
        tokens = totals.pushed.item()
        if tokens:  # the average of nothing says nothing
            now = totals.hold.item(), totals.push_size.item() ** 2 * tokens, tokens
            flow, squares, count = (_SMOOTHING * last + new for last, new in zip(self._push, now, strict=True))
            self._push = flow, squares, count

    @property
    def _push_size(self) -> float:
        _, squares, tokens = self._push
        return max(math.sqrt(squares / max(tokens, 1)), 1e-6)

    def _flow_of_unit_lambda(self, totals: FlowTotals) -> float:
        """Return the summed flow that lambda = 1 adds."""
        if self.shape == "additive":
            flow, _, tokens = self._push
            return flow / max(tokens, 1) / self._push_size * totals.pushed.item()
        increase, decrease = totals.increase.item(), totals.decrease.item()
        return {"both": increase + decrease, "increase": increase, "decrease": decrease}[self.sides]

    def advantages(self, tokens: Tokens) -> Tensor:
        if not self.shapes_tokens:
            return tokens.advantages
        return tokens.advantages * flow_weights(tokens.flow, self.lam, self.sides)

    def penalty(self, tokens: Tokens) -> Tensor | None:
        idle = isinstance(self.mu, float) and self.mu == 0  # a tensor would have to be waited for
        if self.shape != "additive" or tokens.pushed is None or idle:
            return None
        return -self.mu * torch.where(tokens.pushed & tokens.entropies.isfinite(), tokens.entropies, 0.0)

    def metrics(self) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {"flow/lambda": self.lam}
        if self.target_now is not None:
            metrics |= {
                "flow/target": self.target_now,
                "flow/estimate": self.tracker.entropy,
                "flow/bounded": float(self.bounded),
            }
        return metrics

    def state_dict(self) -> dict[str, Any]:
        push = {"flat_share": self.flat_share, "needed": self._needed, "push": self._push, "update": self._update}
        return {"anchor": self.first.state(), "tracker": self.tracker.state_dict(), **push}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first.load(state["anchor"])
        if "tracker" in state:
            self.tracker.load_state_dict(state["tracker"])
            self._push, update = tuple(state["push"]), state.get("update")
            self._update = update and tuple(update)
            if self._adapts_share:
                self.flat_share, self._needed = state["flat_share"], state["needed"]
        elif self.target is not None:
            warnings.warn(
                "The checkpoint was written by a version that held its target by another rule. The run goes on from "
                "it, and learns anew how far its updates move entropy: expect some steps off the target.",
                UserWarning,
                stacklevel=2,
            )
