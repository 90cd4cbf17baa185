r"""Answers in completions: which part of a text is the answer. math-verify compares it with the gold later.

A policy decides what counts as the answer. None of them guesses, and of several answers the last one counts.

    boxed         content of the last closed, non-empty \boxed{} or \fbox{}. For training
    answer_line   text after the last "Answer:" that begins a line, as DAPO's prompt asks. For training on DAPO
    lenient       the last box; without a box, what math-verify finds in the last 2,000 characters: an announced final
                  answer, a formula, or the last number. For evaluation
"""

from __future__ import annotations

import re
from typing import Any

POLICIES = ("boxed", "answer_line", "lenient")
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}")
_VISIBLE = re.compile(r"\S")
_ANSWER_LINE = re.compile(r"^[ \t*#>]*answer[ \t*]*:[ \t*]*(\S[^\n]*)$", re.IGNORECASE | re.MULTILINE)


def boxes_of(text: str) -> list[str]:
    r"""
    Return the contents of the closed, non-empty boxes of a text, in order. A box within a box is part of the outer
    one. `\{` and `\}` are not braces. Linear in the length of the text.
    """
    open_braces: list[int | None] = []  # for each open brace: where its content begins if it is a box, else None
    boxes: list[tuple[int, int]] = []  # start and end of each content
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and _VISIBLE.search(text, start, match.start()):
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, match.start()))
        elif token == "{":
            open_braces.append(None)
        elif len(token) > 2:
            open_braces.append(match.end())
    return [text[start:end] for start, end in boxes]


def answer_of(completion: str, policy: str) -> str | None:
    """Return the answer under a policy. For `lenient` that is a boxed one only: math-verify looks for the others."""
    if policy == "answer_line":
        lines = _ANSWER_LINE.findall(completion)
        return lines[-1].strip().removesuffix("**").strip() if lines else None
    boxes = boxes_of(completion)
    return boxes[-1].strip() if boxes else None


def without_thinking(completion: str) -> str:
    """Return what follows the thinking of a completion: nothing, if it ends while the model still thinks."""
    before, closed, after = completion.rpartition("</think>")
    return after if closed else before if "<think>" in completion else completion


def bare(gold: Any) -> str:
    """Return a gold answer as bare text: taken out of its box, from behind GSM8K's `####`, or out of dollars."""
    if isinstance(gold, list | tuple):
        return ", ".join(bare(item) for item in gold)
    text = "" if gold is None or gold != gold else str(gold).rsplit("####", 1)[-1].strip()
    boxes = boxes_of(text)
    text = boxes[-1].strip() if boxes else text
    inner = text.strip("$")
    return inner.strip() if text.startswith("$") and text.endswith("$") and "$" not in inner else text


def is_answer(gold: str) -> bool:
    """Return whether a gold is no sentence and its braces match. (math-verify reads something in nearly any text.)"""
    depth = 0
    for token in _BOX_OR_BRACE.findall(gold):
        depth += -1 if token == "}" else token.endswith("{") and token != r"\{"
        if depth < 0:
            return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", _TEXT_COMMAND.sub(" ", gold))
    return depth == 0 and len(words) < (20 if "=" in gold else 3)
