"""Pass rates: how often a model solves each problem of a training set. eval.py measures, and train.py selects by them.

A file of pass rates has a line of JSON for each problem: `problem` (its text without a template), `pass_rate`, `right`
and `samples`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from opefo_trl.data.templates import problem_text
from opefo_trl.files import write_whole
from opefo_trl.validation import check_number

__all__: list[str] = []

DEFAULT_RANGE = (0.1, 0.9)


def write_pass_rates(path: Path, problems: Sequence[str], right: Sequence[int], samples: int) -> str:
    """Write the number of right ones among the `samples` of each problem, and return a summary of them."""
    lines = [
        json.dumps({"problem": problem, "pass_rate": count / samples, "right": count, "samples": samples})
        for problem, count in zip(problems, right, strict=True)
    ]
    write_whole(path, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    count, never, always = len(right), right.count(0), right.count(samples)
    low, high = DEFAULT_RANGE
    return (
        f"{count} problems, {samples} samples each: {sum(right) / (samples * count):.1%} right. {never} problems are "
        f"never solved, {always} always, {count - never - always} in between.\nWritten to {path}; to train on those "
        f"in between: opefo-trl train --pass_rates {shlex.quote(str(path))} --keep_pass_rates {low} {high}"
    )


def check_range(keep: Sequence[float]) -> None:
    """Check that `keep` is the lowest and the highest pass rate to train on."""
    if len(keep) != 2:
        raise ValueError(f"`keep_pass_rates` takes two numbers, the lowest and the highest, not {len(keep)}.")
    low, high = (check_number("keep_pass_rates", rate, 0, 1) for rate in keep)
    if low > high:
        raise ValueError(f"`keep_pass_rates={low:g} {high:g}` is empty: give the lower number first.")


def keep_by_pass_rate(dataset: Dataset, path: str, keep: Sequence[float]) -> tuple[Dataset, str]:
    """Return the rows whose pass rate is in the range `keep`, both ends included, and how many those are in words."""
    rates, (low, high) = _read(path), keep
    texts = [problem_text(prompt) for prompt in dataset["prompt"]]
    unknown = [text for text in texts if text not in rates]
    if unknown:
        raise ValueError(
            f"`pass_rates={path!r}` has no rate for {len(unknown)} of {len(texts)} problems, such as "
            f"{unknown[0][:80]!r}. Measure the same data: opefo-trl eval with this --dataset_name, without --limit. "
            "(It leaves out problems with contradictory answers, as --unique_problems true does here.)"
        )
    found = [rates[text] for text in texts]
    kept = [row for row, rate in enumerate(found) if low <= rate <= high]
    below, above = sum(rate < low for rate in found), sum(rate > high for rate in found)
    summary = (
        f"{len(kept)} of {len(found)} problems have a pass rate from {low:g} to {high:g}; {below} are below, "
        f"{above} above ({path})."
    )
    if not kept:
        between = [rate for rate in found if 0 < rate < 1]
        raise ValueError(
            f"`keep_pass_rates={low:g} {high:g}` leaves nothing to train on: {summary} {found.count(0)} are at 0, "
            f"{found.count(1)} at 1, "
            + (f"the others from {min(between):g} to {max(between):g}." if between else "and no other.")
            + " Give a wider range."
        )
    return dataset.select(kept), summary


def _read(path: str) -> dict[str, float]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"`pass_rates={path!r}` cannot be read: {error.strerror}. `opefo-trl eval --dataset_name` "
            "writes such a file."
        ) from None
    rates = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rates[row["problem"]] = check_number("pass_rate", row["pass_rate"], 0, 1)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"`pass_rates={path!r}`: line {number} has no `problem` with a `pass_rate` from 0 to 1. Give a file "
                "that opefo-trl eval --dataset_name has written."
            ) from None
    return rates
