"""What an entropy control is: something that looks at a batch's flow totals once per optimizer step, and then shapes
what TRL's own loss sees. It never computes a loss of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opefo_trl.flow import FlowTotals


@dataclass(frozen=True)
class Tokens:
    """
    One micro-batch as a control sees it.

    Attributes:
        logps (`Tensor`): log-probabilities of the sampled tokens under the live policy, with gradient, (B, T).
        entropies (`Tensor`): entropies of the live policy, with gradient, (B, T).
        advantages (`Tensor`): (B, 1).
        mask (`Tensor`): 1 on the tokens that train, (B, T).
        old_logps (`Tensor`): log-probabilities when the batch was generated, (B, T).
        flow (`Tensor`): `flow.token_flow` of each token, detached, (B, T).
        solved (`Tensor`, *optional*): share of right answers to the completion's question, (B, 1).
    """

    logps: Tensor
    entropies: Tensor
    advantages: Tensor
    mask: Tensor
    old_logps: Tensor
    flow: Tensor
    solved: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """pi / pi_old, detached, (B, T); 1 strictly on-policy."""
        return (self.logps.detach() - self.old_logps).exp()


# What a control may say of itself, and the methods that it is said of
PROMISES = {"by_row": ("advantages", "clip_range", "penalty"), "keeps_zeros": ("advantages", "penalty")}


class Control:
    """
    Base of every entropy control; by itself it changes nothing.

    Keyword arguments of a subclass' constructor are its options: those named like an `OPEFOConfig` field
    (`flow_target`, ...) are filled from it, all others from `control_kwargs`.

    Attributes:
        by_row (`bool`): whether a completion gets the same whatever others share its micro-batch, so that they may be
            regrouped.
        keeps_zeros (`bool`): whether a completion of no advantage stays without one, and without a penalty, so that it
            may be dropped.
        acts_on_policy (`bool`): whether it changes anything strictly on-policy, where every ratio is 1.
        estimator (`str`, *optional*): the `flow_estimator` that it needs, whatever the configuration says.
        presets (`dict[str, Any]`): fields of `GRPOConfig` that are this control, which is TRL's own then.
    """

    by_row = True
    keeps_zeros = True
    acts_on_policy = True
    estimator: str | None = None
    presets: dict[str, Any] = {}

    def __init_subclass__(cls, **keywords: Any):
        """What a class says of its methods does not hold for those that a subclass puts in their place."""
        super().__init_subclass__(**keywords)
        for promise, methods in PROMISES.items():
            if any(_definer(cls, method) < _definer(cls, promise) for method in methods):
                setattr(cls, promise, False)

    @property
    def needs_totals(self) -> bool:
        """Whether `observe` must see the totals of a batch before that batch is trained on."""
        return self._overrides("observe")

    @property
    def shapes_tokens(self) -> bool:
        """Whether `advantages` makes a difference between the tokens of a completion."""
        return self._overrides("advantages")

    @property
    def clips(self) -> bool:
        """Whether it lives by the clip range of the loss."""
        return self._overrides("clip_range") or not {"epsilon", "epsilon_high"}.isdisjoint(self.presets)

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Control, name)

    @property
    def idle_fields(self) -> dict[str, str]:
        """`OPEFOConfig` fields among the options that another option makes idle, each with the reason."""
        return {}

    def observe(self, totals: FlowTotals, step: int, max_steps: int) -> None:
        """Fix what holds for the coming optimizer step, from totals over all ranks. Keep tensors on the device."""

    def advantages(self, tokens: Tokens) -> Tensor:
        """The advantages that the loss shall use, (B, 1) or (B, T)."""
        return tokens.advantages

    def clip_range(self, tokens: Tokens) -> tuple[Tensor | float, Tensor | float] | None:
        """(epsilon_low, epsilon_high) for this micro-batch, numbers or (B, T); None keeps TRL's."""
        return None

    def penalty(self, tokens: Tokens) -> Tensor | None:
        """A term for each token, (B, T): the mean over all tokens of the step joins the loss. None adds nothing."""
        return None

    def metrics(self) -> dict[str, Tensor | float]:
        """What to log of the last step. Names without a slash are logged under `control/`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


def _definer(cls: type, name: str) -> int:
    """How far up the first class is that defines a name."""
    return next(distance for distance, base in enumerate(cls.__mro__) if name in vars(base))
