"""How far vLLM, which sampled, is from the policy that trains: importance ratio, and the numbers to watch.

Strictly on-policy, the forward that trains a row gives the log-probabilities that TRL's scoring pass would have given,
so that its correction for vLLM's rounding can be computed there, and the pass saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def importance_ratio(
    logps: Tensor, sampling_logps: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """
    pi / pi_sampler of what was sampled, truncated or masked as TRL's `vllm_importance_sampling_mode` says.

    Args:
        logps, sampling_logps, mask (`Tensor`): (B, T). Where vLLM gave NaN the ratio is 1.
        mode (`str`): `token_` or `sequence_`, each with `truncate` (clamp) or `mask` (to 0 outside).
        low, high (`float`, *optional*): the bounds.

    Returns:
        `Tensor`: (B, T), or (B, 1) for the sequence modes.
    """
    level, _, action = mode.partition("_")
    distance = ((logps - sampling_logps) * mask).nan_to_num(nan=0.0)
    ratio = (distance.sum(1, keepdim=True) if level == "sequence" else distance).exp()
    if action == "truncate":
        return ratio if low is None and high is None else ratio.clamp(low, high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        outside |= ratio < low
    if high is not None:
        outside |= ratio > high
    return ratio.masked_fill(outside, 0.0)


@dataclass(frozen=True)
class Drift:
    """Sums over micro-batches, for the metrics that TRL logs of its scoring pass; a + b is that of both."""

    sums: Tensor  # [summed |difference|, tokens, summed ratio, ratios]
    extremes: Tensor  # [largest |difference|, largest ratio, minus the smallest ratio]

    @classmethod
    @torch.no_grad()
    def of(cls, logps: Tensor, sampling_logps: Tensor, mask: Tensor, ratio: Tensor, by_row: bool) -> Drift:
        """`by_row`: whether a ratio is that of a sequence. TRL takes those of all, and a token's if it trains."""
        known = mask.bool() & ~sampling_logps.isnan()
        gap = (logps - sampling_logps).abs().float().masked_fill(~known, 0.0)
        counted = torch.ones_like(ratio, dtype=torch.bool) if by_row else mask.bool()
        ratio, outside = ratio.float(), ~counted
        sums = [gap.sum(), known.sum(), ratio.masked_fill(outside, 0.0).sum(), counted.sum()]
        extremes = [gap.amax(), ratio.masked_fill(outside, -torch.inf).amax()]
        extremes.append(ratio.neg().masked_fill(outside, -torch.inf).amax())
        return cls(torch.stack([value.float() for value in sums]), torch.stack(extremes))

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.sums + other.sums, torch.maximum(self.extremes, other.extremes))

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """By TRL's names, over all ranks: one collective, one transfer to the host."""
        ranks = accelerator.gather(torch.cat([self.sums, self.extremes]).unsqueeze(0))
        gap, tokens, ratio, ratios = ranks[:, :4].sum(0).tolist()
        largest_gap, largest, smallest = ranks[:, 4:].amax(0).tolist()
        return {
            "sampling/sampling_logp_difference/mean": gap / max(1.0, tokens),
            "sampling/sampling_logp_difference/max": largest_gap,
            "sampling/importance_sampling_ratio/min": -smallest if ratios else 0.0,
            "sampling/importance_sampling_ratio/mean": ratio / max(1.0, ratios),
            "sampling/importance_sampling_ratio/max": largest if ratios else 0.0,
        }
