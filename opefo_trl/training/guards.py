"""Guards against a run that goes wrong without an error: NaN and infinity on their way to the optimizer, stale
weights in vLLM, an entropy that has collapsed.

`StepGuard` decides once per optimizer step whether to stop, to skip, or to go on; `DriftGuard` checks every rollout,
`CollapseGuard` every step's entropy. They raise, or return a warning for the trainer to log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from opefo_trl.config import OPEFOConfig
    from opefo_trl.controls import Tokens

__all__ = ["NonFiniteError", "StaleWeightsError"]

_SKIPS_IN_A_ROW = 10
_DRIFTS_IN_A_ROW = 5
_PLAIN: dict[str, tuple[Any, ...]] = {  # values at which vLLM samples from the policy itself
    **{"top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0), "repetition_penalty": (None, 1)},
    **{"generation_kwargs": (None, {}), "vllm_structured_outputs_regex": (None,)},
}
_COLLAPSED = 0.005  # nats; near 0.0004 vLLM's log-probabilities become NaN


class NonFiniteError(RuntimeError):
    """A loss, gradient or reward is NaN or infinite, and the update was not taken."""


class StaleWeightsError(RuntimeError):
    """vLLM samples from another policy than the one being trained."""


# ---- losses and gradients


@dataclass
class MicroBatchRecord:
    """Detached tensors of one micro-batch, kept until the optimizer step to report what went wrong in it."""

    inputs: dict[str, Any]  # tensors of TRL's buffer
    tensors: dict[str, Tensor]  # name -> (B, T) or (B, 1)
    mask: Tensor  # (B, T)
    loss: Tensor

    def __post_init__(self) -> None:
        """Drop tensors that are all finite, which would only cost memory. TRL's loss has just waited for the device,
        so asking it again costs no time."""
        finite = [(tensor.isfinite() | ~self.mask.bool()).all() for tensor in self.tensors.values()]
        if torch.stack([self.loss.isfinite(), *finite]).all():
            self.tensors = {}

    @classmethod
    def of(cls, batch: dict[str, Any], tokens: Tokens, loss: Tensor) -> MicroBatchRecord:
        """Record a micro-batch after TRL's loss."""
        tensors = {
            "log-probabilities": tokens.logps,
            "entropies": tokens.entropies,
            "advantages": batch["advantages"],
            "reference log-probabilities": batch.get("ref_per_token_logps"),
            "old log-probabilities": batch.get("old_per_token_logps"),
            "importance-sampling ratios": batch.get("importance_sampling_ratio"),
        }
        detached = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        inputs = {name: batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        return cls(inputs, detached, tokens.mask, loss.detach())

    def bad_rows(self) -> dict[str, Tensor]:
        """Return the tensors with a non-finite value on a trained token, each with its rows, (rows,)."""
        rows = {}
        for name, tensor in self.tensors.items():
            bad = (~tensor.isfinite() & self.mask.bool()).any(dim=1)
            if bad.any():
                rows[name] = bad.nonzero().squeeze(1)
        return rows


@dataclass
class _Mean:
    """A running mean; NaN while it is empty."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class StepNumbers:
    """Loss (mean over ranks) and gradient norm of a step, and the reason if it is skipped."""

    loss: float
    grad_norm: float | None
    problem: str | None


@dataclass
class StepGuard:
    """
    Checks every optimizer step before it is taken, counts skipped steps, and raises after too many in a row.

    Args:
        policy (`str`): `"stop"` or `"skip"`.
        folder (`Path`): where to dump the rows of a step that is not finite.
        decode (`Callable`): token ids to text, for the dump.
        updates_in_backward (`bool`): whether parameters change before a gradient can be checked.
    """

    policy: str
    folder: Path
    decode: Callable[[Tensor], str]
    updates_in_backward: bool = False
    window: list[MicroBatchRecord] = field(default_factory=list)  # micro-batches of the step under way
    skipped: int = 0
    in_a_row: int = 0
    taken: _Mean = field(default_factory=_Mean)  # loss of the steps taken in this run
    taken_since_log: _Mean = field(default_factory=_Mean)
    skipped_since_log: int = 0

    def check(
        self, loss: Tensor, grad_norm: Any, accelerator: Accelerator, step: int, reward_is_bad: bool
    ) -> StepNumbers:
        """Check that loss and gradient norm are finite on every rank. If not, raise (`policy="stop"`) or count the
        step as skipped ("skip"; the caller zeroes the gradient)."""
        if hasattr(grad_norm, "full_tensor"):  # FSDP2
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=loss.device)
        ranks = accelerator.gather(torch.stack([loss.float(), norm.float()]).unsqueeze(0)).tolist()
        mean_loss = sum(rank_loss for rank_loss, _ in ranks) / len(ranks)
        problem = self.inspect(ranks, accelerator.process_index, step)
        if problem is None and reward_is_bad:
            problem = f"Step {step}: a reward was NaN or infinite."
        if problem is None:
            self.passed(mean_loss)
        elif self.updates_in_backward and grad_norm is not None:
            raise NonFiniteError(
                f"{problem} DeepSpeed and layer-wise optimizers have taken the update by now: go back to the last "
                "checkpoint."
            )
        else:
            self.failed(problem)
        return StepNumbers(mean_loss, None if grad_norm is None else ranks[0][1], problem)

    def inspect(self, ranks: list[list[float]], rank: int, step: int) -> str | None:
        """
        Describe what is not finite in a step and dump this rank's rows that are to blame; None if all is finite.

        `ranks` holds [loss, gradient norm] of every rank.
        """
        # One rank's NaN loss is in every rank's gradient by now: blame the loss where there is one.
        bad = [number for number, (loss, _) in enumerate(ranks) if not math.isfinite(loss)]
        bad = bad or [number for number, (_, norm) in enumerate(ranks) if not math.isfinite(norm)]
        if not bad:
            return None
        message = f"Step {step}: not finite on rank {', '.join(map(str, bad))}."
        if rank in bad:
            culprits = describe(self.window) or f"gradient norm {ranks[rank][1]}"
            path = self.folder / f"step-{step}-rank-{rank}.json"
            try:
                _dump_rows(path, self.window, self.decode, step=step, rank=rank, what=culprits)
                message += f" On rank {rank}: {culprits}; the rows are in {path}."
            except OSError as error:  # a full disk must not make this rank decide otherwise than the others
                message += f" On rank {rank}: {culprits}; {path} could not be written ({error})."
        return message

    def passed(self, loss: float) -> None:
        """Record a step that is taken."""
        self.in_a_row = 0
        self.taken.add(loss)
        self.taken_since_log.add(loss)

    def failed(self, message: str) -> None:
        """Raise `NonFiniteError` if `policy="stop"` or after too many skips in a row, else count a skip."""
        if self.policy == "stop":
            advice = "" if self.updates_in_backward else " Set `nonfinite='skip'` to leave such steps out and go on."
            raise NonFiniteError(f"{message} No parameter was updated.{advice}")
        self.skipped += 1
        self.skipped_since_log += 1
        self.in_a_row += 1
        if self.in_a_row >= _SKIPS_IN_A_ROW:
            raise NonFiniteError(f"{message} It is the {self.in_a_row}th step in a row that had to be skipped.")

    def logged_loss(self, loss: float) -> float:
        """Return `loss`, or the mean over the steps taken since the last log if one was skipped (NaN without any)."""
        if self.skipped_since_log:
            loss = self.taken_since_log.value
        self.taken_since_log = _Mean()
        self.skipped_since_log = 0
        return loss

    def final_loss(self, loss: float) -> float:
        """Return `loss`, or the mean over the steps taken if a step of this run was skipped."""
        return self.taken.value if self.skipped else loss

    def correct_losses(self, logs: dict[str, float]) -> dict[str, float]:
        """Correct the losses that the Trainer is about to log: it counts a skipped step as a loss of 0."""
        if "loss" in logs:
            logs["loss"] = self.logged_loss(logs["loss"])
        if "train_loss" in logs:
            logs["train_loss"] = self.final_loss(logs["train_loss"])
        return logs

    def state_dict(self) -> dict[str, Any]:
        taken = {"total": self.taken.total, "count": self.taken.count}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "taken": taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.taken = state["skipped"], state["in_a_row"], _Mean(**state["taken"])


def describe(window: list[MicroBatchRecord]) -> str:
    """Name the tensors that are not finite, with rows and micro-batch; return nothing if all are finite."""
    faults = []
    for number, record in enumerate(window):
        bad_rows = record.bad_rows()
        faults += [f"{name} of rows {rows.tolist()} in micro-batch {number}" for name, rows in bad_rows.items()]
        if not bad_rows and not record.loss.isfinite():
            faults.append(f"loss of micro-batch {number}")
    return "; ".join(faults)


def _dump_rows(path: Path, window: list[MicroBatchRecord], decode: Callable[[Tensor], str], **context: Any) -> None:
    """Write the rows with a non-finite value as readable JSON; all rows if no single one is to blame."""
    bad_rows = [{row for rows in record.bad_rows().values() for row in rows.tolist()} for record in window]
    if not any(bad_rows):
        bad_rows = [set(range(record.mask.size(0))) for record in window]
    rows = [
        {"micro_batch": number, "row": row, **_readable_row(record, row, decode)}
        for number, (record, chosen) in enumerate(zip(window, bad_rows, strict=True))
        for row in sorted(chosen)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**context, "rows": rows}, indent=2, ensure_ascii=False, default=str)
    path.write_text(text, encoding="utf-8")


def _readable_row(record: MicroBatchRecord, row: int, decode: Callable[[Tensor], str]) -> dict[str, Any]:
    inputs, mask = record.inputs, record.mask[row].bool()
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    completion = inputs["completion_ids"][row][mask]
    return {
        "prompt": decode(prompt),
        "completion": decode(completion),
        "prompt_ids": prompt.tolist(),
        "completion_ids": completion.tolist(),
        "loss": _readable(record.loss.item()),
        **{
            name: [_readable(value) for value in tensor[row].expand(mask.shape)[mask].tolist()]
            for name, tensor in record.tensors.items()
        },
    }


def _readable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


# ---- stale weights, collapsed entropy


@dataclass
class DriftGuard:
    """
    Warns when vLLM's log-probabilities are far from the policy's, and raises after five such rollouts in a row.

    Args:
        limit (`float`, *optional*): largest mean absolute difference, in nats, that counts as rounding; None disables
            the check.
        altered (`str`): what samples, and reports, another distribution than the policy's on purpose: vLLM with some
            options, or a rollout function. The difference is no fault: it is warned of once, and never raised.
    """

    limit: float | None
    altered: str = ""
    in_a_row: int = 0
    warned: bool = False

    @classmethod
    def of(cls, args: OPEFOConfig) -> DriftGuard:
        """Make the guard of a run."""
        changed = [
            f"`{name}={getattr(args, name)}`" for name, none in _PLAIN.items() if getattr(args, name) not in none
        ]
        if not args.use_vllm:
            return cls(args.sampling_drift_max, "your `rollout_func`")
        return cls(args.sampling_drift_max, f"vLLM with {' and '.join(changed)}" if changed else "")

    def check(self, drift: float, step: int) -> str | None:
        """Check TRL's `sampling/sampling_logp_difference/mean` of one rollout; return a warning, if any."""
        if self.limit is None or not drift > self.limit:  # NaN comes from the policy, and is StepGuard's to find
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        message = (
            f"Step {step}: the sampler's log-probabilities are {drift:.3g} nats from the policy's on average, more "
            f"than `sampling_drift_max={self.limit:g}`."
        )
        if self.altered:
            explained = f"{message} They are those of {self.altered}, so that stale weights would "
            first, self.warned = not self.warned, True
            return f"{explained}not be noticed. Raise `sampling_drift_max`." if first else None
        if self.in_a_row < _DRIFTS_IN_A_ROW:
            return message
        raise StaleWeightsError(
            f"{message} It is the {self.in_a_row}th rollout in a row. Likely causes: the weights do not reach vLLM "
            "(sleep mode, an adapter that is not merged, a server that was restarted or serves another model), or "
            "they are served in another precision than they train in. If the difference is intended (a quantised "
            "server), raise `sampling_drift_max`, or set it to None."
        )


@dataclass
class CollapseGuard:
    """Warns once when entropy is nearly zero, and again only after it has recovered."""

    warned: bool = False

    def check(self, entropy: float, step: int) -> str | None:
        """Check the entropy of one step; return a warning, if any."""
        if self.warned or not entropy < _COLLAPSED:
            self.warned = self.warned and not entropy > 2 * _COLLAPSED
            return None
        self.warned = True
        return (
            f"Step {step}: entropy is {entropy:.2g} nats: the policy is nearly deterministic. The completions of a "
            "group are alike, so there is little left to learn from, and below 0.0004 vLLM returns NaN. Set a "
            "`flow_target`, lower `learning_rate`, or go back to an earlier checkpoint."
        )
