from __future__ import annotations

from opefo_trl.evaluation import evaluate_metrics, metrics


class AvgAtK(evaluate_metrics.Measure):
    """The share of right samples, mean over problems."""

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        """`predictions`: of each problem its samples, 1 (right) or 0."""
        return {"avg_at_k": metrics.avg_at_k(predictions)}
