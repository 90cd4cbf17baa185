from __future__ import annotations

from opefo_trl.evaluation import evaluate_metrics, metrics


class MajorityAtK(evaluate_metrics.Measure):
    """majority@k: 1 if the most frequent answer of k samples is right, else 0, averaged over problems."""

    inputs = {"predictions": evaluate_metrics.ANSWERS, "references": evaluate_metrics.SAMPLES}

    def _compute(
        self, predictions: list[list[str | None]], references: list[list[float]], k: int | None = None
    ) -> dict[str, float]:
        """
        `predictions`: for each problem its answers, None where a sample has none. `references`: for each its verdict,
        1 or 0. `k`: how many samples vote together, all of them if None.
        """
        return {"majority_at_k": metrics.majority_at_k(predictions, references, k)}
