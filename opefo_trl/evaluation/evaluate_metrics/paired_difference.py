from __future__ import annotations

from dataclasses import asdict
from typing import Any

from opefo_trl.evaluation import evaluate_metrics, metrics


class PairedDifference(evaluate_metrics.Measure):
    """How much better avg@k or pass@k is than before, on the same problems: interval and permutation test."""

    inputs = {"predictions": evaluate_metrics.SAMPLES, "references": evaluate_metrics.SAMPLES}

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], k: int | None = None, **options: Any
    ) -> dict[str, float]:
        """
        `predictions`: of each problem its samples, 1 (right) or 0. `references`: those of before, or of the baseline.
        `k`: of pass@k; the share of right samples if None. Options: `level`, `resamples`, `seed`.
        """
        before, after = (evaluate_metrics.per_problem(samples, k) for samples in (references, predictions))
        return asdict(metrics.paired_difference(before, after, **options))
