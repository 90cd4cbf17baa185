"""The benchmarks: where each lies on the Hub, how many problems it has, how its answers are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from opefo_trl.validation import check_choice


@dataclass(frozen=True)
class Source:
    """A data set on the Hub. Where it has several `configs`, each holds a part of the benchmark."""

    hub: str
    split: str = "test"
    configs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its sources in order of preference. `read_answer` raises a ValueError on what it cannot be."""

    title: str
    sources: tuple[Source, ...]
    counts: tuple[int, ...]  # of its problems; two where the sources differ
    k: int = 1  # samples for each problem in the paper's protocol
    year: str = ""  # tells its rows by their url, in a source that holds several years
    read_answer: Callable[[str], str] = str.strip


def aime_answer(answer: str) -> str:
    """An integer without leading zeros. One copy of AIME 2025 has `336^\\circ`."""
    digits = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", "", answer).strip(" $")
    if not re.fullmatch("[0-9]+", digits) or int(digits) > 999:
        raise ValueError(f"has the answer {answer!r}, which is no integer from 0 to 999")
    return str(int(digits))


def olympiad_answer(answer: str) -> str:
    """Without dollars and the last full stop: `$69$,$84$` is `69,84`, one answer in which both must be given."""
    return re.sub(r"(?<!\\)\$", "", answer).strip().removesuffix(".").strip()


def gsm8k_answer(answer: str) -> str:
    """The number behind `####`, or all there is, without commas."""
    number = answer.rsplit("####", 1)[-1].strip().replace(",", "")
    if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", number):
        raise ValueError(f"has an answer that ends in {answer[-40:]!r}, without a number behind '####'")
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
        read_answer=aime_answer,
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
        read_answer=aime_answer,
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
        read_answer=olympiad_answer,
    ),
    "gsm8k": Benchmark("GSM8K", (Source("openai/gsm8k", "test", ("main",)),), (1319,), read_answer=gsm8k_answer),
}
SIX = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")


def benchmark_name(name: str) -> str:
    """The name of a benchmark here, whatever its case and its dashes: `AIME24` and `aime_2024` are `aime24`."""
    known = {_plain(word): key for key, benchmark in BENCHMARKS.items() for word in (key, benchmark.title)}
    if _plain(name) in known:
        return known[_plain(name)]
    return check_choice("benchmark", name, BENCHMARKS)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
