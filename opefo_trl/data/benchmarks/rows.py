"""Rows as their source has them, made into `id`, `problem` and `answer`."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

from opefo_trl.data.benchmarks.table import Benchmark
from opefo_trl.data.cleaning import problem_of
from opefo_trl.grading.grader import boxes_of

Row = dict[str, Any]

PROBLEM = ("problem", "question")
ANSWER = ("answer", "final_answer", "expected_answer", "solution")
ID = ("id", "unique_id", "problem_idx", "idx")

COPIES = 32  # a source made for avg@32 holds every row so many times

# math-ai/aime25 had its backslashes read as escapes: \frac begins with a form feed, \triangle with a tab. MATH-500 has
# good tabs, before "return" and "equal", so a tab or a return is mended only where it makes a command of LaTeX.
_BROKEN_ESCAPE = re.compile(
    r"[\f\x08](?=[A-Za-z])"
    r"|\t(?=(?:riangle|imes|heta|ext|frac|binom|au|ilde|herefore)(?![a-z]))"
    r"|\r(?=(?:ight|angle|ho|ceil|floor)(?![a-z]))"
)
_LETTERS = {"\f": "f", "\b": "b", "\t": "t", "\r": "r"}


def normalise(rows: list[Row], name: str, benchmark: Benchmark, origin: str) -> list[dict[str, str]]:
    """Rows of `id`, `problem` and `answer`: as many as the benchmark has, each problem once."""
    rows, origin = _of_the_year(rows, benchmark, origin)
    if not {len(rows), len(rows) / COPIES} & set(benchmark.counts):
        wanted = " or ".join(map(str, benchmark.counts))
        raise ValueError(f"{benchmark.title} has {wanted} problems, but {len(rows)} rows came from {origin}.")
    if {"prompt", "reward_model"} <= rows[0].keys():
        rows = [_from_dapo(row, index, origin) for index, row in enumerate(rows)]
    problem, answer = _column(rows, PROBLEM, origin), _column(rows, ANSWER, origin)
    found = []
    for index, row in enumerate(rows):
        try:
            text, gold = _problem(row[problem]), _answer(row[answer], answer, benchmark)
        except ValueError as error:
            raise ValueError(f"Row {index}{_called(row)} of {origin}, counted from 0, {error}.") from None
        found.append({"id": _id(row), "problem": text, "answer": gold})
    return _with_ids(_distinct(found, 1 if len(rows) in benchmark.counts else COPIES, origin), name)


def _of_the_year(rows: list[Row], benchmark: Benchmark, origin: str) -> tuple[list[Row], str]:
    """Of a source with several years, the rows of this one: 40 of the 83 in AI-MO/aimo-validation-amc."""
    if not benchmark.year or len(rows) in benchmark.counts or not rows or "url" not in rows[0]:
        return rows, origin
    kept = [row for row in rows if benchmark.year in str(row.get("url"))]
    return kept, f"{origin} ({len(kept)} of its {len(rows)} rows are from {benchmark.year} by their url)"


def _from_dapo(row: Row, index: int, origin: str) -> Row:
    """A row of DAPO's kind, with the problem in a prompt that asks for "Answer:"."""
    named = {"id": (row.get("extra_info") or {}).get("index")}
    prompt = row["prompt"] or ""
    problem = problem_of(prompt)
    if problem == prompt:
        raise ValueError(
            f"Row {index}{_called(named)} of {origin}, counted from 0, has a prompt that is not in DAPO's template."
        )
    return {**named, "problem": problem, "answer": (row["reward_model"] or {}).get("ground_truth")}


def _column(rows: list[Row], wanted: tuple[str, ...], origin: str) -> str:
    there = {column.lower(): column for column in rows[0] if all(column in row for row in rows)}
    for column in wanted:
        if column in there:
            return there[column]
    raise ValueError(
        f"{origin} has the columns {', '.join(rows[0])}; the {wanted[0]} is wanted in one of {', '.join(wanted)}."
    )


def _problem(value: Any) -> str:
    text = _mended(value) if isinstance(value, str) else ""
    if not text:
        raise ValueError("has no problem text")
    return text


def _answer(value: Any, column: str, benchmark: Benchmark) -> str:
    text = _text(value)
    boxes = boxes_of(text)
    if column.lower() == "solution" and not boxes:
        raise ValueError(r"has a solution without an answer in \boxed{}")
    answer = benchmark.read_answer(boxes[-1] if boxes else text).strip()
    if not answer:
        raise ValueError("has an empty answer")
    return answer


def _text(value: Any) -> str:
    """An answer as text: 27.0 is `27`, and several are one text with commas."""
    if isinstance(value, str) and value.strip() not in ("", "nan", "None"):
        return _mended(value)
    if isinstance(value, list) and value:
        return ", ".join(map(_text, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"has no answer, but {value!r}")
    return str(int(value)) if value == int(value) else repr(value)


def _mended(text: str) -> str:
    return _BROKEN_ESCAPE.sub(lambda found: "\\" + _LETTERS[found[0]], text).strip()


def _id(row: Row) -> str:
    """What the source calls a row; nothing where it has no name for it."""
    there = {column.lower(): value for column, value in row.items() if value is not None}
    value = next((there[column] for column in ID if column in there), "")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _called(row: Row) -> str:
    return f" (id {_id(row)})" if _id(row) else ""


def _distinct(rows: list[dict[str, str]], times: int, origin: str) -> list[dict[str, str]]:
    """Each problem once, where all of them stand there `times` times with one answer."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row)
    for group in groups.values():
        answers = sorted({row["answer"] for row in group})
        if len(group) != times or len(answers) > 1:
            raise ValueError(
                f"{origin} has a problem {len(group)} times that it should have {times} times, with the answer "
                f"{' and '.join(answers)}: {textwrap.shorten(group[0]['problem'], 80)!r}."
            )
    return [group[0] for group in groups.values()]


def _with_ids(rows: list[dict[str, str]], name: str) -> list[dict[str, str]]:
    """Names that stay: the source's own, where every row has one and no two share it, or else numbers from 0."""
    ids = [row["id"].removeprefix(f"{name}-") for row in rows]
    if not all(ids) or len(set(ids)) < len(ids):
        ids = [str(index) for index in range(len(rows))]
    return [{**row, "id": f"{name}-{own}"} for row, own in zip(rows, ids, strict=True)]
