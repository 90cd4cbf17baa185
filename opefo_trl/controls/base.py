"""The protocol of entropy controls.

A control observes flow totals, once per optimizer step (in scope `micro` once per micro-batch), and then changes the
inputs of TRL's own loss: advantages, clip range, a term for each token. It never computes a loss of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opefo_trl.flow import FlowTotals


@dataclass(frozen=True)
class Tokens:
    """
    A micro-batch as a control sees it.

    Attributes:
        logps, entropies (`Tensor`): log-probabilities of the sampled tokens and entropies, under the live policy, with
            gradient except in dropped rows, (B, T).
        advantages (`Tensor`): (B, 1).
        mask (`Tensor`): 1 on the trained tokens, (B, T).
        old_logps (`Tensor`): log-probabilities under the policy that generated the batch, computed by the trainer, not
            by vLLM, (B, T).
        flow (`Tensor`): `flow.token_flow` of each token, detached, (B, T).
        solved (`Tensor`, *optional*): share of the group's completions with a reward above 0.5, (B, 1).
        pushed (`Tensor`, *optional*): whether `Control.pushes` marked the completion, (B, 1).
    """

    logps: Tensor
    entropies: Tensor
    advantages: Tensor
    mask: Tensor
    old_logps: Tensor
    flow: Tensor
    solved: Tensor | None = None
    pushed: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """pi / pi_old, detached, (B, T); 1 strictly on-policy."""
        return (self.logps.detach() - self.old_logps).exp()


# Flag -> the methods that it describes
_DESCRIBED_METHODS = {"by_row": ("advantages", "clip_range", "penalty"), "keeps_zeros": ("advantages", "penalty")}


class Control:
    """
    Base of every entropy control; by itself it changes nothing.

    Keyword arguments of a subclass' constructor are its options: those named in `options.CONTROL_FIELDS` and
    `options.RUN_FIELDS` are filled from the configuration, all others from `control_kwargs`.

    Attributes:
        by_row (`bool`): whether the result for a completion is independent of the others in its micro-batch, so that
            rows may be regrouped.
        keeps_zeros (`bool`): whether a completion with advantage 0 still contributes nothing after this control (no
            advantage, no penalty), so that its backward pass may be skipped, unless `pushes` marks it.
        acts_on_policy (`bool`): whether it has an effect strictly on-policy, where every ratio is 1.
        unclipped (`bool`): whether it takes the place of the loss' clipping, and of TRL's `delta` with it.
        estimator (`str`, *optional*): the `flow_estimator` that it requires, whatever the configuration says.
        presets (`dict[str, Any]`): fields of `GRPOConfig` to set, for a control that TRL itself implements.
        learning_rate (`float`): of the coming update; set by the trainer before `observe`.
        momentum (`float`): decay of the optimizer's first moment, 0 without one; set by the trainer before `observe`.
        delayed (`str`, *optional*): what `observe` gets of the previous step, from before the last update: all
            `"totals"`, or only their `"entropy"`; set by the trainer before `observe`.
        updated (`bool`): whether the last update was made, and not skipped; set by the trainer before `observe`.
        source (`str`, *optional*): a clause for `OPEFOConfig`'s warning: which parts of formula and defaults are
            second-hand or our choice. None for a verified control.
        flat_share (`float`): in scope `batch`, which share of the completions that `pushes` marks although their
            advantage is 0 is pushed; read once for each rollout.
    """

    by_row = True
    keeps_zeros = True
    acts_on_policy = True
    unclipped = False
    estimator: str | None = None
    presets: dict[str, Any] = {}
    source: str | None = None
    learning_rate = momentum = 0.0
    delayed: str | None = None
    updated = True
    flat_share = 1.0

    def __init_subclass__(cls, **keywords: Any):
        """Set `by_row`/`keeps_zeros` to False when a subclass overrides a method they describe and does not declare
        them again."""
        super().__init_subclass__(**keywords)
        for flag, methods in _DESCRIBED_METHODS.items():
            if any(_mro_position(cls, method) < _mro_position(cls, flag) for method in methods):
                setattr(cls, flag, False)

    @property
    def needs_totals(self) -> bool:
        """Return whether, in scope `batch`, the rollout's flow must be measured before training on it."""
        return self._overrides("observe")

    @property
    def shapes_tokens(self) -> bool:
        """Return whether `advantages` may differ between the tokens of a completion."""
        return self._overrides("advantages")

    @property
    def uses_clip_range(self) -> bool:
        """Return whether it changes the clip range of the loss."""
        return self._overrides("clip_range") or not {"epsilon", "epsilon_high"}.isdisjoint(self.presets)

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Control, name)

    @property
    def idle_fields(self) -> dict[str, str]:
        """Config fields without effect under the current options, mapped to the reason."""
        return {}

    @property
    def makes_push(self) -> bool:
        """Return whether `push` returns a change whose flow is to be summed."""
        return self._overrides("push")

    @property
    def trained_zeros(self) -> str | None:
        """Return which completions with advantage 0 `pushes` marks, which are then trained: `"right"` ones, `"any"`,
        so that no row can be dropped, or None."""
        return None

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        """Update coefficients from flow totals: over all ranks, once per step; in scope `micro` over this rank's
        micro-batch, once each. Avoid host synchronisation: `totals.on_host` transfers once, and serves the log too."""

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return the advantages that the loss uses, (B, 1) or (B, T)."""
        return tokens.advantages

    def pushes(self, advantages: Tensor, right: Tensor) -> Tensor | None:
        """
        Return the completions that the control acts on whatever their advantage, (B, 1); None if there are none.

        Called once for each rollout, before its flow is measured.

        Args:
            advantages (`Tensor`): the completions' advantages, (B, 1).
            right (`Tensor`): whether the reward is above 0.5 or, if that is so for none of the rollout, the advantage
                is above 0, (B, 1).
        """
        return None

    def push(self, logps: Tensor, entropies: Tensor) -> Tensor | None:
        """Return the change of the advantages that a penalty amounts to, on average over the tokens that might have
        been sampled, per unit of its coefficient, (B, T). Its predicted flow is summed over the completions that
        `pushes` marks (`FlowTotals.hold`). None if the control makes no push."""
        return None

    def clip_range(self, tokens: Tokens) -> tuple[Tensor | float, Tensor | float] | None:
        """Return (epsilon_low, epsilon_high) for this micro-batch, numbers or (B, T); None keeps TRL's."""
        return None

    def penalty(self, tokens: Tokens) -> Tensor | None:
        """Return a term for each token, (B, T), whose mean over the step's tokens is added to the loss; or None."""
        return None

    def metrics(self) -> dict[str, Tensor | float]:
        """Return numbers to log. Names without a slash are logged under `control/`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def _mro_position(cls: type, name: str) -> int:
    """Return the position, in the method resolution order, of the first class that defines `name`."""
    return next(distance for distance, base in enumerate(cls.__mro__) if name in vars(base))
