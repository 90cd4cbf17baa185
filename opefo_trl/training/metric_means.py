"""Metrics that keep TRL's meaning when micro-batches have different numbers of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from opefo_trl.trl_compat import LOSS_EXTREMES, LOSS_MEANS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from opefo_trl.config import OPEFOConfig
    from opefo_trl.controls import Control


@dataclass
class MetricMeans:
    """
    Weighted means of the metrics that TRL's loss logs for each micro-batch of an optimizer step, over all ranks.

    TRL logs a mean over the tokens or rows of each micro-batch and takes the mean of these means, which is the mean
    over all of them only if micro-batches are equal in size.

    Args:
        by_rows (`set[str]`): metrics that are means over rows; all others are means over tokens.
    """

    by_rows: set[str]
    values: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # metric -> [(value, weight)]

    @classmethod
    def for_run(cls, args: OPEFOConfig, control: Control) -> MetricMeans:
        by_rows = {name for name in LOSS_MEANS if "clip" in name and args.importance_sampling_level == "sequence"}
        if not control.shapes_tokens:  # TRL's loss takes this mean over what the advantages have: rows or tokens
            by_rows.add("vespo/phi_seq_mean")
        return cls(by_rows)

    def add(self, name: str, value: float, weight: int) -> None:
        self.values.setdefault(name, []).append((value, weight))

    def take(self, logged: dict[str, list[float]], rows: int, tokens: int) -> None:
        """Move the values that TRL's loss has just logged for a micro-batch here, out of TRL's lists."""
        for name in (*LOSS_MEANS, *LOSS_EXTREMES):
            if logged.get(name):
                self.add(name, logged[name].pop(), rows if name in self.by_rows else tokens)

    def log_to(self, logged: dict[str, list[float]], accelerator: Accelerator) -> None:
        """Log one value of each metric, the same on every rank, in one collective; then start over."""
        if not self.values:
            return
        summaries = [self._summary(name) for name in self.values]
        mine = torch.tensor(summaries, dtype=torch.float32, device=accelerator.device)
        ranks = accelerator.gather(mine.unsqueeze(0)).tolist()
        for index, name in enumerate(self.values):
            logged[name].append(_merge(name, [rank[index] for rank in ranks])[0])
        self.values = {}

    def _summary(self, name: str) -> tuple[float, float]:
        """Return this rank's value and its weight; (0, 0) where there is none, since NaN would not be gathered."""
        value, weight = _merge(name, [pair for pair in self.values[name] if not math.isnan(pair[0])])
        return (value, weight) if weight else (0.0, 0.0)


def _merge(name: str, pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the extreme or the weighted mean of (value, weight) pairs, and their total weight; NaN without weight."""
    weighted = [(value, weight) for value, weight in pairs if weight]
    total = sum(weight for _, weight in weighted)
    if not weighted:
        return math.nan, 0.0
    if name in LOSS_EXTREMES:
        return LOSS_EXTREMES[name](value for value, _ in weighted), total
    return sum(value * weight for value, weight in weighted) / total, total
