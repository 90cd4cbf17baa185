"""Table of the benchmarks: sources on the Hub, number of problems, samples of the protocol, form of the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opefo_trl.validation import check_choice


@dataclass(frozen=True)
class Source:
    """A data set on the Hub. If `configs` are given, each holds a part of the benchmark."""

    hub: str
    split: str = "test"
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `read_answer` brings an answer to its usual form, or raises a `ValueError`."""

    title: str
    sources: tuple[Source, ...]  # the preferred one first
    counts: tuple[int, ...]  # number of problems; two if the sources differ
    k: int = 1  # samples for each problem in the paper's protocol
    year: str = ""  # selects rows by their url in a source that holds several years
    read_answer: Callable[[str], str] = str.strip


def _aime_answer(answer: str) -> str:
    """Return the integer without leading zeros. One copy of AIME 2025 has `336^\\circ`."""
    digits = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", "", answer).strip(" $")
    if not re.fullmatch("[0-9]+", digits) or int(digits) > 999:
        raise ValueError(f"has the answer {answer!r}, which is not an integer from 0 to 999")
    return str(int(digits))


def _olympiad_answer(answer: str) -> str:
    """Remove dollars and the final full stop: `$69$,$84$` is `69,84`, one answer that needs both numbers. One
    interval has lost its sign: `t(0,4]`."""
    answer = re.sub(r"(?<!\\)\$", "", answer).strip().removesuffix(".").strip()
    return re.sub(r"^([a-z])(?=\([^()]*,[^()]*\]$)", r"\1 \\in ", answer)


def _gsm8k_answer(answer: str) -> str:
    """Return the number after `####`, or the whole text if there is none, without commas."""
    number = answer.rsplit("####", 1)[-1].strip().replace(",", "")
    if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", number):
        raise ValueError(f"has an answer that ends in {answer[-40:]!r}, without a number after '####'")
    return number


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        "AIME 2024",
        (
            Source("math-ai/aime24"),
            Source("HuggingFaceH4/aime_2024", "train"),
            Source("Maxwell-Jia/AIME_2024", "train"),
            Source("BytedTsinghua-SIA/AIME-2024", "train"),
        ),
        (30,),
        k=32,
        year="2024",
        read_answer=_aime_answer,
    ),
    "aime25": Benchmark(
        "AIME 2025",
        (
            Source("math-ai/aime25"),
            Source("yentinglin/aime_2025", "train"),
            Source("opencompass/AIME2025", "test", ("AIME2025-I", "AIME2025-II")),
            Source("MathArena/aime_2025", "train"),
        ),
        (30,),
        k=32,
        year="2025",
        read_answer=_aime_answer,
    ),
    "amc23": Benchmark(
        "AMC 2023",
        (Source("math-ai/amc23"), Source("AI-MO/aimo-validation-amc", "train")),
        (40,),
        k=32,
        year="2023",
    ),
    "math500": Benchmark("MATH-500", (Source("HuggingFaceH4/MATH-500"),), (500,)),
    "minerva": Benchmark("Minerva Math", (Source("math-ai/minervamath"),), (272,)),
    "olympiadbench": Benchmark(
        "OlympiadBench",
        (Source("Hothan/OlympiadBench", "train", ("OE_TO_maths_en_COMP",)), Source("math-ai/olympiadbench")),
        (675, 674),  # as published, and on the Hub
        read_answer=_olympiad_answer,
    ),
    "gsm8k": Benchmark("GSM8K", (Source("openai/gsm8k", "test", ("main",)),), (1319,), read_answer=_gsm8k_answer),
}
SIX = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")


def benchmark_name(name: str, option: str = "benchmark", others: Iterable[str] = ()) -> str:
    """Return the name in `BENCHMARKS` for any case and any dashes: `AIME24` and `aime_2024` are `aime24`. One of
    `others` is returned as it is; `option` is what the error calls it."""
    if name in others:
        return name
    names = {_plain(word): key for key, benchmark in BENCHMARKS.items() for word in (key, benchmark.title)}
    return names.get(_plain(name)) or check_choice(option, name, [*BENCHMARKS, *others])


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
