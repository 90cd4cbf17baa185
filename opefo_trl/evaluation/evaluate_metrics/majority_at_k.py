"""majority@k as a metric of `evaluate`."""

from opefo_trl.evaluation import evaluate_metrics, metrics


class MajorityAtK(evaluate_metrics.Measure):
    """majority@k: the share of votes won by a right answer, averaged over problems; samples vote in consecutive blocks
    of k."""

    inputs = {"predictions": evaluate_metrics.ANSWERS, "references": evaluate_metrics.SAMPLES}

    def _compute(
        self, predictions: list[list[str | None]], references: list[list[float]], k: int | None = None
    ) -> dict[str, float]:
        """
        `predictions`: for each problem its answers, None where a sample has none. `references`: for each its verdict,
        1 or 0. `k`: samples that vote together, all of them if None; tied answers share the vote.
        """
        return {"majority_at_k": metrics.majority_at_k(predictions, references, k)}
