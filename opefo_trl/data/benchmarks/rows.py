"""Rows in the columns of their source, brought to `id`, `problem` and `answer`."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

from opefo_trl.data.benchmarks.table import Benchmark
from opefo_trl.data.columns import ANSWER_COLUMNS, PROBLEM_COLUMNS, find_column
from opefo_trl.data.templates import strip_dapo_template
from opefo_trl.grading.answers import boxes_of

_Row = dict[str, Any]

_ID_COLUMNS = ("id", "unique_id", "problem_idx", "idx")
_COPIES = 32  # times that a source made for avg@32 repeats every row

# math-ai/aime25 had its backslashes read as escapes: \frac begins with a form feed, \triangle with a tab. MATH-500 has
# genuine tabs, before "return" and "equal", so a tab or a carriage return is repaired only where that gives a LaTeX
# command.
_BROKEN_ESCAPE = re.compile(
    r"[\f\x08](?=[A-Za-z])"
    r"|\t(?=(?:riangle|imes|heta|ext|frac|binom|au|ilde|herefore)(?![a-z]))"
    r"|\r(?=(?:ight|angle|ho|ceil|floor)(?![a-z]))"
)
_LETTERS = {"\f": "f", "\b": "b", "\t": "t", "\r": "r"}


def normalise(rows: list[_Row], name: str, benchmark: Benchmark, origin: str) -> list[dict[str, str]]:
    """Return rows of `id`, `problem` and `answer`: each problem once, and as many as the benchmark has."""
    rows, origin = _rows_of_year(rows, benchmark, origin)
    if not {len(rows), len(rows) / _COPIES} & set(benchmark.counts):
        wanted = " or ".join(map(str, benchmark.counts))
        raise ValueError(f"{benchmark.title} has {wanted} problems, but {len(rows)} rows came from {origin}.")
    if {"prompt", "reward_model"} <= rows[0].keys():
        rows = [_from_dapo(row, index, origin) for index, row in enumerate(rows)]
    problem_column = _required_column(PROBLEM_COLUMNS, rows, origin)
    answer_column = _required_column(ANSWER_COLUMNS, rows, origin)
    normalised = []
    for index, row in enumerate(rows):
        try:
            problem, answer = _problem(row[problem_column]), _answer(row[answer_column], answer_column, benchmark)
        except ValueError as error:
            raise ValueError(f"{_location(row, index, origin)} {error}.") from None
        normalised.append({"id": _id(row), "problem": problem, "answer": answer})
    return _with_ids(_without_copies(normalised, 1 if len(rows) in benchmark.counts else _COPIES, origin), name)


def _rows_of_year(rows: list[_Row], benchmark: Benchmark, origin: str) -> tuple[list[_Row], str]:
    """Keep the benchmark's year where a source has several: 40 of the 83 rows in AI-MO/aimo-validation-amc."""
    if not benchmark.year or len(rows) in benchmark.counts or not rows or "url" not in rows[0]:
        return rows, origin
    kept = [row for row in rows if benchmark.year in str(row.get("url"))]
    return kept, f"{origin} ({len(kept)} of its {len(rows)} rows are from {benchmark.year} by their url)"


def _from_dapo(row: _Row, index: int, origin: str) -> _Row:
    """Take the problem out of DAPO's template, and the answer out of `reward_model`."""
    with_id = {"id": (row.get("extra_info") or {}).get("index")}
    prompt = row["prompt"] or ""
    problem = strip_dapo_template(prompt)
    if problem == prompt:
        raise ValueError(f"{_location(with_id, index, origin)} has a prompt that is not in DAPO's template.")
    return {**with_id, "problem": problem, "answer": (row["reward_model"] or {}).get("ground_truth")}


def _location(row: _Row, index: int, origin: str) -> str:
    identifier = f" (id {_id(row)})" if _id(row) else ""
    return f"Row {index}{identifier} of {origin}, counted from 0,"


def _required_column(names: tuple[str, ...], rows: list[_Row], origin: str) -> str:
    column = find_column(names, [name for name in rows[0] if all(name in row for row in rows)])
    if column is None:
        raise ValueError(
            f"{origin} has the columns {', '.join(rows[0])}; the {names[0]} must be in one of {', '.join(names)}."
        )
    return column


def _problem(value: Any) -> str:
    text = _mend_escapes(value) if isinstance(value, str) else ""
    if not text:
        raise ValueError("has no problem text")
    return text


def _answer(value: Any, column: str, benchmark: Benchmark) -> str:
    text = _answer_text(value)
    boxes = boxes_of(text)
    if column.lower() == "solution" and not boxes:
        raise ValueError(r"has a solution without an answer in \boxed{}")
    answer = benchmark.read_answer(boxes[-1] if boxes else text).strip()
    if not answer:
        raise ValueError("has an empty answer")
    return answer


def _answer_text(value: Any) -> str:
    """Return an answer of any type as text: 27.0 as `27`, a list joined with commas."""
    if isinstance(value, str) and value.strip() not in ("", "nan", "None"):
        return _mend_escapes(value)
    if isinstance(value, list) and value:
        return ", ".join(map(_answer_text, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"has no answer, but {value!r}")
    return str(int(value)) if value == int(value) else repr(value)


def _mend_escapes(text: str) -> str:
    return _BROKEN_ESCAPE.sub(lambda match: "\\" + _LETTERS[match[0]], text).strip()


def _id(row: _Row) -> str:
    """Return the source's own id of a row, or an empty text."""
    column = find_column(_ID_COLUMNS, [name for name, value in row.items() if value is not None])
    value = row[column] if column else ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _without_copies(rows: list[dict[str, str]], copies: int, origin: str) -> list[dict[str, str]]:
    """Keep each problem once; one that is not there `copies` times with a single answer is an error."""
    by_problem: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    for problem, group in by_problem.items():
        answers = sorted({row["answer"] for row in group})
        if len(group) != copies or len(answers) > 1:
            raise ValueError(
                f"{origin} has a problem {len(group)} times instead of {copies}, with the answer "
                f"{' and '.join(answers)}: {textwrap.shorten(problem, 80)!r}."
            )
    return [group[0] for group in by_problem.values()]


def _with_ids(rows: list[dict[str, str]], name: str) -> list[dict[str, str]]:
    """Prefix ids with the benchmark's name. Number the rows from 0 unless each has an id of its own."""
    ids = [row["id"].removeprefix(f"{name}-") for row in rows]
    if not all(ids) or len(set(ids)) < len(ids):
        ids = [str(index) for index in range(len(rows))]
    return [{**row, "id": f"{name}-{own_id}"} for row, own_id in zip(rows, ids, strict=True)]
