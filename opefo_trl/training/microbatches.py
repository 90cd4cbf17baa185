"""Exact micro-batching as pure functions: which rows share a micro-batch, and how to take and join them.

Everything here is plain data and tensors; `eligibility` decides what is exact in a run, `rebatching` applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []  # of use inside this package only

_PROMPT_TENSORS = ("prompt_ids", "prompt_mask")  # padded on the left; all others on the right


# ---- which rows share a micro-batch


@dataclass(frozen=True)
class Group:
    """Rows that share a micro-batch, and the numbers of prompt and completion columns that they need."""

    rows: list[int]
    prompt: int
    completion: int

    @property
    def padded(self) -> int:
        """Tokens that a forward goes through, padding included."""
        return len(self.rows) * (self.prompt + self.completion)


@dataclass(frozen=True)
class Widths:
    """Columns that each row of a batch needs, for its prompt and for its completion."""

    prompts: list[int]
    completions: list[int]

    def group(self, rows: Sequence[int]) -> Group:
        """Return the narrowest group of these rows."""
        return Group(list(rows), max(self.prompts[r] for r in rows), max(self.completions[r] for r in rows))


def plan(rows: Sequence[int], widths: Widths, groups: int, budget: Group) -> list[Group]:
    """
    Divide rows into micro-batches with as few padded tokens as possible.

    The rows are sorted by length and cut where it costs least, found by dynamic programming in O(groups x rows^2)
    elementwise operations. Two orders are tried: by completion length and by total length.

    Args:
        rows (`Sequence[int]`): the rows to divide, at least `groups` of them.
        widths (`Widths`): widths of all rows of the batch.
        groups (`int`): number of micro-batches; none is empty.
        budget (`Group`): no micro-batch has more padded tokens, nor more padded completion tokens, than this one.

    Returns:
        `list[Group]`: each row in exactly one of them.
    """
    prompts, completions = widths.prompts, widths.completions
    orders = [
        sorted(rows, key=lambda row: (completions[row], prompts[row])),
        sorted(rows, key=lambda row: (prompts[row] + completions[row], completions[row])),
    ]
    plans = [[widths.group(chunk) for chunk in _cut(order, widths, groups, budget)] for order in orders]
    return min(plans, key=lambda groups: sum(group.padded for group in groups))


def _cut(rows: Sequence[int], widths: Widths, groups: int, budget: Group) -> list[Sequence[int]]:
    """Cut rows, in the order given, at the cheapest places; `cost[i, j]` is that of a micro-batch of rows i to j."""
    count = len(rows)
    if not 1 <= groups <= count:
        raise ValueError(f"{count} rows cannot make {groups} micro-batches; each needs one.")
    prompt, completion = (_longest(values, rows) for values in (widths.prompts, widths.completions))
    size = (torch.arange(count) - torch.arange(count).unsqueeze(1) + 1).double()
    cost = size * (prompt + completion)
    too_large = (cost > budget.padded) | (size * completion > len(budget.rows) * budget.completion)
    cost[(size < 1) | too_large] = torch.inf
    best, starts = cost[0], []
    for _ in range(groups - 1):
        before = torch.cat([torch.full((1,), torch.inf, dtype=best.dtype), best[:-1]])
        best, start = (before.unsqueeze(1) + cost).min(dim=0)
        starts.append(start)
    if best[-1].isinf():
        raise ValueError(f"{count} rows do not fit into {groups} micro-batches of {budget.padded} padded tokens.")
    chunks, end = [], count
    for start in reversed(starts):
        begin = int(start[end - 1])
        chunks.append(rows[begin:end])
        end = begin
    return [rows[:end], *reversed(chunks)]


def _longest(values: Sequence[int], rows: Sequence[int]) -> Tensor:
    """Return the largest value among rows i to j as element [i, j]."""
    ordered = torch.tensor([values[row] for row in rows], dtype=torch.float64)
    return ordered.expand(len(rows), -1).triu().cummax(dim=1).values


def loss_weight(loss_type: str, rows: float, tokens: float) -> float:
    """
    Return the factor for the loss of a micro-batch that gives its rows the weight that they had in TRL's.

    Args:
        rows (`float`): its rows over those of TRL's micro-batch.
        tokens (`float`): its trained tokens over those of TRL's micro-batch of the same rows.
    """
    if loss_type in ("dapo", "cispo", "vespo"):  # divided by the tokens of the whole rollout
        return 1.0
    return tokens if loss_type == "bnpo" else rows


# ---- rows of a batch


def trained_mask(batch: dict[str, Any]) -> Tensor:
    """Return 1 on the trained tokens, (B, T): neither padding, nor truncated, nor written by a tool."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def widths_of(batch: dict[str, Any], multiple: int | None = None, trim_prompts: bool = True) -> Widths:
    """
    Measure the columns that each row needs, in one transfer from the device.

    Args:
        multiple (`int`, *optional*): widths are rounded up to it (`pad_to_multiple_of`).
        trim_prompts (`bool`): if False, every row keeps the whole prompt's width.
    """
    prompt, completion = batch["prompt_mask"], batch["completion_mask"]
    # The outermost token counts, not the number of tokens: a mask may have holes.
    first = _outermost(prompt.flip(1)) if trim_prompts else torch.full_like(prompt[:, 0], prompt.size(1))
    # TRL's metrics take a single column for one number per row, so keep two where there are two
    last = _outermost(completion).clamp(min=min(2, completion.size(1)))
    prompts, completions = torch.stack([first, last]).tolist()
    return Widths(
        [_round_up(width, multiple, prompt.size(1)) for width in prompts],
        [_round_up(width, multiple, completion.size(1)) for width in completions],
    )


def _outermost(mask: Tensor) -> Tensor:
    columns = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return ((mask != 0) * columns).amax(dim=1)


def _round_up(width: int, multiple: int | None, most: int) -> int:
    width = max(width, 1)
    return width if multiple is None else min(most, -(-width // multiple) * multiple)


def take(batch: dict[str, Any], group: Group) -> dict[str, Any]:
    """Return the rows and columns of a group; values that have no rows are passed on."""
    width, length = batch["prompt_ids"].size(1), batch["completion_ids"].size(1)
    rows = torch.tensor(group.rows, device=batch["prompt_ids"].device)

    def select(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in group.rows]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if name in _PROMPT_TENSORS:
            return value[rows, width - group.prompt :]
        if value.dim() > 1 and value.size(1) == length:
            return value[rows, : group.completion]
        return value[rows]

    return {name: select(name, value) for name, value in batch.items()}


def take_columns(input_ids: Tensor, attention_mask: Tensor, completion: int, group: Group) -> tuple[Tensor, Tensor]:
    """Take a group out of whole sequences, the last `completion` columns of which are the completion."""
    rows = torch.tensor(group.rows, device=input_ids.device)
    border = input_ids.size(1) - completion
    columns = slice(border - group.prompt, border + group.completion)
    return input_ids[rows, columns], attention_mask[rows, columns]


def scatter(results: Sequence[Tensor | None], groups: Sequence[Group], completion: int) -> Tensor | None:
    """Scatter the results of groups, (rows, columns) each, back into one batch; positions without a value are 0."""
    tensors = [result for result in results if result is not None]
    if not tensors:
        return None
    batch = tensors[0].new_zeros(sum(len(group.rows) for group in groups), completion)
    for tensor, group in zip(tensors, groups, strict=True):
        batch[torch.tensor(group.rows, device=batch.device), : group.completion] = tensor
    return batch


def join(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join batches of equal width into one; values that have no rows are taken from the first."""

    def joined(name: str, first: Any) -> Any:
        if isinstance(first, list):
            return [item for batch in batches for item in batch[name]]
        if not isinstance(first, Tensor) or first.dim() == 0:
            return first
        return torch.cat([batch[name] for batch in batches])

    return {name: joined(name, value) for name, value in batches[0].items()}
