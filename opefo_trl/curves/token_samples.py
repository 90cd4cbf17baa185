"""A few completions with flow, entropy and probability of each token, for the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from opefo_trl.controls import Tokens

_STEPS = 6  # that are sampled over a run
_ROWS = 4  # with the highest advantage, and as many with the lowest
_MAX_TOKENS = 512  # of a completion


def sample_steps(max_steps: int) -> set[int]:
    """Return the steps to sample: the first, the last, and some between them."""
    return {round(1 + index * (max_steps - 1) / (_STEPS - 1)) for index in range(_STEPS)}


def extremes(items: Iterable[Any], advantages: Iterable[float]) -> list[Any]:
    """Return the items with the highest and the lowest advantages, which move the policy most."""
    ordered = [item for _, item in sorted(zip(advantages, items, strict=True), key=lambda pair: -pair[0])]
    return ordered if len(ordered) <= 2 * _ROWS else ordered[:_ROWS] + ordered[-_ROWS:]


def sample_rows(step: int, batch: dict[str, Any], tokens: Tokens, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the extreme completions of a micro-batch as plain data."""
    advantages = tokens.advantages.squeeze(1).tolist()
    return [_sample(step, row, batch, tokens, tokenizer) for row in extremes(range(len(advantages)), advantages)]


def _sample(step: int, row: int, batch: dict[str, Any], tokens: Tokens, tokenizer: Any) -> dict[str, Any]:
    is_token = batch["completion_mask"][row].bool()
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]

    def numbers(values: torch.Tensor) -> list[float]:
        return [float(f"{value:.5g}") for value in values[is_token][:_MAX_TOKENS].detach().float().tolist()]

    return {
        "step": step,
        "prompt": tokenizer.decode(prompt),
        "reward": float(batch["reward"][row]) if "reward" in batch else None,  # a subclass may compute them itself
        "advantage": float(tokens.advantages[row]),
        "length": int(is_token.sum()),
        "tokens": [
            tokenizer.decode([token]) for token in batch["completion_ids"][row][is_token][:_MAX_TOKENS].tolist()
        ],
        "flow": numbers(tokens.flow[row] * tokens.mask[row]),
        "entropy": numbers(tokens.entropies[row]),
        "probability": numbers(tokens.logps[row].exp()),
    }
