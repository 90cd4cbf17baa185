"""Maths benchmarks to evaluate on: the six of the paper and GSM8K, from the Hub, a folder or a file.

Each source has its own columns and its own way to write an answer. An answer that cannot be read, a missing row and a
row too many raise here, because later they would only show as a wrong score.
"""

from __future__ import annotations

import os

from datasets import Dataset, DatasetInfo

from opefo_trl.data.benchmarks.rows import normalise
from opefo_trl.data.benchmarks.sources import find_rows
from opefo_trl.data.benchmarks.table import BENCHMARKS, SIX, Benchmark, Source, benchmark_name

__all__ = ["BENCHMARKS", "SIX", "Benchmark", "Source", "benchmark_name", "load_benchmark"]


def load_benchmark(name: str, source: str | os.PathLike[str] | None = None) -> Dataset:
    """Load the problems of a benchmark in the order of their source, as text columns `id`, `problem`, `answer`.

    Args:
        name (`str`): a name of `BENCHMARKS`, in any case, with or without dashes.
        source (`str` or `Path`, *optional*): a file, a folder that holds `aime24.jsonl` or copies of Hub data sets
            (`math-ai__aime24`), such a copy itself, or a name on the Hub. By default the benchmark's own place on the
            Hub. `info.description` of the result says where the rows come from.
    """
    name = benchmark_name(name)
    benchmark = BENCHMARKS[name]
    rows, origin = find_rows(name, source)
    info = DatasetInfo(description=f"{benchmark.title} from {origin}")
    return Dataset.from_list(normalise(rows, name, benchmark, origin), info=info)
