"""Columns of data sets: which one holds the problem and which the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from opefo_trl.data.templates import text_of

# Names that data sets use, in order of preference and in any case
PROBLEM_COLUMNS = ("problem", "question")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "expected_answer", "final_answer", "solution")


def find_column(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """Return the first of `names` that is one of `columns`, in any case, spelled as in `columns`."""
    spelled = {column.lower(): column for column in sorted(columns)}  # "answer" sorts after "Answer" and wins
    return next((spelled[name] for name in names if name in spelled), None)


def bare_problems(dataset: Dataset, prompt_column: str | None = None, answer_column: str | None = None) -> Dataset:
    """
    Return the data with the columns that TRL and our rewards expect: `prompt`, and `answer` if there is one.

    A column that is not named is looked up by its usual names. It may be a field of another column
    (`reward_model.ground_truth`).
    """
    columns = [*dataset.column_names, *dataset.features.flatten()]
    prompt = prompt_column or find_column(("prompt", *PROBLEM_COLUMNS), dataset.column_names) or "prompt"
    answer = answer_column or find_column(ANSWER_COLUMNS, columns)
    for option, column in (("prompt_column", prompt), ("answer_column", answer)):
        if column is not None and column not in columns:
            raise ValueError(
                f"The data has no column {column!r}; it has {', '.join(dataset.column_names)}. Name the one with the "
                f"{option.removesuffix('_column')}: --{option} NAME."
            )
    dataset = _as_column(dataset, prompt, "prompt", keep=prompt_column is None)
    if answer is not None:
        dataset = _as_column(dataset, answer, "answer", keep=answer_column is None)
    for column, source in (("prompt", prompt), ("answer", answer)):
        values = dataset[column] if source is not None else ()
        empty = [index for index, value in enumerate(values) if _is_empty(column, value)]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(dataset)} rows are empty in column {source!r}; the first is row {empty[0]}, "
                "counted from 0. Remove them from the data."
            )
    return dataset


def _as_column(dataset: Dataset, old: str, new: str, keep: bool) -> Dataset:
    """Return the data with column `old` named `new`; `keep` leaves `old` too, for rewards that read it."""
    if old == new:
        return dataset
    nested = old not in dataset.column_names
    values = list((dataset.flatten() if nested else dataset)[old]) if nested or keep else None
    if new in dataset.column_names:
        dataset = dataset.remove_columns(new)
    return dataset.rename_column(old, new) if values is None else dataset.add_column(new, values)


def _is_empty(column: str, value: Any) -> bool:
    if column == "prompt" and value is not None:
        return not text_of(value).strip()
    return value is None or value != value or value == [] or (isinstance(value, str) and not value.strip())
