"""The words task, for a small language model: write an English word that begins with some letters.

    Answer with one word. Write an English word that starts with BR.   ->   brook   Bread.   bring ...

An answer is right if it is one word of the list in words.txt, in any case, with or without a full stop. The list has
38,842 common words of at least three letters, from SCOWL (words.LICENSE). No letter of a held-out prompt is in a
prompt that is trained on.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from opefo_trl.playground.embedded import EmbeddedTask, judge

__all__: list[str] = []

_SINGLE = re.compile(r"([A-Za-z]+)[.!]?")

# Beginnings of at least 60 words of the list (one letter: of at least 100)
_HELD_OUT = "d f g i n o u di do du fi fo fu gi go gu in ni no nu ou un"
_TRAINED = """
    a b c e h j k l m p q r s t v w y
    ab ac al am ap ar as at ba be bl br ca ce ch cl cr ea el em ev ex ha he hy ja je la le ma me pa pe ph pl pr ra re
    sa sc se sh sk sl sm sp sq st sw sy ta te th tr tw va ve wa we wh wr
"""


@cache
def word_list() -> frozenset[str]:
    """Return the words that count."""
    return frozenset(Path(__file__).with_name("words.txt").read_text().split())


def question(letters: str) -> str:
    named = f"the letter {letters.upper()}" if len(letters) == 1 else letters.upper()
    return f"Answer with one word. Write an English word that starts with {named}."


def normal_form(answer: str) -> str:
    """Return the word alone, in lower case; an answer that is no single word stays as it is."""
    single = _SINGLE.fullmatch(answer.strip())
    return single[1].lower() if single else answer.strip()


def is_right(answer: str, letters: str) -> bool:
    word = normal_form(answer)
    return word.startswith(letters) and word in word_list()


def words_reward(completions: list[Any], letters: list[str], **_: Any) -> list[float | None]:
    """Return 1 for a single English word that begins with `letters`, else 0."""
    return judge(completions, letters, is_right)


words_reward.normal_form = normal_form  # type: ignore[attr-defined]

TASK = EmbeddedTask(
    title="Words",
    gold="letters",
    splits={
        split: {letters: question(letters) for letters in beginnings.split()}
        for split, beginnings in (("train", _TRAINED), ("test", _HELD_OUT))
    },
    is_right=is_right,
    normal_form=normal_form,
    max_new_tokens=10,
)
