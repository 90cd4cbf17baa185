"""A bootstrap interval of avg@k or pass@k as a metric of `evaluate`."""

from statistics import fmean
from typing import Any

from opefo_trl.evaluation import evaluate_metrics, metrics


class BootstrapInterval(evaluate_metrics.Measure):
    """avg@k or pass@k, and its percentile bootstrap interval over problems."""

    def _compute(self, predictions: list[list[float]], k: int | None = None, **options: Any) -> dict[str, float]:
        """
        `predictions`: for each problem its samples, 1 (right) or 0. `k`: for pass@k; the share of right samples if
        None. Options: `level`, `resamples`, `seed`.
        """
        values = evaluate_metrics.per_problem(predictions, k)
        low, high = metrics.bootstrap_interval(values, **options)
        return {"mean": fmean(values), "low": low, "high": high}
