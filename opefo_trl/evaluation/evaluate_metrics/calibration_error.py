"""The expected calibration error as a metric of `evaluate`."""

from opefo_trl.evaluation import evaluate_metrics, metrics


class CalibrationError(evaluate_metrics.Measure):
    """Expected calibration error: distance of confidence from the share of right samples, over bins of confidence."""

    inputs = {"predictions": evaluate_metrics.NUMBER, "references": evaluate_metrics.NUMBER}

    def _compute(self, predictions: list[float], references: list[float], bins: int = 10) -> dict[str, float]:
        """`predictions`: confidence of each sample, in [0, 1]. `references`: its verdict, 1 or 0."""
        return {"calibration_error": metrics.calibration_error(predictions, references, bins)}
