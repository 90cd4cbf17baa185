"""Maths benchmarks to measure a model on: the six of the paper, and GSM8K, from the Hub, a folder or a file.

Every source has its own columns and its own way to write an answer. What cannot be read, a row that is missing and one
that is too many are errors here: later they would only be a wrong score.
"""

from __future__ import annotations

import os

from datasets import Dataset, DatasetInfo

from opefo_trl.data.benchmarks.rows import normalise
from opefo_trl.data.benchmarks.sources import find_rows
from opefo_trl.data.benchmarks.table import BENCHMARKS, SIX, Benchmark, Source, benchmark_name

__all__ = ["BENCHMARKS", "SIX", "Benchmark", "Source", "benchmark_name", "load_benchmark"]


def load_benchmark(name: str, source: str | os.PathLike[str] | None = None) -> Dataset:
    """The problems of a benchmark in the order of their source: `id`, `problem`, `answer`, all of them texts.

    `source` is a folder that holds `aime24.jsonl` or copies of Hub data sets (`math-ai__aime24`), such a copy, a file,
    or a name on the Hub; None is the benchmark's own place there. `info.description` says where the rows are from.
    """
    name = benchmark_name(name)
    benchmark = BENCHMARKS[name]
    rows, origin = find_rows(name, source)
    info = DatasetInfo(description=f"{benchmark.title} from {origin}")
    return Dataset.from_list(normalise(rows, name, benchmark, origin), info=info)
