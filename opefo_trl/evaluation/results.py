"""Results of an evaluation: scores of samples, as JSON, as tables, and compared with another model's."""

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
from opefo_trl.grading import Outcome

_ON_TERMINAL = ("", "problems", "k", "avg@k", "95 %", "pass@k", "no answer", "cut off")
HEAD = (*_ON_TERMINAL, "maj@k", "tokens", "entropy", "calibration")  # of results.md
_COMPARISON_HEAD = ("", "problems", "before", "after", "difference", "95 %", "p")


def score(frame: pd.DataFrame, title: str) -> dict[str, Any]:
    """Return the scores of one benchmark's samples, as results.json has them. Only the outcome `correct` is right."""
    frame = frame.assign(right=(frame["outcome"] == Outcome.CORRECT).astype(int))
    problems = [rows for _, rows in frame.groupby("id", sort=False)]
    right = [rows["right"].tolist() for rows in problems]
    answers = [
        [None if pd.isna(answer) else _without_spaces(answer) for answer in rows["answer"]] for rows in problems
    ]
    k = len(right[0])
    values = averages(right)
    low, high = bootstrap_interval(values)
    outcomes = frame["outcome"].value_counts()
    return {
        "title": title,
        "problems": len(problems),
        "k": k,
        "avg": float(np.mean(values)),
        "standard_error": standard_error(values) if len(values) > 1 else None,
        "interval": [low, high],
        "pass": {str(draws): pass_at_k(right, draws) for draws in pass_ks(k)},
        "majority": majority_at_k(answers, right),
        "outcomes": {str(outcome): int(outcomes.get(outcome, 0)) for outcome in Outcome},
        "truncated": float(frame["truncated"].mean()),
        "tokens": float(frame["tokens"].mean()),
        **_confidence_scores(frame[frame["tokens"] > 0]),
        "by_problem": dict(zip(frame["id"].unique().tolist(), values, strict=True)),
    }


def _confidence_scores(frame: pd.DataFrame) -> dict[str, float | None]:
    """Return entropy per token, and the calibration of a completion's confidence: its mean token probability."""
    if not len(frame):
        return {"entropy": None, "calibration": None}
    confidence = np.exp(frame["logp"] / frame["tokens"]).clip(0, 1)  # geometric mean
    return {
        "entropy": float(-frame["logp"].sum() / frame["tokens"].sum()),
        "calibration": calibration_error(confidence, frame["right"]),
    }


def pass_ks(k: int) -> list[int]:
    """Return the values of k that pass@k is reported for: powers of 2, and k itself."""
    return sorted({2**power for power in range(k.bit_length())} | {k})


def _without_spaces(answer: str) -> str:
    """Remove the white space of an answer, so that a vote does not depend on it."""
    return "".join(answer.split())


def _mean(results: dict[str, dict[str, Any]]) -> float:
    return float(np.mean([scores["avg"] for scores in results.values()]))


def rows_of(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return table rows under `HEAD`: one for each benchmark, and their mean if there are several."""
    rows = [_row(scores) for scores in results.values()]
    if len(rows) > 1:
        rows.append(["mean", "", "", f"{_mean(results):.1%}", *[""] * (len(HEAD) - 4)])
    return rows


def _row(scores: dict[str, Any]) -> list[str]:
    samples = scores["problems"] * scores["k"]
    low, high = scores["interval"]
    return [
        scores["title"],
        str(scores["problems"]),
        str(scores["k"]),
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


def _terminal_table(head: tuple[str, ...], rows: list[list[str]], title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    columns = len(_ON_TERMINAL)
    for number, name in enumerate(head[:columns]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row[:columns])
    return table


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a `results.json`, given itself or its folder."""
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


def check_comparable(before: dict[str, Any], names: Sequence[str]) -> None:
    """Raise if `before` has no scores of any of these benchmarks. To be called before hours of sampling."""
    if not any("by_problem" in before["benchmarks"].get(name, {}) for name in names):
        raise ValueError(
            f"There is nothing to compare: the other results have scores of "
            f"{', '.join(before['benchmarks']) or 'no benchmark'}, and none of {', '.join(names)}."
        )


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Compare two results on their common problems: return a table row per benchmark, and the different settings."""
    check_comparable(before, list(after["benchmarks"]))
    rows, differences = [], []
    for name, scores in after["benchmarks"].items():
        old, new = before["benchmarks"].get(name, {}).get("by_problem", {}), scores["by_problem"]
        common = [problem for problem in new if problem in old]
        if not common:
            continue
        old_task, new_task = (part.get("settings", {}).get("tasks", {}).get(name, {}) for part in (before, after))
        differences += _differences(old_task, new_task, old_task.keys() & new_task.keys(), prefix=f"{name} ")
        old_values, new_values = [old[problem] for problem in common], [new[problem] for problem in common]
        paired = paired_difference(old_values, new_values)
        rows.append(
            [
                scores["title"],
                str(paired.problems),
                f"{np.mean(old_values):.1%}",
                f"{np.mean(new_values):.1%}",
                f"{100 * paired.difference:+.1f}",
                f"{100 * paired.low:+.1f} to {100 * paired.high:+.1f}",
                f"{paired.p_value:.3f}",
            ]
        )
    old_settings, new_settings = before.get("settings", {}), after.get("settings", {})
    names = (old_settings.keys() | new_settings.keys()) - {"model", "revision", "weights", "tasks"}
    return rows, differences + _differences(old_settings, new_settings, names)


def _differences(before: dict[str, Any], after: dict[str, Any], names: set[str], prefix: str = "") -> list[str]:
    return [
        f"{prefix}{name}: {before.get(name)!r} before, {after.get(name)!r} after"
        for name in sorted(names)
        if before.get(name) != after.get(name)
    ]


def report(
    folder: Path, settings: dict[str, Any], results: dict[str, dict[str, Any]], other: dict[str, Any] | None
) -> None:
    """Write `results.json` and `results.md`, and print the table, with a comparison if there are other results.
    Earlier results of other benchmarks in the folder stay."""
    if (folder / RESULTS_FILE).exists():
        results = {**read_results(folder)["benchmarks"], **results}
    content = {"model": settings["model"], "settings": settings, "mean": _mean(results), "benchmarks": results}
    write_whole(folder / RESULTS_FILE, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))
    text, console = markdown(HEAD, rows_of(results)), Console()
    console.print(_terminal_table(HEAD, rows_of(results), str(settings["model"])))
    if other is not None:
        rows, differences = compare(other, content)
        text += f"\nCompared with {other.get('model')}, in percentage points:\n\n{markdown(_COMPARISON_HEAD, rows)}"
        console.print(_terminal_table(_COMPARISON_HEAD, rows, f"compared with {other.get('model')}"))
        if differences:
            note = "Different settings: " + "; ".join(differences) + "."
            text += f"\n{note}\n"
            console.print(note, markup=False)
    write_whole(folder / RESULTS_TABLE_FILE, lambda part: part.write_text(text, encoding="utf-8"))
    console.print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
