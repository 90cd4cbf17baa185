"""Exact micro-batching of a rollout, in step with the other ranks.

Every rank runs the same number of micro-batches, with and without gradient, however its rows fall, because collectives
would otherwise hang. Micro-batches may differ in their numbers of rows, and TRL gathers one number per row from all
ranks for its metrics: `SingleRankAccelerator` keeps these calls on this rank, and `MetricMeans` gathers the metrics
once, at the end of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from opefo_trl.training.eligibility import BatchTransforms
from opefo_trl.training.metric_means import MetricMeans
from opefo_trl.training.microbatches import Group, Widths, join, loss_weight, plan, take, trained_mask, widths_of
from opefo_trl.trl_compat import MULTIMODAL

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__: list[str] = []  # of use inside this package only

logger = get_logger(__name__)

BOOKKEEPING = "bookkeeping"  # the key of a micro-batch's `Bookkeeping` among its tensors
PUSHED = "pushed"  # the key of the completions that the control trains whatever their advantage, (B,)


@dataclass
class Bookkeeping:
    """Bookkeeping of one micro-batch: rows, trained tokens, loss weight, and dropped rows to run without gradient
    first."""

    rows: int
    tokens: int  # trained tokens; in dropped rows, those that an advantage would train
    loss_weight: float = 1.0
    dropped: list[dict[str, Any]] = field(default_factory=list)  # micro-batches to run before it, without gradient


@dataclass
class _Row:
    index: int
    real: int  # tokens that are no padding, prompt included
    tokens: int  # trained tokens of the completion
    idle: bool  # cannot contribute gradient, and may be dropped


class SingleRankAccelerator:
    """An accelerator whose `gather` and `reduce` return this rank's own values."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str = "mean") -> Tensor:
        return tensor


class Rebatcher:
    """
    Divides rollouts into micro-batches that give the same gradient from fewer tokens.

    Args:
        transforms (`BatchTransforms`): the transforms that are exact for the run.
        accelerator (`Accelerator`): gathers the numbers that ranks have to agree on.
        loss_type (`str`): selects how the loss of a micro-batch is weighted, see `loss_weight`.
        accumulation (`int`): micro-batches of an optimizer step.
        multiple (`int`, *optional*): TRL's `pad_to_multiple_of`.
    """

    def __init__(
        self,
        transforms: BatchTransforms,
        accelerator: Accelerator,
        loss_type: str,
        accumulation: int,
        multiple: int | None,
    ):
        self.transforms, self.accelerator = transforms, accelerator
        self.loss_type, self.accumulation, self.multiple = loss_type, accumulation, multiple

    @property
    def uneven(self) -> bool:
        """Return whether micro-batches may differ in their number of rows."""
        return self.transforms.regroup or self.transforms.drop

    def log_transforms(self) -> None:
        """Log the active transforms, and why the others are off."""
        log = logger.warning if self.transforms.reasons else logger.info
        log(str(self.transforms))

    def divide(self, micro_batches: list[dict[str, Any]], means: MetricMeans, may_have_images: bool) -> list[dict]:
        """Divide a rollout, as TRL split it, into our micro-batches. If a rollout on any rank has images, return it
        unchanged and turn all transforms off for the rest of the run."""
        has_images = bool(MULTIMODAL & set(micro_batches[0]))
        if may_have_images:  # of any rank, so that all ranks group their rows in the same way
            flag = torch.tensor([has_images], device=self.accelerator.device)
            has_images = bool(self.accelerator.gather(flag).any())
        if has_images:
            self.transforms = BatchTransforms.none("tensors of images have rows of their own")
            self.log_transforms()
            return micro_batches
        return self._transform(micro_batches, means)

    def scoring_groups(self, attention_mask: Tensor, completion: int, batch_size: int) -> list[Group]:
        """Plan a scoring pass in as many groups as TRL's chunks of `batch_size` rows, and none larger; `completion` is
        the number of completion columns."""
        rows, width = attention_mask.shape
        prompt = width - completion
        masks = {"prompt_mask": attention_mask[:, :prompt], "completion_mask": attention_mask[:, prompt:]}
        widths = widths_of(masks, self.multiple, self.transforms.trim_prompts)
        budget = Group(list(range(batch_size)), prompt, completion)
        return plan(range(rows), widths, math.ceil(rows / batch_size), budget)

    def _transform(self, micro_batches: list[dict[str, Any]], means: MetricMeans) -> list[dict[str, Any]]:
        """Apply the active transforms (trim, regroup, drop) within each optimizer step."""
        size = math.gcd(len(micro_batches), self.accumulation)
        steps = [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]
        return [micro_batch for step in steps for micro_batch in self._transform_step(step, means)]

    def _transform_step(self, trl_micro_batches: list[dict[str, Any]], means: MetricMeans) -> list[dict[str, Any]]:
        batch = join(trl_micro_batches)
        widths = widths_of(batch, self.multiple, self.transforms.trim_prompts)
        rows = _rows_of(batch, self.transforms.drop)
        size = len(rows) // len(trl_micro_batches)
        budget = Group(list(range(size)), batch["prompt_ids"].size(1), batch["completion_ids"].size(1))
        groups, weights = self._groups(rows, widths, size, budget)

        trained = {row for group in groups for row in group.rows}
        dropped = [row.index for row in rows if row.index not in trained]
        real = sum(rows[index].real for index in trained)
        means.add("batching/padding", sum(group.padded for group in groups) / real, real)
        means.add("batching/skipped_rows", len(dropped) / len(rows), len(rows))

        def made(group: Group, weight: float = 1.0) -> dict[str, Any]:
            micro_batch = take(batch, group) if group.rows else _empty_micro_batch(batch)
            tokens = _count_tokens([rows[index] for index in group.rows])
            return {**micro_batch, BOOKKEEPING: Bookkeeping(len(group.rows), tokens, weight)}

        micro_batches = [made(group, weight) for group, weight in zip(groups, weights, strict=True)]
        dropped_groups = self._dropped_groups(dropped, widths, budget, scored="entropies" in batch)
        micro_batches[0][BOOKKEEPING].dropped = [made(group) for group in dropped_groups]
        return micro_batches

    def _groups(self, rows: list[_Row], widths: Widths, size: int, budget: Group) -> tuple[list[Group], list[float]]:
        """Choose the rows of each micro-batch, and the weight of its loss; `size` is rows per TRL micro-batch."""
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]  # TRL's micro-batches
        if self.transforms.regroup:
            kept = _keep(rows, len(chunks))
            groups = plan([row.index for row in kept], widths, len(chunks), budget)
            return groups, [loss_weight(self.loss_type, len(group.rows) / size, 1.0) for group in groups]
        chosen = [_keep(chunk, 1) for chunk in chunks]
        weights = []
        for kept, chunk in zip(chosen, chunks, strict=True):
            tokens = _count_tokens(chunk)
            weight = loss_weight(self.loss_type, len(kept) / size, _count_tokens(kept) / tokens) if tokens else 1.0
            weights.append(weight)
        return [widths.group([row.index for row in kept]) for kept in chosen], weights

    def _dropped_groups(self, rows: list[int], widths: Widths, budget: Group, scored: bool) -> list[Group]:
        """Group the dropped rows for a pass without gradient. Those that are scored already need no forward, and so
        neither memory nor other ranks: they are one group. Else there are as few as fit, as many on every rank."""
        if not self.transforms.drop:
            return []
        if scored:
            return [widths.group(rows)] if rows else []
        count = math.ceil(len(rows) / len(budget.rows))
        most = int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())
        groups = plan(rows, widths, min(most, len(rows)), budget) if rows else []
        return groups + [Group([], 1, 1)] * (most - len(groups))


def has_rows(micro_batch: dict[str, Any]) -> bool:
    """Return whether a micro-batch has rows of its own, and is not only there to keep step with other ranks."""
    return BOOKKEEPING not in micro_batch or micro_batch[BOOKKEEPING].rows > 0


def _rows_of(batch: dict[str, Any], drop: bool) -> list[_Row]:
    """Describe each row of a batch, in one transfer from the device."""
    tokens = trained_mask(batch).sum(dim=1)
    real = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
    idle = (batch["advantages"].reshape(len(tokens), -1) == 0).all(dim=1)
    idle = (idle & ~batch[PUSHED] if PUSHED in batch else idle) | (tokens == 0)
    numbers = torch.stack([real, tokens, idle.long()]).T.tolist()
    return [_Row(index, real, tokens, drop and bool(idle)) for index, (real, tokens, idle) in enumerate(numbers)]


def _keep(rows: Sequence[_Row], least: int) -> list[_Row]:
    """Keep the rows with a gradient, and the shortest idle ones while fewer than `least` would be left."""
    moving = [row for row in rows if not row.idle]
    idle = sorted((row for row in rows if row.idle), key=lambda row: row.real)
    return moving + idle[: max(0, least - len(moving))]


def _count_tokens(rows: Sequence[_Row]) -> int:
    return sum(row.tokens for row in rows)


def _empty_micro_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Return one row without trained tokens, to keep step with ranks that have dropped rows to measure."""
    row = take(batch, Group([0], batch["prompt_ids"].size(1), 1))
    return {**row, "completion_mask": torch.zeros_like(row["completion_mask"])}
