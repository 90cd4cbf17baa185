"""Choice of the transforms of exact micro-batching that leave the gradient of a run as it is.

In strictly on-policy runs all rows of a rollout share one update, so it does not matter which of them share a forward:

- **trim**: a micro-batch is as wide as its own longest completion, not the rollout's, and, if positions are relative
  (`trim_prompts`), as its own longest prompt;
- **regroup**: rows of similar length share a micro-batch, in as many micro-batches as before, none of them larger in
  memory than TRL's;
- **drop**: rows that cannot contribute gradient (advantage 0, or no trained token) skip the backward, except the few
  needed to keep a micro-batch non-empty. They still count in every metric; if no scoring pass covered them, they run
  one forward without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opefo_trl.config import OPEFOConfig
    from opefo_trl.controls import Control

_ACTIVE = {"trim": "trims padding", "regroup": "regroups rows by length", "drop": "drops zero-advantage rows"}


@dataclass(frozen=True)
class BatchTransforms:
    """The transforms that are exact for a run; `reasons` maps each of the others to the reason why it is off."""

    trim: bool
    trim_prompts: bool
    regroup: bool
    drop: bool
    reasons: dict[str, str] = field(default_factory=dict)
    keep_right: bool = False  # rows of right answers may be marked, and are then not dropped

    @classmethod
    def for_run(cls, args: OPEFOConfig, control: Control, positions: str, aux_loss: bool = False) -> BatchTransforms:
        """
        Choose the transforms for a run.

        Args:
            args (`OPEFOConfig`): settings of the loss and of the flow.
            control (`Control`): the run's entropy control.
            positions (`str`): `positions_of` the model's config.
            aux_loss (`bool`): whether the loss has a router's auxiliary loss.
        """
        if args.micro_batching == "trl":
            return cls.none()
        if positions == "by length":
            return cls.none("the model's rotary embedding changes with the width of the batch")
        couples_rows = _rows_depend_on_each_other(args, control, aux_loss)
        reasons = {
            "regroup": couples_rows or _averages_by_tokens(args) or _sets_lambda_by_micro_batch(args, control),
            "drop": couples_rows or _trains_without_advantage(args, control),
            "trim prompts": None if positions == "relative" else "the model's positions are absolute, or may be",
        }
        return cls(
            trim=True,
            trim_prompts=reasons["trim prompts"] is None,
            regroup=reasons["regroup"] is None,
            drop=reasons["drop"] is None,
            reasons={name: reason for name, reason in reasons.items() if reason is not None},
            keep_right=control.trained_zeros == "right",
        )

    @classmethod
    def none(cls, reason: str | None = None) -> BatchTransforms:
        """Return transforms that are all off; `reason` is recorded for each."""
        reasons = {} if reason is None else dict.fromkeys(_ACTIVE, reason)
        return cls(False, False, False, False, reasons)

    def __str__(self) -> str:
        active = [words + self._exception(name) for name, words in _ACTIVE.items() if getattr(self, name)]
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            names_by_reason.setdefault(reason, []).append(name)
        inactive = [f"It does not {' or '.join(names)}, since {reason}." for reason, names in names_by_reason.items()]
        return " ".join([f"Exact micro-batching {', '.join(active) or 'changes nothing'}.", *inactive])

    def _exception(self, name: str) -> str:
        return " but those of right answers that the control trains on" if name == "drop" and self.keep_right else ""


def positions_of(config: Any) -> str:
    """Return 'relative' (plain RoPE), 'absolute' (learned, or anything that reads a token's index), or 'by length'
    (RoPE whose frequencies depend on sequence length: dynamic, longrope)."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return "absolute"
    layers = [rope] if "rope_type" in rope else [layer for layer in rope.values() if layer]  # None: without positions
    if {layer.get("rope_type") for layer in layers} & {"dynamic", "longrope"}:
        return "by length"
    # Llama 4 and similar models scale attention by the index of a token, DeepSeek V4 pools windows of tokens
    by_index = ("attn_temperature_tuning", "compress_rates")
    scaled = any("llama_4_scaling_beta" in layer for layer in layers)
    return "absolute" if scaled or any(getattr(text, name, None) for name in by_index) else "relative"


# Each of the following returns the reason why a transform is not exact, or None.


def _rows_depend_on_each_other(args: OPEFOConfig, control: Control, aux_loss: bool) -> str | None:
    if args.entropy_coef or args.use_adaptive_entropy:
        return "the entropy bonus is a mean over each micro-batch"
    if args.top_entropy_quantile < 1:
        return f"`top_entropy_quantile={args.top_entropy_quantile}` ranks the tokens of each micro-batch"
    if aux_loss:
        return "the router's auxiliary loss is computed for each micro-batch"
    if args.estimator_of(control) == "covariance" and args.measuring(control) != "ahead":
        return "`flow_estimator='covariance'` takes its means over the rows of each micro-batch here"
    if not control.by_row:
        return f"`control={args.control!r}` does not declare (`by_row = True`) that it treats each row by itself"
    return None


def _averages_by_tokens(args: OPEFOConfig) -> str | None:
    return "`loss_type='bnpo'` divides by the tokens of each micro-batch" if args.loss_type == "bnpo" else None


def _sets_lambda_by_micro_batch(args: OPEFOConfig, control: Control) -> str | None:
    if args.flow_scope == "micro" and control.needs_totals:
        return "`flow_scope='micro'` sets lambda for each micro-batch"
    return None


def _trains_without_advantage(args: OPEFOConfig, control: Control) -> str | None:
    if args.beta:
        return f"`beta={args.beta}` pulls every row to the reference model"
    if control.trained_zeros == "any":
        return f"`control={args.control!r}` trains on every row here"
    if not control.keeps_zeros:
        return f"`control={args.control!r}` does not declare (`keeps_zeros = True`) that advantage 0 stays 0"
    return None
