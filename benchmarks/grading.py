"""Compare our grader with TRL's `accuracy_reward`: verdicts, time, and answers that would never end.

    python benchmarks/grading.py                                     # benchmarks from the Hub
    python benchmarks/grading.py --benchmark_source DIR --json benchmarks/results/grading.json

2,000 answers to the problems of the six benchmarks, each in a box: half of them the gold itself, half that of the next
problem of the same set, if that is another one. `accuracy_reward` is given the gold as it is in the data set, and once
more in a box, which repairs most of its errors. Both graders are warm, take turns, and remember no verdict.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from trl.rewards import accuracy_reward

from opefo_trl.data.benchmarks import SIX, load_benchmark
from opefo_trl.evaluation.results import markdown
from opefo_trl.grading import Grader

ANSWERS = 2000
HANGS = {
    "power tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "nested powers over 16": r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
    "factorial of a factorial": r"\boxed{1000000!!}",
}
PATIENCE = 30  # seconds until a call counts as hanging
CALLS = {
    "TRL, main thread": "print(accuracy_reward([[{'content': answer}]], ['16']))",
    "TRL, other thread": (
        "import threading\n"
        "thread = threading.Thread(target=lambda: print(accuracy_reward([[{'content': answer}]], ['16'])))\n"
        "thread.start(); thread.join()"
    ),
    "ours": "print([Grader(policy='boxed').grade(['16'], [answer])[0].outcome.value])",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark_source", help="folder with the benchmarks; by default the Hub")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=Path, help="jsonl of gold, prediction, expected and tier, to report by tier")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    golds, answers, right = make_answers(options.benchmark_source)
    chats = [[{"role": "assistant", "content": answer}] for answer in answers]
    boxed = [rf"\boxed{{{gold}}}" for gold in golds]
    grader = Grader()
    sides = {
        "ours": lambda: [grade.correct for grade in grader.grade(golds, answers)],
        "TRL, gold as it is": lambda: accuracy_reward(chats, golds),
        "TRL, gold in a box": lambda: accuracy_reward(chats, boxed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    verdicts: dict[str, list] = {}
    for turn in range(options.rounds + 1):  # the first round warms up
        for name, grade in sides.items():
            grader._verdicts.clear()
            began = time.perf_counter()
            verdicts[name] = grade()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    result = {
        "answers": len(golds),
        "right": sum(right),
        "workers": grader.workers,
        "sides": {name: count(given, right, seconds[name]) for name, given in verdicts.items()},
        "hangs": {
            label: {name: run_call(call, answer) for name, call in CALLS.items()} for label, answer in HANGS.items()
        },
    }
    grader.close()
    if options.cases:
        result["tiers"] = by_tier([json.loads(line) for line in options.cases.read_text().splitlines()])
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def make_answers(source: str | None) -> tuple[list[str], list[str], list[bool]]:
    pairs = []
    for name in SIX:
        own = list(load_benchmark(name, source)["answer"])
        following = [*own[1:], own[0]]
        pairs += [(gold, gold, True) for gold in own]
        pairs += [
            (gold, other, False)
            for gold, other in zip(own, following, strict=True)
            if "".join(gold.split()) != "".join(other.split())
        ]
    step = len(pairs) / ANSWERS
    chosen = [pairs[int(place * step)] for place in range(ANSWERS)]
    golds, answers, right = zip(*chosen, strict=True)
    return list(golds), [rf"So the answer is $\boxed{{{answer}}}$." for answer in answers], list(right)


def by_tier(cases: list[dict]) -> dict[str, dict[str, str]]:
    """Return how many verdicts of each tier are as expected, by policy."""
    tiers = sorted({case["tier"] for case in cases})
    report: dict[str, dict[str, str]] = {tier: {} for tier in tiers}
    for policy in ("boxed", "lenient"):
        with Grader(policy=policy) as grader:
            grades = grader.grade([case["gold"] for case in cases], [case["prediction"] for case in cases])
        for tier in tiers:
            graded = zip(grades, cases, strict=True)
            expected = [grade.correct == case["expected"] for grade, case in graded if case["tier"] == tier]
            report[tier][policy] = f"{sum(expected)} of {len(expected)}"
    return report


def count(verdicts: list, right: list[bool], seconds: list[float]) -> dict:
    pairs = list(zip(verdicts, right, strict=True))
    return {
        "accepted": sum(bool(verdict) for verdict, good in pairs if good),
        "rejected": sum(verdict is not None and not verdict for verdict, good in pairs if good),
        "skipped": sum(verdict is None for verdict, _ in pairs),
        "wrong accepted": sum(bool(verdict) for verdict, good in pairs if not good),
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
    }


def run_call(call: str, answer: str) -> str:
    """Run a call in a process of its own, and return its result and time."""
    setup = "import warnings; warnings.simplefilter('ignore')\nfrom trl.rewards import accuracy_reward\n"
    setup += "from opefo_trl.grading import Grader\n"
    setup += f"import time; answer = {answer!r}; began = time.monotonic()\n"
    script = f"{setup}{call}\nprint(round(time.monotonic() - began), 's')"
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"hangs ({PATIENCE} s, killed)"
    lines = done.stdout.split("\n")
    return f"{lines[0]} after {lines[1]}" if done.returncode == 0 else f"fails: {done.stderr.splitlines()[-1]}"


def show(result: dict) -> None:
    wrong = result["answers"] - result["right"]
    print(f"{result['answers']} answers, {result['right']} of them right; {result['workers']} workers\n")
    sides = result["sides"]
    head = (
        "",
        f"right: accepted of {result['right']}",
        "rejected",
        "skipped",
        f"wrong: accepted of {wrong}",
        "seconds",
    )
    print(markdown(head, [side_row(name, side) for name, side in sides.items()]))
    ratios = {name: side["seconds"] / sides["ours"]["seconds"] for name, side in sides.items() if name != "ours"}
    print(f"Time over ours: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios.items())}\n")
    print(markdown(("answer", *CALLS), [[label, *ends.values()] for label, ends in result["hangs"].items()]))
    if "tiers" in result:
        policies = ("boxed", "lenient")
        rows = [[tier, *(counts[policy] for policy in policies)] for tier, counts in result["tiers"].items()]
        print(markdown(("cases", *policies), rows))


def side_row(name: str, side: dict) -> list[str]:
    low, high = side["spread"]
    counts = (side["accepted"], side["rejected"], side["skipped"], side["wrong accepted"])
    return [name, *map(str, counts), f"{side['seconds']:.1f} ({low:.1f} to {high:.1f})"]


if __name__ == "__main__":
    main()
