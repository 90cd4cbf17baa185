"""Tasks that come with the package: rows of two splits, and a judge of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from opefo_trl.validation import check_choice

__all__: list[str] = []

Judge = Callable[[str, Any], bool]  # of an answer, given what the gold column of its row holds


@dataclass(frozen=True)
class EmbeddedTask:
    """
    A task that comes with the package. Its name is that of its data set, its reward and its benchmark.

    Attributes:
        title (`str`): its name in tables.
        gold (`str`): the column that says which answers are right.
        splits (`dict`): a question for each gold; `train` and `test` have nothing in common.
        is_right (`Callable`): judges an answer, given its gold.
        normal_form (`Callable`): of an answer; answers with the same normal form count as one.
        max_new_tokens (`int`): enough for any right answer.
    """

    title: str
    gold: str
    splits: dict[str, dict[Any, str]]
    is_right: Judge
    normal_form: Callable[[str], str]
    max_new_tokens: int

    def dataset(self, split: str = "train") -> Dataset:
        """Return conversational prompts, each with its gold."""
        check_choice("split", split, self.splits, where=f" of the {self.title.lower()}")
        return Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": question}], self.gold: gold}
                for gold, question in self.splits[split].items()
            ]
        )


def judge(completions: list[Any], golds: Iterable[Any], is_right: Judge) -> list[float | None]:
    """Return 1 for a right answer, else 0; completions are plain or conversational, as in TRL."""
    answers = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_right(answer.strip(), gold)) for answer, gold in zip(answers, golds, strict=True)]
