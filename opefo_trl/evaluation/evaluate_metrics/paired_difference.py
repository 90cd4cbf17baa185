"""A paired difference of avg@k or pass@k as a metric of `evaluate`."""

from dataclasses import asdict
from typing import Any

from opefo_trl.evaluation import evaluate_metrics, metrics


class PairedDifference(evaluate_metrics.Measure):
    """Paired difference of avg@k or pass@k on the same problems, with an interval and a permutation test."""

    inputs = {"predictions": evaluate_metrics.SAMPLES, "references": evaluate_metrics.SAMPLES}

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], k: int | None = None, **options: Any
    ) -> dict[str, float]:
        """
        `predictions`: for each problem its samples, 1 (right) or 0. `references`: the same for the baseline.
        `k`: for pass@k; the share of right samples if None. Options: `level`, `resamples`, `seed`.
        """
        before, after = (evaluate_metrics.per_problem(samples, k) for samples in (references, predictions))
        return asdict(metrics.paired_difference(before, after, **options))
