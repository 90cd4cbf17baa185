"""Rows of invented benchmarks, and files of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from opefo_trl.data.benchmarks import BENCHMARKS, load_benchmark

COUNTS = {name: max(benchmark.counts) for name, benchmark in BENCHMARKS.items()}


def rows_of(name: str, **first: object) -> list[dict]:
    """As many rows as the benchmark has; fields of the first one may be given."""
    rows = [{"id": str(n), "problem": f"Problem {n}?", "answer": str(n)} for n in range(COUNTS[name])]
    rows[0].update(first)
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(name: str, source: object, load: Callable = load_benchmark) -> str:
    """Return the error of loading a benchmark, which must be one line."""
    with pytest.raises(ValueError) as caught:
        load(name, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)
