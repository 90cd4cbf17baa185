"""Exact micro-batching of a run: `microbatch`'s plans for a rollout, agreed on by all ranks.

Every rank runs the same number of micro-batches, with and without gradient, whatever rows it has: collectives would
hang otherwise. Their rows differ in number, though, and TRL gathers numbers of rows from all ranks for its metrics:
`Alone` answers for the ranks meanwhile, and `Means` asks them once, at the end of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opefo_trl.training.microbatches import (
    Group,
    Means,
    Parts,
    Widths,
    join,
    loss_share,
    plan,
    take,
    trained_mask,
    widths_of,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

PLACE = "place"  # the key of a micro-batch's `Place` among its tensors


@dataclass
class Place:
    """What a micro-batch is to its optimizer step."""

    rows: int
    tokens: int  # that train, or would with a signal
    share: float = 1.0  # what its loss is multiplied with
    dropped: list[dict[str, Any]] = field(default_factory=list)  # to be measured before it, without gradient


@dataclass
class _Row:
    index: int
    real: int  # tokens that are no padding, the prompt's included
    tokens: int  # of the completion that train
    idle: bool  # it cannot move the policy


class Alone:
    """An accelerator that knows of no other ranks."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str = "mean") -> Tensor:
        return tensor


class Batching:
    """
    Args:
        parts (`Parts`): what may be done.
        loss_type (`str`): TRL's.
        accumulation (`int`): micro-batches of an optimizer step.
        multiple (`int`, *optional*): TRL's `pad_to_multiple_of`.
    """

    def __init__(
        self, parts: Parts, accelerator: Accelerator, loss_type: str, accumulation: int, multiple: int | None
    ):
        self.parts, self.accelerator = parts, accelerator
        self.loss_type, self.accumulation, self.multiple = loss_type, accumulation, multiple

    # ---- forwards without gradient over a whole rollout

    def scoring_groups(self, attention_mask: Tensor, completion: int, batch_size: int) -> list[Group]:
        """As many groups as TRL's chunks of `batch_size` rows, and none larger."""
        rows, width = attention_mask.shape
        prompt = width - completion
        masks = {"prompt_mask": attention_mask[:, :prompt], "completion_mask": attention_mask[:, prompt:]}
        widths = widths_of(masks, self.multiple, self.parts.trim_prompts)
        budget = Group(list(range(batch_size)), prompt, completion)
        return plan(range(rows), widths, math.ceil(rows / batch_size), budget)

    # ---- a rollout

    @property
    def uneven(self) -> bool:
        """Whether micro-batches differ in their number of rows."""
        return self.parts.regroup or self.parts.drop

    def regroup(self, micro_batches: list[dict[str, Any]], means: Means) -> list[dict[str, Any]]:
        """A rollout's micro-batches, as TRL split them, made ours. Rows stay in their optimizer step."""
        size = math.gcd(len(micro_batches), self.accumulation)
        parts = [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]
        return [ours for theirs in parts for ours in self._regroup_step(theirs, means)]

    def _regroup_step(self, theirs: list[dict[str, Any]], means: Means) -> list[dict[str, Any]]:
        batch = join(theirs)
        widths = widths_of(batch, self.multiple, self.parts.trim_prompts)
        rows = _rows_of(batch, self.parts.drop)
        each = len(rows) // len(theirs)
        chunks = [rows[start : start + each] for start in range(0, len(rows), each)]
        budget = Group(list(range(each)), batch["prompt_ids"].size(1), batch["completion_ids"].size(1))

        if self.parts.regroup:
            kept = _kept(rows, len(theirs))
            groups = plan([row.index for row in kept], widths, len(theirs), budget)
            shares = [loss_share(self.loss_type, len(group.rows) / each, 1.0) for group in groups]
        else:
            chosen = [_kept(chunk, 1) for chunk in chunks]
            groups = [widths.group([row.index for row in kept]) for kept in chosen]
            shares = [
                loss_share(self.loss_type, len(kept) / each, _tokens(kept) / _tokens(chunk)) if _tokens(chunk) else 1.0
                for kept, chunk in zip(chosen, chunks, strict=True)
            ]
        trained = {row for group in groups for row in group.rows}
        silent = [row.index for row in rows if row.index not in trained]
        real = sum(rows[index].real for index in trained)
        means.add("batching/padding", sum(group.padded for group in groups) / real, real)
        means.add("batching/skipped_rows", len(silent) / len(rows), len(rows))

        def made(group: Group, share: float = 1.0) -> dict[str, Any]:
            micro_batch = take(batch, group) if group.rows else _nothing(batch)
            tokens = _tokens([rows[index] for index in group.rows])
            return {**micro_batch, PLACE: Place(len(group.rows), tokens, share)}

        ours = [made(group, share) for group, share in zip(groups, shares, strict=True)]
        dropped = self._dropped_groups(silent, widths, budget, "entropies" in batch)
        ours[0][PLACE].dropped = [made(group) for group in dropped]
        return ours

    def _dropped_groups(self, rows: list[int], widths: Widths, budget: Group, measured: bool) -> list[Group]:
        """Groups to measure rows in that do not train: as few as fit, and equally many on every rank."""
        if not self.parts.drop:
            return []
        # Where a scoring pass has measured them, TRL's loss only has its sums to do: no forward, no memory.
        own = min(1, len(rows)) if measured else math.ceil(len(rows) / len(budget.rows))
        most = int(self.accelerator.gather(torch.tensor([own], device=self.accelerator.device)).max())
        if measured and rows:
            groups = [widths.group(rows)]
        else:
            groups = plan(rows, widths, min(most, len(rows)), budget) if rows else []
        return groups + [Group([], 1, 1)] * (most - len(groups))


def _rows_of(batch: dict[str, Any], drop: bool) -> list[_Row]:
    """One transfer from the device."""
    tokens = trained_mask(batch).sum(dim=1)
    real = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
    idle = (batch["advantages"].reshape(len(tokens), -1) == 0).all(dim=1) | (tokens == 0)
    numbers = torch.stack([real, tokens, idle.long()]).T.tolist()
    return [_Row(index, real, tokens, drop and bool(idle)) for index, (real, tokens, idle) in enumerate(numbers)]


def _kept(rows: Sequence[_Row], least: int) -> list[_Row]:
    """Rows that can move the policy, and the shortest of the others where there are fewer than micro-batches."""
    kept = [row for row in rows if not row.idle]
    idle = sorted((row for row in rows if row.idle), key=lambda row: row.real)
    return kept + idle[: max(0, least - len(kept))]


def _tokens(rows: Sequence[_Row]) -> int:
    return sum(row.tokens for row in rows)


def _nothing(batch: dict[str, Any]) -> dict[str, Any]:
    """A row of which no token counts, to keep step with ranks that have some to measure."""
    nothing = take(batch, Group([0], batch["prompt_ids"].size(1), 1))
    return {**nothing, "completion_mask": torch.zeros_like(nothing["completion_mask"])}
