"""pass@k as a metric of `evaluate`."""

from collections.abc import Sequence

from opefo_trl.evaluation import evaluate_metrics, metrics


class PassAtK(evaluate_metrics.Measure):
    """pass@k: the chance that one of k samples is right, as an unbiased estimate averaged over problems."""

    def _compute(self, predictions: list[list[float]], k: int | Sequence[int] = 1) -> dict[str, float]:
        """`predictions`: for each problem its samples, 1 (right) or 0. `k`: a number, or several."""
        return {f"pass@{one}": metrics.pass_at_k(predictions, one) for one in (k if isinstance(k, Sequence) else [k])}
