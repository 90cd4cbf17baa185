"""Our grader beside TRL's `accuracy_reward`: who accepts what, how fast, and what an answer without end does.

    python benchmarks/grading.py                                     # benchmarks from the Hub
    python benchmarks/grading.py --benchmark_source DIR --json benchmarks/results/grading.json

2,000 answers to the problems of the six benchmarks, each in a box: half of them the gold answer itself, half that of
the next problem of the same set, where it is not the same. `accuracy_reward` is given the gold as it stands in the
data set, and once more in a box, which repairs most of it. The sides start warm, take turns, and remember nothing.
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
from opefo_trl.grading import Grader

ANSWERS = 2000
HANGS = {
    "power tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "nested powers over 16": r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
    "factorial of a factorial": r"\boxed{1000000!!}",
}
PATIENCE = 30  # seconds, before a call is said to hang
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
    parser.add_argument("--cases", type=Path, help="jsonl of gold, prediction, expected, tier: reported by tier")
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
    for turn in range(options.rounds + 1):  # the first is to warm up
        for name, grade in sides.items():
            grader._known.clear()
            began = time.perf_counter()
            verdicts[name] = grade()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    result = {
        "answers": len(golds),
        "right": sum(right),
        "workers": grader.workers,
        "sides": {name: count(found, right, seconds[name]) for name, found in verdicts.items()},
        "hangs": {what: {name: ends(call, answer) for name, call in CALLS.items()} for what, answer in HANGS.items()},
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
    """Of each tier how many verdicts are as expected, by policy."""
    tiers = sorted({case["tier"] for case in cases})
    report: dict[str, dict[str, str]] = {tier: {} for tier in tiers}
    for policy in ("boxed", "lenient"):
        with Grader(policy=policy) as grader:
            grades = grader.grade([case["gold"] for case in cases], [case["prediction"] for case in cases])
        for tier in tiers:
            own = [
                grade.correct == case["expected"]
                for grade, case in zip(grades, cases, strict=True)
                if case["tier"] == tier
            ]
            report[tier][policy] = f"{sum(own)} of {len(own)}"
    return report


def count(found: list, right: list[bool], seconds: list[float]) -> dict:
    pairs = list(zip(found, right, strict=True))
    return {
        "accepted": sum(bool(verdict) for verdict, good in pairs if good),
        "rejected": sum(verdict is not None and not verdict for verdict, good in pairs if good),
        "skipped": sum(verdict is None for verdict, _ in pairs),
        "wrong accepted": sum(bool(verdict) for verdict, good in pairs if not good),
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
    }


def ends(call: str, answer: str) -> str:
    """What a call in a process of its own comes to, and after how long."""
    setup = "import warnings; warnings.simplefilter('ignore')\nfrom trl.rewards import accuracy_reward\n"
    setup += "from opefo_trl.grading import Grader\n"
    setup += f"import time; answer = {answer!r}; began = time.monotonic()\n"
    script = f"{setup}{call}\nprint(round(time.monotonic() - began), 's')"
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"hangs ({PATIENCE} s, killed)"
    said = done.stdout.split("\n")
    return f"{said[0]} after {said[1]}" if done.returncode == 0 else f"fails: {done.stderr.splitlines()[-1]}"


def show(result: dict) -> None:
    wrong = result["answers"] - result["right"]
    print(f"{result['answers']} answers, {result['right']} of them right; {result['workers']} workers\n")
    print(f"| | right: accepted of {result['right']} | rejected | skipped | wrong: accepted of {wrong} | seconds |")
    print("|---|---|---|---|---|---|")
    for name, side in result["sides"].items():
        low, high = side["spread"]
        cells = (side["accepted"], side["rejected"], side["skipped"], side["wrong accepted"])
        print(f"| {name} | {' | '.join(map(str, cells))} | {side['seconds']:.1f} ({low:.1f} to {high:.1f}) |")
    times = {name: side["seconds"] / result["sides"]["ours"]["seconds"] for name, side in result["sides"].items()}
    print(
        "\nTime over ours: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in times.items() if ratio != 1) + "\n"
    )
    print(f"| answer | {' | '.join(CALLS)} |\n|---|---|---|---|")
    for what, outcomes in result["hangs"].items():
        print(f"| {what} | {' | '.join(outcomes.values())} |")
    if "tiers" in result:
        print("\n| cases | boxed | lenient |\n|---|---|---|")
        for tier, found in result["tiers"].items():
            print(f"| {tier} | {found['boxed']} | {found['lenient']} |")


if __name__ == "__main__":
    main()
