"""Problems as they should be trained on: without a prompt around them, each once, and none of a benchmark's.

kept, repeated, disputed = each_once(dataset["prompt"], dataset["answer"])
leaked = overlapping(dataset["prompt"], load_benchmark("aime24")["problem"])
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

# Around each problem of DAPO's data. It asks for a line "Answer:", which the reward `math_answer_line` reads
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
GRAM, SHARE = 8, 0.5  # words, and of a benchmark's problem the part that gives it away


def problem_of(prompt: Any) -> Any:
    """The problem that DAPO's prompt was put around, to the letter; any other prompt as it is."""
    text = prompt
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].get("role") == "user":
        text = prompt[0].get("content")
    if isinstance(text, str) and text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER):
        return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER)
    return prompt


def text_of(prompt: Any) -> str:
    """What a prompt says, as a text or as a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content") or "") for message in prompt)


def each_once(problems: Iterable[Any], answers: Iterable[Any] | None = None) -> tuple[list[int], int, int]:
    """
    Which rows to keep, how many were repetitions, and how many problems were dropped because their copies disagree
    about the answer. Problems are the same whose texts are, but for spaces.
    """
    first: dict[str, int] = {}
    said: dict[str, str] = {}
    disputed: set[str] = set()
    count = 0
    for problem, answer in zip(problems, repeat(None) if answers is None else answers, strict=False):
        text, words = " ".join(text_of(problem_of(problem)).split()), " ".join(str(answer).split())
        first.setdefault(text, count)
        if said.setdefault(text, words) != words:
            disputed.add(text)
        count += 1
    kept = [place for text, place in first.items() if text not in disputed]
    return kept, count - len(first), len(disputed)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


def grams_of(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[place : place + size]) for place in range(len(words) - size + 1)}


def overlapping(
    problems: Iterable[str], benchmark: Sequence[str], gram: int = GRAM, share: float = SHARE
) -> list[int]:
    """
    Which problems hold at least `share` of the `gram`-word sequences of a benchmark's problem. A share, because single
    ones of such length ("where m and n are relatively prime positive integers") are in problems of their own.
    """
    if gram < 1 or not 0 < share <= 1:
        raise ValueError(f"`gram={gram}` must be 1 or more, and `share={share}` in (0, 1].")
    # A problem of fewer words is one sequence; one without any is none
    asked = [grams_of(words, max(1, min(gram, len(words)))) for words in map(words_of, benchmark)]
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, grams in enumerate(asked):
        for found in grams:
            places[found].append(place)
    sizes = {len(found) for found in places}
    hit = []
    for index, text in enumerate(problems):
        words = words_of(text)
        common: Counter[int] = Counter()
        for size in sizes:
            for found in grams_of(words, size):
                common.update(places.get(found, ()))
        if any(count >= share * len(asked[place]) for place, count in common.items()):
            hit.append(index)
    return hit
