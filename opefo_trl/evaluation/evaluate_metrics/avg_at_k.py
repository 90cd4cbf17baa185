"""avg@k as a metric of `evaluate`."""

from opefo_trl.evaluation import evaluate_metrics, metrics


class AvgAtK(evaluate_metrics.Measure):
    """avg@k: the share of right samples, averaged over problems."""

    def _compute(self, predictions: list[list[float]]) -> dict[str, float]:
        """`predictions`: for each problem its samples, 1 (right) or 0."""
        return {"avg_at_k": metrics.avg_at_k(predictions)}
