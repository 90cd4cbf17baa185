"""Mismatch between vLLM, which sampled the rollout, and the policy being trained: importance ratio and metrics.

In strictly on-policy runs the training forward of a row gives the log-probabilities that TRL's scoring pass would have
given, so TRL's correction for vLLM's rounding can be computed there, and the extra pass avoided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opefo_trl.trl_compat import SAMPLING_DRIFT, SAMPLING_RATIO

if TYPE_CHECKING:
    from accelerate import Accelerator

    from opefo_trl.config import OPEFOConfig
    from opefo_trl.controls import Control


@torch.no_grad()
def importance_ratio(
    logps: Tensor, sampling_logps: Tensor, mask: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """
    Return pi / pi_sampler of the sampled tokens, within bounds.

    Args:
        logps, sampling_logps (`Tensor`): log-probabilities under the policy and under vLLM, (B, T).
        mask (`Tensor`): 1 on trained tokens, (B, T); masked and NaN tokens contribute log-ratio 0.
        mode (`str`): `{token,sequence}_{truncate,mask}`; truncate clamps into the bounds, mask zeroes ratios outside
            them.
        low, high (`float`, *optional*): the bounds.

    Returns:
        `Tensor`: (B, T), or (B, 1) for the sequence modes.
    """
    level, _, action = mode.partition("_")
    distance = ((logps - sampling_logps) * mask).nan_to_num(nan=0.0)
    ratio = (distance.sum(1, keepdim=True) if level == "sequence" else distance).exp()
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if action == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@dataclass(frozen=True)
class SamplerDrift:
    """Running sums and extremes behind TRL's `sampling/...` metrics; `a + b` merges two."""

    sums: Tensor  # [summed |difference|, tokens, summed ratio, ratios]
    extremes: Tensor  # [largest |difference|, largest ratio, minus the smallest ratio]

    @classmethod
    @torch.no_grad()
    def measure(
        cls, logps: Tensor, sampling_logps: Tensor, mask: Tensor, ratio: Tensor, per_sequence: bool
    ) -> SamplerDrift:
        """Measure one micro-batch. If `per_sequence`, `ratio` has one value per row and every row counts; else only
        trained tokens count, as in TRL."""
        compared = mask.bool() & ~sampling_logps.isnan()
        gap = (logps - sampling_logps).abs().float().masked_fill(~compared, 0.0)
        counted = torch.ones_like(ratio, dtype=torch.bool) if per_sequence else mask.bool()
        ratio, outside = ratio.float(), ~counted
        sums = [gap.sum(), compared.sum(), ratio.masked_fill(outside, 0.0).sum(), counted.sum()]
        extremes = [gap.amax(), ratio.masked_fill(outside, -torch.inf).amax()]
        extremes.append(ratio.neg().masked_fill(outside, -torch.inf).amax())
        return cls(torch.stack([value.float() for value in sums]), torch.stack(extremes))

    def __add__(self, other: SamplerDrift) -> SamplerDrift:
        return SamplerDrift(self.sums + other.sums, torch.maximum(self.extremes, other.extremes))

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Return TRL's metrics over all ranks: one collective, one transfer to the host."""
        ranks = accelerator.gather(torch.cat([self.sums, self.extremes]).unsqueeze(0))
        gap, tokens, ratio, ratios = ranks[:, :4].sum(0).tolist()
        largest_gap, largest, smallest = ranks[:, 4:].amax(0).tolist()
        return {
            f"{SAMPLING_DRIFT}/mean": gap / max(1.0, tokens),
            f"{SAMPLING_DRIFT}/max": largest_gap,
            f"{SAMPLING_RATIO}/min": -smallest if ratios else 0.0,
            f"{SAMPLING_RATIO}/mean": ratio / max(1.0, ratios),
            f"{SAMPLING_RATIO}/max": largest if ratios else 0.0,
        }


@dataclass(frozen=True)
class SamplerCorrection:
    """
    Computes TRL's vLLM importance ratio from the training forward and writes it into the batch (`corrects`), or only
    measures the drift.

    Args:
        corrects (`bool`): whether to write the ratio where TRL's loss reads it.
        mode (`str`): TRL's `vllm_importance_sampling_mode`.
        low, high (`float`, *optional*): TRL's bounds of the ratio.
    """

    corrects: bool
    mode: str
    low: float | None
    high: float | None

    @classmethod
    def for_run(
        cls, args: OPEFOConfig, control: Control, mode: str, low: float | None, high: float | None
    ) -> SamplerCorrection | None:
        """Return it for a run, or None if a scoring pass of TRL's measures the drift, or several updates on a rollout
        do not let it be told from theirs."""
        corrects = args.corrects_live(control)
        if corrects or (not args.corrects_vllm and args.updates_per_rollout == 1):
            return cls(corrects, mode, low, high)
        return None

    def apply(self, batch: dict[str, Any], logps: Tensor, mask: Tensor) -> SamplerDrift | None:
        """Correct a micro-batch and return its drift, None if the rollout has no log-probabilities of the sampler;
        without them, raise a `ValueError` if `corrects`."""
        sampling_logps = batch.get("sampling_per_token_logps")
        if sampling_logps is None and self.corrects:
            raise ValueError(
                "The rollout has no log-probabilities to correct with. Let `rollout_func` return `logprobs`, or set "
                "`vllm_importance_sampling_correction=False`."
            )
        if sampling_logps is None:
            return None
        ratio = importance_ratio(logps, sampling_logps, mask, self.mode, self.low, self.high)
        if self.corrects:
            batch["importance_sampling_ratio"] = ratio
        return SamplerDrift.measure(logps, sampling_logps, mask, ratio, self.mode.startswith("sequence"))
