"""How many different right answers a policy still finds: the diversity that entropy stands for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

RIGHT = 0.5  # the first reward function judges the answer: above this it is right


def digest(completion: Any) -> int:
    """A 63-bit name of a completion, a text or messages; the same on every rank. Spaces around it do not count."""
    if not isinstance(completion, str):
        messages = [message.get("content") for message in completion]
        completion = messages[0] if len(messages) == 1 else json.dumps(messages, default=str)
    text = str(completion).strip().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def distinct_right(digests: Tensor, right: Tensor, generations: int) -> tuple[float, float]:
    """
    Of groups of `generations` completions, one after the other, (N,): the mean number of different right completions
    in a group, and the share of groups that have any.
    """
    groups = [
        set(names[known].tolist())
        for names, known in zip(digests.view(-1, generations), right.view(-1, generations), strict=True)
    ]
    if not groups:
        return 0.0, 0.0
    return sum(map(len, groups)) / len(groups), sum(map(bool, groups)) / len(groups)


def names_of(completions: list[Any], device: torch.device) -> Tensor:
    """Digests as a tensor that ranks can gather, (N,)."""
    return torch.tensor([digest(completion) for completion in completions], dtype=torch.int64, device=device)
