"""Metrics of `evaluation.metrics` for Hugging Face's evaluate: `evaluate.load(metric_path("pass_at_k"))`.

Each script here becomes a metric. `evaluate.load` copies the script into `HF_MODULES_CACHE`; the copy imports from the
installed package, so it stays up to date. In one process the samples stay in memory, without files and locks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import evaluate
from datasets import Features, List, Value

from opefo_trl.evaluation import metrics

# float64 for verdicts too: an integer feature would silently turn a reward of 0.5 into 0
NUMBER = Value("float64")
SAMPLES = List(NUMBER)
# large_string, because with a plain string evaluate refuses a None in the first problem
ANSWERS = List(Value("large_string"))


class Measure(evaluate.Metric):
    """Base class: a metric described by its docstring, with the docstring of `_compute` as usage."""

    inputs: dict[str, Any] = {"predictions": SAMPLES}

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool = False, num_process: int = 1, **options: Any
    ):
        alone = num_process == 1
        super().__init__(config_name, keep_in_memory or alone, num_process=num_process, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation="",
            inputs_description=inspect.getdoc(self._compute),
            features=Features(self.inputs),
        )

    def _build_data_dir(self) -> str:
        """Make no folder if all samples stay in memory, because the home may be read-only."""
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()


def per_problem(samples: Iterable[Sequence[float]], k: int | None) -> list[float]:
    """Return the share of right samples of each problem, or its pass@k."""
    return metrics.averages(samples) if k is None else metrics.passes(samples, k)
