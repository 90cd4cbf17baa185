"""The sentences task, for a small language model: write a short sentence with two given words.

    Write one short sentence with the words river and lantern.   ->   The lantern lit the river.

An answer is right if it is one sentence of 5 to 14 words, four of them different and no numbers, that ends with a full
stop and has both words, as they are and in any case. Neither word of a held-out prompt is in one that is trained on.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

from opefo_trl.playground.embedded import EmbeddedTask, judge

__all__: list[str] = []

SHORTEST, LONGEST, DIFFERENT = 5, 14, 4  # words
_WORD = re.compile(r"[A-Za-z0-9]+(?:['’-][A-Za-z0-9]+)*")

_TRAINED = """
    apple bread bridge candle castle clock coat cow door dog farmer fire forest garden hammer horse island kettle king
    ladder letter mirror moon mountain needle ocean orange piano queen rain road rose ship snow spoon storm teacher
    train tower window
"""
_HELD_OUT = "river lantern bird basket winter doctor hill violin"


def normal_form(answer: str) -> str:
    """Return the words in lower case, without punctuation."""
    return " ".join(_WORD.findall(answer.lower()))


def is_right(answer: str, pair: str) -> bool:
    """Return whether `answer` is one short sentence with both words of `pair`, which are joined by a space."""
    text = answer.strip()
    words = _WORD.findall(text.lower())
    different = {word for word in words if not word.isdigit()}
    one_sentence = text.endswith(".") and not re.search(r"[.!?…\n]", text[:-1])
    is_short = SHORTEST <= len(words) <= LONGEST
    return one_sentence and is_short and len(different) >= DIFFERENT and set(pair.split()) <= different


def question(pair: str) -> str:
    first, second = pair.split()
    return f"Write one short sentence with the words {first} and {second}."


def sentences_reward(completions: list[Any], pair: list[str], **_: Any) -> list[float | None]:
    """Return 1 for one short sentence with both words of `pair`, else 0."""
    return judge(completions, pair, is_right)


sentences_reward.normal_form = normal_form  # type: ignore[attr-defined]


def _trained_pairs() -> list[str]:
    """Return pairs of every word with those that follow it 1, 7 and 16 places later in the list, which goes round."""
    words = _TRAINED.split()
    return [f"{word} {words[(index + step) % len(words)]}" for step in (1, 7, 16) for index, word in enumerate(words)]


TASK = EmbeddedTask(
    title="Sentences",
    gold="pair",
    splits={
        "train": {pair: question(pair) for pair in _trained_pairs()},
        "test": {pair: question(pair) for pair in map(" ".join, combinations(_HELD_OUT.split(), 2))},
    },
    is_right=is_right,
    normal_form=normal_form,
    max_new_tokens=32,
)
