"""A few completions with what each of their tokens did, for the report's page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from opefo_trl.controls import Tokens

SNAPSHOTS = 6  # over a run
ROWS = 4  # with the highest advantage, and as many with the lowest
LONGEST = 512  # tokens of a completion


def sample_steps(max_steps: int) -> set[int]:
    """The first step, the last, and some between them."""
    return {round(1 + part * (max_steps - 1) / (SNAPSHOTS - 1)) for part in range(SNAPSHOTS)}


def extremes(items: Iterable[Any], advantages: Iterable[float]) -> list[Any]:
    """Those that moved the policy most: the highest advantages, and the lowest."""
    ordered = [item for _, item in sorted(zip(advantages, items, strict=True), key=lambda pair: -pair[0])]
    return ordered if len(ordered) <= 2 * ROWS else ordered[:ROWS] + ordered[-ROWS:]


def sample_rows(step: int, batch: dict[str, Any], tokens: Tokens, tokenizer: Any) -> list[dict[str, Any]]:
    """The extreme completions of a micro-batch, as plain data."""
    advantages = tokens.advantages.squeeze(1).tolist()
    return [_sample(step, row, batch, tokens, tokenizer) for row in extremes(range(len(advantages)), advantages)]


def _sample(step: int, row: int, batch: dict[str, Any], tokens: Tokens, tokenizer: Any) -> dict[str, Any]:
    real = batch["completion_mask"][row].bool()
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]

    def numbers(values: torch.Tensor) -> list[float]:
        return [float(f"{value:.5g}") for value in values[real][:LONGEST].detach().float().tolist()]

    return {
        "step": step,
        "prompt": tokenizer.decode(prompt),
        "reward": float(batch["reward"][row]),
        "advantage": float(tokens.advantages[row]),
        "length": int(real.sum()),
        "tokens": [tokenizer.decode([token]) for token in batch["completion_ids"][row][real][:LONGEST].tolist()],
        "flow": numbers(tokens.flow[row] * tokens.mask[row]),
        "entropy": numbers(tokens.entropies[row]),
        "probability": numbers(tokens.logps[row].exp()),
    }
