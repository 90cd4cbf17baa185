r"""Child process of `opefo_trl.grading.grader`: reads questions as lines of JSON and answers each with a line of JSON.

It is run as a file, so it imports math-verify and nothing of the training. `ITIMER_PROF` counts the processor time of
this process and sends SIGPROF, whose default is to end the process, even in the middle of a large power. The parent
notices that the child has ended and starts another.

Before math-verify parses an answer in a box, or a gold, `_simplify` rewrites a few forms that it misreads, and
`_choice_of` takes the letter of a multiple choice off. tests/material/boxed_answers.yaml has cases, right and wrong.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import resource
import signal
import sys
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_LATEX, _ANYTHING = (LatexExtractionConfig(),), (LatexExtractionConfig(), ExprExtractionConfig())
_DECIMALS, _DIGITS = 6, 15  # to which math-verify compares
_OUT_OF_MEMORY = 3  # exit status

_DOLLARS = re.compile(r"^\$([^$]*[^$\\])\$\.?$")
_SPACE = r"(?:\\[ ,;:]|\\q?quad\b|~|\s)"
# The letter of a multiple choice: \text{(B)}, \textbf{B.}, (B), B) or B; then its value, if there is one. A letter
# without \text needs a space behind it, and no operator after that: (A) + 1 is a sum.
_CHOICE = re.compile(
    rf"(?:\\(?:text|textbf|textrm|mathrm|mathbf)\s*{{\s*\(?([A-J])(?:[).:]\s*}}|\s*}}$){_SPACE}*"
    rf"|(?:\(([A-J])\)|([A-J])[).])(?:{_SPACE}+(?![-+*/^=<>,]|\\(?!text|d?frac|sqrt))|$)|([A-J])$)(.*)",
    re.DOTALL,
)
_LETTER = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\,|\{,\}|,\\!\s*)\d{3})+(?!\d)")  # 12\,345, 12{,}345 and 12,\!345
_PAIR = re.compile(r"(?<=\d),(?=\d)")
# Other spellings of what math-verify knows, and what it misreads wherever it stands
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"~(?!=)", " "),
        (r"\\bmod(?![A-Za-z])", r"\\mod"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\dots[bc]?(?![A-Za-z])", r"\\ldots"),
        (r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }"),
        (r"°|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"(?<=\d)\s*%", r"\\%"),
        (r"_\s*\{\s*\\(max|min)\s*\}", r"_{\1}"),
        (r"\\(?:mathrm|text)\s*\{\s*([ei])\s*\}", r" \1 "),  # no unit
        (r"(\d)\.(?=/)", r"\1"),  # 3./2
        (r"\bnp\.(?=[a-z])", r"\\"),  # np.arcsin(2/3)
        (r"(?<![.\s])\s*\.\s*$", ""),  # of a sentence
        (  # an angle: \cos 40^\circ is no cosine of 40
            r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?\d+\}?)?\s*(?:\\left)?[({]?\s*)"
            r"(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})",
            r"\1{\\frac{\2\\pi}{180}}",
        ),
    )
]
# 1.5e-8, which would be 1.5 times Euler's number, less 8
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\w|\.\d)")
_EULER = re.compile(r"(?<![A-Za-z\\])e(?![A-Za-z])")
_RATIO = re.compile(r"[^:=]+(?::[^:=]+){2,}")  # 1:2:3
_MIXED = re.compile(r"(?<![\d./)}])(\d{1,9})\s+(\d{1,9})/(\d{1,9})(?![\d.])")  # 1 1/3
_REPEATING = re.compile(r"(?<!\d)(\d{0,9})\.(\d{0,9})\\overline\s*\{(\d{1,9})\}")  # 0.1\overline{6}
# 33\frac13\%
_MIXED_PERCENT = re.compile(r"(?<!\d)(\d{1,9})\s*\\[dt]?frac\s*(?:{(\d{1,9})}\s*{(\d{1,9})}|(\d)\s*(\d))\s*\\?%")
# 6m and 6m \text{ cells}, where m is no metre: that would be \text{ m}. math-verify takes these letters off.
_UNIT_LETTER = re.compile(
    rf"(?<=[\d}}\s])([cdghlmost])(?={_SPACE}*(?:\\(?:text|textrm|mathrm|mbox)\s*{{[^{{}}]*}})?\s*$)"
)
_WORDS = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_NAME = re.compile(r"\\?[A-Za-z]+(?:_(?:\w|{\w+}))?'?(\(-?\w+\))?")  # x, a_1, AB, f(2)
# x = 1 \text{ or } x = 2: several answers, and no chain; f(x) = 5 \text{ at } x = 3: a remark
_JOIN = re.compile(r"(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])")
_REMARK = re.compile(r"\\text\s*\{\s*(?:for|at|when|if|where)\b[^{}]*\}.*", re.DOTALL)
_BRACKET_OR_SIGN = re.compile(r"\\.|[{}()\[\],;]|(?<![<>!:])=", re.DOTALL)


def _sides_of(text: str) -> list[str]:
    """Return the sides of a chain of equalities: the parts between its `=`. A text with commas or an "or" is none."""
    if _JOIN.search(text):
        return [text]
    depth, cuts = 0, [-1]
    for match in _BRACKET_OR_SIGN.finditer(text):
        sign = match.group()
        depth += (sign[-1] in "{([") - (sign[-1] in "})]")  # \{ too
        if depth == 0 and sign in (",", ";"):
            return [text]
        if depth == 0 and sign == "=":
            cuts.append(match.start())
    return [text[start + 1 : end].strip() for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _simplify(text: str, gold: str) -> str:
    r"""
    Rewrite the forms that math-verify misreads, and leave all others as they are.

    What an `e` is, and a letter at the end, depends on the `gold`: Euler's number if it has one, and no unit if it has
    such a letter itself, unless that stands behind a mere number and a space.
    A chain of equalities between numbers (`17 \bmod 5 = 2`) stands for the last one. A name may stand on either side:
    `3 = x` becomes `x = 3`. In a chain from a name to a number the steps between are left out.
    """
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    if "," in gold and not re.fullmatch(r"-?\d{1,3}(,\d{3})+", gold):  # a list: 8,221 is no number
        text = _PAIR.sub(", ", text)
    if "," not in text and len(_REMARK.findall(text)) == 1:
        text = _REMARK.sub("", text) or text
    if not _EULER.search(_SCIENTIFIC.sub("", gold)):
        text = _SCIENTIFIC.sub(_product, text)
    letters = set(_WORDS.sub(" ", gold))
    if not re.fullmatch(r"-?[\d.,]+\s+\w", gold):
        text = _UNIT_LETTER.sub(lambda match: f"{{{match[1]}}}" if match[1] in letters else match[0], text)
    text = _distinguish_cases(text, letters)
    if _RATIO.fullmatch(text):
        text = f"({text.replace(':', ',')})"
    text = _MIXED.sub(lambda match: _improper(*match.groups()), text)
    text = _REPEATING.sub(_fraction, text)
    text = _MIXED_PERCENT.sub(_improper_percent, text)  # of which math-verify reads the fraction alone
    sides = _sides_of(text)
    if len(sides) == 1 or not all(sides):
        return text
    first, *_, last = sides
    numbers = [_is_number(side) for side in sides]
    if all(numbers):
        return last
    name = _NAME.fullmatch(last)
    if name and not _NAME.fullmatch(first) and (all(numbers[:-1]) or name.group(1)):
        return f"{last} = {first}"
    return f"{first} = {last}" if numbers[-1] and _NAME.fullmatch(first) else text


def _distinguish_cases(text: str, letters: set[str]) -> str:
    """Give another name to capitals that are among the gold's letters with their small one: math-verify takes R and r
    for one."""
    twins = {letter for letter in letters if letter.isupper() and letter.lower() in letters}
    if not twins:
        return text
    names = re.compile(rf"({_WORDS.pattern})|([{''.join(sorted(twins))}])(?!_)")
    return names.sub(lambda match: match[1] or f"{{{match[2]}_{{0}}}}", text)


def _product(number: re.Match[str]) -> str:
    product = rf"{number[1]} \times 10^{{{number[2]}}}"
    return rf"({product})" if number.string[: number.start()].rstrip().endswith("/") else product


def _improper_percent(mixed: re.Match[str]) -> str:
    return rf"{_improper(*filter(None, mixed.groups()))}\%"


def _improper(whole: str, above: str, below: str) -> str:
    return rf"\frac{{{int(whole) * int(below) + int(above)}}}{{{int(below)}}}"


def _fraction(repeating: re.Match[str]) -> str:
    whole, once, again = repeating.groups()
    below = 10 ** len(once) * (10 ** len(again) - 1)
    return _improper("0", str(int(f"{whole}{once}{again}") - int(f"0{whole}{once}")), str(below))


def _is_number(side: str) -> bool:
    parsed = _parse(f"\\boxed{{{side}}}", _LATEX)
    return bool(parsed) and getattr(parsed[0], "is_number", False)


def _choice_of(text: str) -> tuple[str | None, str]:
    r"""Return the letter and value of a choice: B and 12 of `\text{(B)}\ 12`. Of other texts: None, and the text."""
    match = _CHOICE.fullmatch(text.strip())
    if match is None or _LETTER.search(match[5]):  # a second letter: several choices, or a product
        return None, text
    return match[1] or match[2] or match[3] or match[4], match[5].strip()


def read(answer: str, boxed: bool, gold: str) -> list[Any]:
    """Parse an answer. Return math-verify's expression and the text it was found in, or an empty list."""
    return _parse(f"\\boxed{{{_simplify(answer, gold)}}}", _LATEX) if boxed else _parse(answer, _ANYTHING)


def _parse(text: str, targets: tuple[Any, ...]) -> list[Any]:
    try:
        return parse(text, targets, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return []


@functools.lru_cache(maxsize=4096)
def _read_gold(gold: str, boxed: bool) -> list[Any]:
    """Parse a gold, for an answer in a box or one that is read as it stands."""
    return read(gold, boxed=True, gold=gold if boxed else "")


def _zeros(gold: Any) -> int:
    """Return with how many zeros a number below 0.001 begins, behind the point; 0 for others."""
    try:
        size = abs(float(gold)) if getattr(gold, "is_number", False) else 1.0
    except MemoryError:
        raise
    except Exception:  # a complex number, too large a one, a sum without a value
        return 0
    return -1 - math.floor(math.log10(size)) if 0 < size < 1e-3 else 0


def _with_imaginary_unit(*parsed: list[Any]) -> list[list[Any]]:
    """Return parsed texts in which `i` is the imaginary unit, if one of them has it: math-verify reads it as a name,
    which is a real one or not depending on how the text is written. Equations stay as they are."""
    expressions = [text[0] for text in parsed if text and isinstance(text[0], sympy.Expr)]
    if len(expressions) < len(parsed) or all("i" not in map(str, each.free_symbols) for each in expressions):
        return list(parsed)
    names = {name for each in expressions for name in each.free_symbols}
    values = {name: sympy.I if str(name) == "i" else sympy.Symbol(str(name)) for name in names}
    try:
        return [[text[0].xreplace(values), *text[1:]] for text in parsed]
    except MemoryError:
        raise
    except Exception:  # the larger one of i and n: i is an index
        return list(parsed)


def same(gold: list[Any], answer: list[Any]) -> bool | None:
    """Return whether two parsed answers are equal, or None if comparing them fails."""
    gold, answer = _with_imaginary_unit(gold, answer)
    zeros = _zeros(gold[0])  # of two small numbers, math-verify would see zeros alone
    options = {"float_rounding": _DECIMALS + zeros, "numeric_precision": _DIGITS + zeros, "timeout_seconds": None}
    try:
        return verify(gold, answer, raise_on_error=True, **options)
    except MemoryError:
        raise
    except Exception:  # one of several readings failed; another one may be equal
        return verify(gold, answer, **options) or None


def judge(gold: str, answer: str, boxed: bool) -> tuple[str, str | None]:
    """Return the outcome, and the text of the answer."""
    if boxed:
        answer = _DOLLARS.sub(r"\1", answer)  # of an answer line, where a full stop may follow
        gold_letter, gold_value = _choice_of(gold)
        letter, value = _choice_of(answer)
        if letter and gold_letter and (letter != gold_letter or not value or not gold_value):
            return ("correct" if letter == gold_letter else "wrong"), answer
        gold, answer = gold_value or gold, value or answer
    parsed = read(answer, boxed, gold)
    text = answer if boxed else next((part for part in reversed(parsed) if isinstance(part, str)), None)
    if not parsed and not boxed:
        return "no_answer", None
    parsed_gold = _read_gold(gold, boxed)
    if not parsed_gold:
        return "error", text
    return {True: "correct", False: "wrong", None: "error"}[same(parsed_gold, parsed)], text


def _answer_to(question: dict[str, Any]) -> tuple[str, str | None]:
    if question["answer"] is None:  # the question is whether the gold can be read
        return ("correct" if _read_gold(question["gold"], True) else "error"), None
    return judge(question["gold"], question["answer"], question["boxed"])


def main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever math-verify prints must not reach the parent
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent; the loop below ends with the parent's pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    judge("1", r"\frac{1}{2}", boxed=True)  # the first parse builds math-verify's tables
    with contextlib.suppress(ValueError, OSError):  # systems without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            reply = _answer_to(json.loads(line))
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
