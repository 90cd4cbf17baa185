"""The scoring pass: log-probabilities, entropies and vocabulary sums of a rollout, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opefo_trl.flow import VOCABULARY_ESTIMATORS
from opefo_trl.training.microbatches import scatter, take_columns
from opefo_trl.training.rebatching import Rebatcher
from opefo_trl.training.vocabulary_scores import vocabulary_scores
from opefo_trl.trl_compat import MULTIMODAL

# (input_ids, attention_mask, logits_to_keep, **kwargs) -> (logps, entropies, auxiliary loss)
Forward = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Scores:
    """Scores of the policy on a rollout, (B, T); `vocabulary` is None for estimators that need no such sum."""

    logps: Tensor
    entropies: Tensor
    vocabulary: Tensor | None


class ScoringPass:
    """
    Runs scoring passes without their padding, and keeps the policy's scores.

    Args:
        estimator (`str`): flow estimator; `exact` and `expected` need vocabulary sums.
        temperature (`float`): sampling temperature, which divides the logits.
        head_in_fp32 (`bool`): whether the LM head runs in float32.
    """

    def __init__(self, estimator: str, temperature: float, head_in_fp32: bool):
        self.estimator, self.temperature, self.head_in_fp32 = estimator, temperature, head_in_fp32
        self._kept: list[Scores] | None = None  # None: no rollout is being scored

    @contextmanager
    def keep_scores(self) -> Iterator[None]:
        """Keep the scores of the policy in this block."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def scores_of(self, logps: Tensor | None) -> Scores | None:
        """
        Return the kept scores with this tensor of log-probabilities.

        With a PEFT adapter the reference model shares the policy's modules, and its pass is kept as well: the policy's
        is the one whose very tensor TRL put into the generation batch.
        """
        return next((scores for scores in self._kept or [] if scores.logps is logps), None)

    def run(
        self,
        forward: Forward,
        rebatcher: Rebatcher,
        input_ids: Tensor,
        attention_mask: Tensor,
        keep: int,
        batch_size: int,
        policy: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """
        Score rows as TRL's pass in chunks of `batch_size` does, but in groups of similar length where that is exact.

        `policy` is the unwrapped model if it is the policy that `forward` runs, and None for a reference model.
        """
        of_policy = policy is not None and self._kept is not None
        kwargs["compute_entropy"] = of_policy

        def score(ids: Tensor, mask: Tensor, keep: int, **more: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
            with self._vocabulary_sums(policy, keep) if of_policy else nullcontext([]) as sums:
                logps, entropies, _ = forward(ids, mask, keep, **kwargs, **more)
            return logps, entropies, torch.cat(sums) if sums else None

        if rebatcher.transforms.trim and all(kwargs.get(name) is None for name in MULTIMODAL):
            groups = rebatcher.scoring_groups(attention_mask, keep, batch_size)
            results = [
                score(*take_columns(input_ids, attention_mask, keep, group), group.completion) for group in groups
            ]
            logps, entropies, vocabulary = (scatter(tensors, groups, keep) for tensors in zip(*results, strict=True))
        else:
            logps, entropies, vocabulary = score(input_ids, attention_mask, keep, batch_size=batch_size)
        assert logps is not None
        if self._kept is not None and entropies is not None:
            self._kept.append(Scores(logps, entropies, vocabulary))
        return logps, entropies, None

    def _vocabulary_sums(self, policy: Any, keep: int) -> AbstractContextManager[list[Tensor]]:
        if self.estimator not in VOCABULARY_ESTIMATORS:
            return nullcontext([])
        return vocabulary_scores(
            policy.get_base_model() if hasattr(policy, "get_base_model") else policy,  # PEFT
            estimator=self.estimator,
            temperature=self.temperature,
            keep=keep,
            head_in_fp32=self.head_in_fp32,
        )


def scoring_arguments(batch: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
    """Return the arguments that TRL's own scoring pass gives to a forward, by position and by name."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    multimodal = {name: value for name, value in batch.items() if name in MULTIMODAL}
    return (ids, mask, batch["completion_ids"].size(1)), multimodal
