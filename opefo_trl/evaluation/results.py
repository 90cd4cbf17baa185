"""What samples of a benchmark come to, as data, as tables, and beside those of another model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from opefo_trl.evaluation.metrics import (
    averages,
    bootstrap_interval,
    calibration_error,
    majority_at_k,
    paired_difference,
    pass_at_k,
    standard_error,
)
from opefo_trl.files import RESULTS_FILE, RESULTS_TABLE_FILE, write_whole
from opefo_trl.grading.grader import Outcome

SHOWN = ("", "problems", "k", "avg@k", "95 %", "pass@k", "no answer", "cut off")  # on a terminal; results.md has all
HEAD = (*SHOWN, "maj@k", "tokens", "entropy", "calibration")


def score(frame: pd.DataFrame, title: str) -> dict[str, Any]:
    """Of a benchmark's samples. What was cut off, was not graded in time or failed counts as not right."""
    frame = frame.assign(right=frame["outcome"] == Outcome.CORRECT)
    groups = [group for _, group in frame.groupby("id", sort=False)]
    right = [group["right"].astype(int).tolist() for group in groups]
    answers = [[None if pd.isna(answer) else plain(answer) for answer in group["answer"]] for group in groups]
    k = len(right[0])
    values = averages(right)
    low, high = bootstrap_interval(values)
    known = frame[frame["tokens"] > 0]
    outcomes = frame["outcome"].value_counts()
    return {
        "title": title,
        "problems": len(groups),
        "k": k,
        "avg": float(np.mean(values)),
        "standard_error": standard_error(values) if len(values) > 1 else None,
        "interval": [low, high],
        "pass": {str(draws): pass_at_k(right, draws) for draws in draws_of(k)},
        "majority": majority_at_k(answers, right),
        "outcomes": {str(outcome): int(outcomes.get(outcome, 0)) for outcome in Outcome},
        "truncated": float(frame["truncated"].mean()),
        "tokens": float(frame["tokens"].mean()),
        "entropy": float(-known["logp"].sum() / known["tokens"].sum()) if len(known) else None,
        "calibration": calibration_error(
            np.exp(known["logp"] / known["tokens"]).clip(0, 1), known["right"].astype(int)
        )
        if len(known)
        else None,
        "by_problem": dict(zip(frame["id"].unique().tolist(), values, strict=True)),
    }


def draws_of(k: int) -> list[int]:
    """1, 2, 4 ... and k itself."""
    return sorted({2**power for power in range(k.bit_length())} | {k})


def plain(answer: str) -> str:
    """An answer without its spaces, so that a vote counts them as one."""
    return "".join(answer.split())


def mean_of(results: dict[str, dict[str, Any]]) -> float:
    return float(np.mean([scores["avg"] for scores in results.values()]))


def cells_of(scores: dict[str, Any]) -> list[str]:
    samples = scores["problems"] * scores["k"]
    low, high = scores["interval"]
    return [
        f"{scores['avg']:.1%}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{scores['pass'][str(scores['k'])]:.1%}" if scores["k"] > 1 else "",
        f"{scores['outcomes'][Outcome.NO_ANSWER] / samples:.1%}",
        f"{scores['truncated']:.1%}",
        f"{scores['majority']:.1%}" if scores["k"] > 1 else "",
        f"{scores['tokens']:.0f}",
        "" if scores["entropy"] is None else f"{scores['entropy']:.2f}",
        "" if scores["calibration"] is None else f"{scores['calibration']:.2f}",
    ]


def rows_of(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [
        [scores["title"], str(scores["problems"]), str(scores["k"]), *cells_of(scores)] for scores in results.values()
    ]
    return [*rows, ["mean", "", "", f"{mean_of(results):.1%}", *[""] * (len(HEAD) - 4)]] if len(rows) > 1 else rows


def rich_table(head: tuple[str, ...], rows: list[list[str]], title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(head[: len(SHOWN)]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row[: len(SHOWN)])
    return table


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def read_results(path: str | Path) -> dict[str, Any]:
    """`results.json`, or the folder it is in."""
    file = Path(path) / RESULTS_FILE if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"There are no results at {str(path)!r}: {error.strerror}. Give a {RESULTS_FILE}.") from None
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), dict):
        raise ValueError(f"{str(file)!r} holds no results of eval.py: it has no `benchmarks`.")
    return content


COMPARE_HEAD = ("", "problems", "before", "after", "difference", "95 %", "p")


def check_common(before: dict[str, Any], names: Sequence[str]) -> None:
    """Known before hours of sampling: whether there will be anything to compare with."""
    if not any("by_problem" in before["benchmarks"].get(name, {}) for name in names):
        raise ValueError(
            f"The other results have scores of {', '.join(before['benchmarks']) or 'no benchmark'}, and of none of "
            f"these: {', '.join(names)}. There would be nothing to compare."
        )


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """A row for each benchmark, from the problems that both have; and what is not alike between them."""
    check_common(before, list(after["benchmarks"]))
    rows, unlike = [], []
    for name in [name for name in after["benchmarks"] if name in before["benchmarks"]]:
        first, second = (part["benchmarks"][name]["by_problem"] for part in (before, after))
        common = [problem for problem in second if problem in first]
        if not common:
            continue
        kinds = [part.get("settings", {}).get("tasks", {}).get(name, {}) for part in (before, after)]
        unlike += [
            f"{name} {key}: {kinds[0][key]!r} before, {kinds[1][key]!r} after"
            for key in kinds[0].keys() & kinds[1].keys()
            if kinds[0][key] != kinds[1][key]
        ]
        found = paired_difference([first[problem] for problem in common], [second[problem] for problem in common])
        rows.append(
            [
                after["benchmarks"][name]["title"],
                str(found.problems),
                f"{np.mean([first[problem] for problem in common]):.1%}",
                f"{np.mean([second[problem] for problem in common]):.1%}",
                f"{100 * found.difference:+.1f}",
                f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
                f"{found.p_value:.3f}",
            ]
        )
    settings = before.get("settings", {}), after.get("settings", {})
    unlike += [
        f"{key}: {settings[0].get(key)!r} before, {settings[1].get(key)!r} after"
        for key in sorted({*settings[0], *settings[1]} - {"model", "revision", "weights", "tasks"})
        if settings[0].get(key) != settings[1].get(key)
    ]
    return rows, unlike


def report(
    folder: Path, settings: dict[str, Any], results: dict[str, dict[str, Any]], other: dict[str, Any] | None
) -> None:
    """
    Write `results.json` and its table, and print it; beside another one's if there is one. Benchmarks that the folder
    has results of already stay in it.
    """
    if (folder / RESULTS_FILE).exists():
        results = {**read_results(folder)["benchmarks"], **results}
    content = {"model": settings["model"], "settings": settings, "mean": mean_of(results), "benchmarks": results}
    write_whole(folder / RESULTS_FILE, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))
    text, console = markdown(HEAD, rows_of(results)), Console()
    console.print(rich_table(HEAD, rows_of(results), str(settings["model"])))
    if other is not None:
        rows, unlike = compare(other, content)
        text += f"\nBeside {other.get('model')}, in percentage points:\n\n{markdown(COMPARE_HEAD, rows)}"
        console.print(rich_table(COMPARE_HEAD, rows, f"beside {other.get('model')}"))
        if unlike:
            note = "Not alike: " + "; ".join(unlike) + "."
            text += f"\n{note}\n"
            console.print(note, markup=False)
    write_whole(folder / RESULTS_TABLE_FILE, lambda part: part.write_text(text))
    console.print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
