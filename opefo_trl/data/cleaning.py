"""Cleaning of training data: no prompt baked into the problems, no repetitions, no problem of a benchmark."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from datasets import Dataset

from opefo_trl.data.templates import problem_text, strip_dapo_template, text_of
from opefo_trl.grading.answers import bare as bare_answer

_NGRAM = 8  # words
_SHARED_NGRAMS = 0.5  # a problem with this share of a benchmark problem's n-grams is taken for the same problem


@dataclass(frozen=True)
class Cleaned:
    """Counts of what cleaning removed from a data set."""

    rows: int  # before cleaning
    repeated: int = 0  # rows that repeat an earlier problem
    disputed: int = 0  # problems whose copies have different answers
    leaked: dict[str, list[str]] = field(default_factory=dict)  # benchmark -> its problems that were removed

    def __str__(self) -> str:
        removed = [f"{self.repeated} repetitions"] if self.repeated else []
        removed += [f"{self.disputed} problems with contradictory answers"] if self.disputed else []
        removed += [f"{len(texts)} problems of {name}" for name, texts in self.leaked.items() if texts]
        return f"{self.rows} rows" + (f", without {', '.join(removed)}" if removed else "")


def clean(
    dataset: Dataset, unique: bool = True, bare: bool = False, benchmarks: dict[str, Sequence[str]] | None = None
) -> tuple[Dataset, Cleaned]:
    """Return the data and counts of what was removed: repetitions and disputed problems if `unique`, the words of
    DAPO's template if `bare`, and the problems of `benchmarks`."""
    rows, repeated, disputed = len(dataset), 0, 0
    if unique:
        answers = dataset["answer"] if "answer" in dataset.column_names else None
        kept, repeated, disputed = _each_once(dataset["prompt"], answers)
        dataset = dataset if len(kept) == rows else dataset.select(kept)
    prompts = list(dataset["prompt"])
    problems = [strip_dapo_template(prompt) for prompt in prompts]
    if bare and len({isinstance(problem, str) for problem in problems}) > 1:
        raise ValueError(
            "Some prompts are in DAPO's template and others are conversations of another kind. Remove one kind from "
            "the data, or leave all prompts as they are: --prompt_template none."
        )
    if bare and any(problem is not prompt for problem, prompt in zip(problems, prompts, strict=True)):
        dataset = dataset.remove_columns("prompt").add_column("prompt", problems)
    leaks = {name: overlapping(map(text_of, problems), texts) for name, texts in (benchmarks or {}).items()}
    leaked_rows = set().union(*leaks.values())
    if leaked_rows:
        dataset = dataset.select([row for row in range(len(dataset)) if row not in leaked_rows])
    leaked = {name: [text_of(problems[row]) for row in indices] for name, indices in leaks.items()}
    return dataset, Cleaned(rows, repeated, disputed, leaked)


def _each_once(problems: Iterable[Any], answers: Iterable[Any] | None) -> tuple[list[int], int, int]:
    """Return the rows to keep, the number of repetitions, and the number of problems whose copies have different
    answers. Texts that differ in white space only are the same."""
    first_row: dict[str, int] = {}
    first_answer: dict[str, str] = {}
    disputed: set[str] = set()
    count = 0
    for problem, answer in zip(problems, repeat(None) if answers is None else answers, strict=False):
        text = problem_text(problem)
        answer_text = " ".join(bare_answer(answer).split())  # of two solutions, the answers count
        first_row.setdefault(text, count)
        if first_answer.setdefault(text, answer_text) != answer_text:
            disputed.add(text)
        count += 1
    kept = [row for text, row in first_row.items() if text not in disputed]
    return kept, count - len(first_row), len(disputed)


def overlapping(problems: Iterable[str], benchmark: Sequence[str]) -> list[int]:
    """
    Return the indices of problems that hold at least half of the 8-word sequences of a benchmark's problem.

    A single common sequence does not count, because phrases of that length ("where m and n are relatively prime
    positive integers") recur in unrelated problems. A benchmark problem of fewer words is one sequence.
    """
    benchmark_grams = [_ngrams(words, max(1, min(_NGRAM, len(words)))) for words in map(_words, benchmark)]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # n-gram -> the benchmark problems that hold it
    for index, ngrams in enumerate(benchmark_grams):
        for ngram in ngrams:
            holders[ngram].append(index)
    sizes = {len(ngram) for ngram in holders}
    matches = []
    for row, text in enumerate(problems):
        words = _words(text)
        common: Counter[int] = Counter()
        for size in sizes:
            for ngram in _ngrams(words, size):
                common.update(holders.get(ngram, ()))
        if any(count >= _SHARED_NGRAMS * len(benchmark_grams[index]) for index, count in common.items()):
            matches.append(row)
    return matches


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def _ngrams(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
