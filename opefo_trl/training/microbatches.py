"""Exact micro-batching: the same gradient from fewer padded tokens.

Strictly on-policy, all rows of a rollout share one update, so that it does not matter which of them share a forward:

- **trim**: a micro-batch is as wide as its own longest prompt and completion, not as the rollout's;
- **regroup**: rows of like length share a micro-batch, in as many micro-batches as before, none of them larger in
  memory than TRL's;
- **drop**: rows that cannot move the policy run no backward. They are still measured, without gradient where nothing
  has measured them yet, so that no metric is a mean over the kept rows alone.

Each part is used where it leaves the gradient as it is; `Parts.of` says which, and why not. Everything here is plain
data and tensors: the trainer does the talking to TRL and to the other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

PROMPT_TENSORS = ("prompt_ids", "prompt_mask")  # padded on the left; all others on the right


# ---- which rows share a micro-batch


@dataclass(frozen=True)
class Group:
    """Rows that share a micro-batch, and the columns that they need."""

    rows: list[int]
    prompt: int
    completion: int

    @property
    def padded(self) -> int:
        """Tokens that a forward goes through, padding included."""
        return len(self.rows) * (self.prompt + self.completion)


@dataclass(frozen=True)
class Widths:
    """What the rows of a batch need: columns of prompt and of completion, one entry per row."""

    prompts: list[int]
    completions: list[int]

    def group(self, rows: Sequence[int]) -> Group:
        """The narrowest group of these rows."""
        return Group(list(rows), max(self.prompts[r] for r in rows), max(self.completions[r] for r in rows))


def plan(rows: Sequence[int], widths: Widths, groups: int, budget: Group) -> list[Group]:
    """
    Divide rows into micro-batches with as few padded tokens as can be.

    The rows are sorted by length and cut, at the places that cost least: found by dynamic programming, in
    O(groups x rows^2) elementwise operations. Two orders are tried, by completion and by the whole.

    Args:
        rows (`Sequence[int]`): the rows to divide, at least `groups` of them.
        widths (`Widths`): of all rows of the batch.
        groups (`int`): how many micro-batches to make; none is empty.
        budget (`Group`): no micro-batch has more padded tokens, nor more padded completion tokens, than this one.

    Returns:
        `list[Group]`: each row in exactly one of them.
    """
    prompts, completions = widths.prompts, widths.completions
    orders = [
        sorted(rows, key=lambda row: (completions[row], prompts[row])),
        sorted(rows, key=lambda row: (prompts[row] + completions[row], completions[row])),
    ]
    plans = [[widths.group(part) for part in _cut(order, widths, groups, budget)] for order in orders]
    return min(plans, key=lambda groups: sum(group.padded for group in groups))


def _cut(rows: Sequence[int], widths: Widths, groups: int, budget: Group) -> list[Sequence[int]]:
    """The cheapest cuts of rows in this order. `cost[i, j]` is that of a micro-batch of rows i to j."""
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
    parts, end = [], count
    for start in reversed(starts):
        begin = int(start[end - 1])
        parts.append(rows[begin:end])
        end = begin
    return [rows[:end], *reversed(parts)]


def _longest(values: Sequence[int], rows: Sequence[int]) -> Tensor:
    """[i, j]: the largest value among rows i to j."""
    ordered = torch.tensor([values[row] for row in rows], dtype=torch.float64)
    return ordered.expand(len(rows), -1).triu().cummax(dim=1).values


# ---- rows of a batch


def trained_mask(batch: dict[str, Any]) -> Tensor:
    """1 on the tokens that train, (B, T): neither padding, nor truncated, nor a tool's."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def widths_of(batch: dict[str, Any], multiple: int | None = None, trim_prompts: bool = True) -> Widths:
    """
    Columns that each row needs; one transfer from the device.

    Args:
        multiple (`int`, *optional*): widths are rounded up to it (`pad_to_multiple_of`).
        trim_prompts (`bool`): if not, every row keeps the whole prompt's width.
    """
    prompt, completion = batch["prompt_mask"], batch["completion_mask"]
    # The outermost token counts, not the number of tokens: a mask may have holes.
    first = _reach(prompt.flip(1)) if trim_prompts else torch.full_like(prompt[:, 0], prompt.size(1))
    # TRL's metrics take a single column for one number a row
    last = _reach(completion).clamp(min=min(2, completion.size(1)))
    prompts, completions = torch.stack([first, last]).tolist()
    return Widths(
        [_round_up(width, multiple, prompt.size(1)) for width in prompts],
        [_round_up(width, multiple, completion.size(1)) for width in completions],
    )


def _reach(mask: Tensor) -> Tensor:
    columns = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return ((mask != 0) * columns).amax(dim=1)


def _round_up(width: int, multiple: int | None, most: int) -> int:
    width = max(width, 1)
    return width if multiple is None else min(most, -(-width // multiple) * multiple)


def take(batch: dict[str, Any], group: Group) -> dict[str, Any]:
    """The rows and columns of a group; what has no rows is handed on."""
    width, length = batch["prompt_ids"].size(1), batch["completion_ids"].size(1)
    rows = torch.tensor(group.rows, device=batch["prompt_ids"].device)

    def part(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in group.rows]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if name in PROMPT_TENSORS:
            return value[rows, width - group.prompt :]
        if value.dim() > 1 and value.size(1) == length:
            return value[rows, : group.completion]
        return value[rows]

    return {name: part(name, value) for name, value in batch.items()}


def columns(input_ids: Tensor, attention_mask: Tensor, completion: int, group: Group) -> tuple[Tensor, Tensor]:
    """The same of whole sequences, the last `completion` columns of which are the completion."""
    rows = torch.tensor(group.rows, device=input_ids.device)
    border = input_ids.size(1) - completion
    part = slice(border - group.prompt, border + group.completion)
    return input_ids[rows, part], attention_mask[rows, part]


def spread(parts: Sequence[Tensor | None], groups: Sequence[Group], completion: int) -> Tensor | None:
    """What was found of groups, (rows, columns) each, as one batch, zero where nothing was."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    whole = known[0].new_zeros(sum(len(group.rows) for group in groups), completion)
    for part, group in zip(known, groups, strict=True):
        whole[torch.tensor(group.rows, device=whole.device), : group.completion] = part
    return whole


def join(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several that are equally wide; what has no rows is taken from the first."""

    def whole(name: str, first: Any) -> Any:
        if isinstance(first, list):
            return [item for batch in batches for item in batch[name]]
        if not isinstance(first, Tensor) or first.dim() == 0:
            return first
        return torch.cat([batch[name] for batch in batches])

    return {name: whole(name, value) for name, value in batches[0].items()}


# ---- what may be done to them


@dataclass(frozen=True)
class Parts:
    """Which parts of exact micro-batching are active, and why the others are not."""

    trim: bool
    trim_prompts: bool
    regroup: bool
    drop: bool
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Any, control: Any, positions: str, aux_loss: bool = False) -> Parts:
        """
        Args:
            args (`OPEFOConfig`): what the loss and the flow are made of.
            control (`Control`): what it does to a row.
            positions (`str`): `positions_of` the model's config.
            aux_loss (`bool`): whether the loss has a router's auxiliary loss.
        """
        if args.micro_batching == "trl":
            return cls.none()
        if positions == "by length":
            return cls.none("the model's rotary embedding changes with the width of the batch")
        mixes = _mixes_rows(args, control, aux_loss)
        regroup = mixes or _averages_by_tokens(args) or _follows_micro_batches(args, control)
        drop = mixes or _moves_without_advantage(args, control)
        reasons = {"regroup": regroup, "drop": drop}
        if positions == "absolute":
            reasons["trim prompts"] = "the model's positions are absolute, or may be"
        return cls(
            True,
            positions == "relative",
            regroup is None,
            drop is None,
            {part: why for part, why in reasons.items() if why is not None},
        )

    @classmethod
    def none(cls, why: str | None = None) -> Parts:
        """TRL's grouping, untouched."""
        reasons = {} if why is None else dict.fromkeys(("trim", "regroup", "drop"), why)
        return cls(False, False, False, False, reasons)

    def __str__(self) -> str:
        words = {"trim": "trims padding", "regroup": "regroups rows by length", "drop": "drops rows without a signal"}
        active = [word for part, word in words.items() if getattr(self, part)]
        by_reason: dict[str, list[str]] = {}
        for part, why in self.reasons.items():
            by_reason.setdefault(why, []).append(part)
        missing = [f"It does not {' or '.join(parts)}, since {why}." for why, parts in by_reason.items()]
        return " ".join([f"Exact micro-batching {', '.join(active) or 'changes nothing'}.", *missing])


def positions_of(config: Any) -> str:
    """How a model's config counts positions: `relative`, `absolute`, or `by length` of the batch."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return "absolute"
    layers = [rope] if "rope_type" in rope else list(rope.values())
    if {layer.get("rope_type") for layer in layers} & {"dynamic", "longrope"}:
        return "by length"
    # Llama 4 and its kin scale attention by the index of a token
    scaled = getattr(text, "attn_temperature_tuning", False) or any(
        "llama_4_scaling_beta" in layer for layer in layers
    )
    return "absolute" if scaled else "relative"


def _mixes_rows(args: Any, control: Any, aux_loss: bool) -> str | None:
    """Why a row's loss depends on which others share its micro-batch, and every row counts."""
    if args.entropy_coef or args.use_adaptive_entropy:
        return "the entropy bonus is a mean over each micro-batch"
    if args.top_entropy_quantile < 1:
        return f"`top_entropy_quantile={args.top_entropy_quantile}` ranks the tokens of each micro-batch"
    if aux_loss:
        return "the router's auxiliary loss is of each micro-batch"
    if args.estimator_of(control) == "covariance" and args.measuring(control) != "ahead":
        return "`flow_estimator='covariance'` takes its means over the rows of each micro-batch here"
    if not control.by_row:
        return f"`control={args.control!r}` does not say (`by_row = True`) that it treats each row by itself"
    return None


def _averages_by_tokens(args: Any) -> str | None:
    return "`loss_type='bnpo'` divides by the tokens of each micro-batch" if args.loss_type == "bnpo" else None


def _follows_micro_batches(args: Any, control: Any) -> str | None:
    if args.flow_scope == "micro" and control.needs_totals:
        return "`flow_scope='micro'` fixes lambda by each micro-batch"
    return None


def _moves_without_advantage(args: Any, control: Any) -> str | None:
    """Why a row without an advantage moves the policy all the same."""
    if args.beta:
        return f"`beta={args.beta}` pulls every row to the reference model"
    if not control.keeps_zeros:
        return f"`control={args.control!r}` does not say (`keeps_zeros = True`) that no advantage stays none"
    return None


def loss_share(loss_type: str, rows: float, tokens: float) -> float:
    """
    By how much to multiply the loss of a micro-batch, so that its rows weigh what they weighed in TRL's.

    Args:
        rows (`float`): its rows over those of TRL's.
        tokens (`float`): its tokens that train over those of TRL's micro-batch of the same rows.
    """
    if loss_type in ("dapo", "cispo", "vespo"):  # divided by the tokens of the whole rollout
        return 1.0
    return tokens if loss_type == "bnpo" else rows


# ---- metrics

# What TRL's loss logs of a micro-batch, and what of it is one number per row rather than per token
EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}
MEANS = (
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
)


@dataclass
class Means:
    """
    Metrics of the micro-batches of one optimizer step, which are means over their tokens or rows, made one mean over
    all of them, on all ranks. TRL takes the mean of the means, which is the same only while micro-batches are alike.
    """

    by_rows: set[str]  # TRL's metrics that are means over rows
    values: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def add(self, name: str, value: float, weight: int) -> None:
        self.values.setdefault(name, []).append((value, weight))

    def take(self, logged: dict[str, list[float]], rows: int, tokens: int) -> None:
        """Move what TRL's loss has just logged of a micro-batch of so many rows and tokens here."""
        for name in (*MEANS, *EXTREMES):
            if logged.get(name):
                self.add(name, logged[name].pop(), rows if name in self.by_rows else tokens)

    def give(self, logged: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Log one value for each, the same on every rank, in one collective; and begin anew."""
        if not self.values:
            return
        mine = torch.tensor(
            [self._summary(name) for name in self.values], dtype=torch.float32, device=accelerator.device
        )
        ranks = accelerator.gather(mine.unsqueeze(0)).tolist()
        for place, name in enumerate(self.values):
            known = [(value, weight) for value, weight in (rank[place] for rank in ranks) if weight]
            if not known:
                merged = math.nan
            elif name in EXTREMES:
                merged = EXTREMES[name](value for value, _ in known)
            else:
                merged = sum(value * weight for value, weight in known) / sum(weight for _, weight in known)
            logged[name].append(merged)
        self.values = {}

    def _summary(self, name: str) -> tuple[float, float]:
        """This rank's value and its weight, 0 where there is none."""
        known = [(value, weight) for value, weight in self.values[name] if weight and not math.isnan(value)]
        if not known:
            return 0.0, 0.0
        total = sum(weight for _, weight in known)
        if name in EXTREMES:
            return EXTREMES[name](value for value, _ in known), total
        return sum(value * weight for value, weight in known) / total, total
