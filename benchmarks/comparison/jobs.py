"""Runs to do, and the results file in which each ends as a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from comparison.settings import read_config
from opefo_trl.playground import PLAYGROUND, TASKS

SAMPLES = 64  # of each held-out question
Key = tuple[str, int, int]  # setting, seed, split


@dataclass(frozen=True)
class Job:
    """One run. With a `split` above 1 its micro-batches are that many times as many and as small, to see what rounding
    does."""

    setting: str
    seed: int
    split: int
    target: float | None
    updates: int
    config: Path
    given: dict[str, Any]  # fields on top of the config
    folder: Path

    @property
    def key(self) -> Key:
        return self.setting, self.seed, self.split

    @property
    def out(self) -> Path:
        slug = self.setting.replace(", ", "-").replace(" ", "-")
        return self.folder / slug / (f"{self.seed}" + (f"-split-{self.split}" if self.split > 1 else ""))

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    @cached_property
    def fields(self) -> dict[str, Any]:
        """Return the config's fields and those given, as JSON, and how the result is measured."""
        fields = {**read_config(self.config), **self.given}
        if fields.get("dataset_name") == PLAYGROUND:
            fields["held_out"] = f"{len(TASKS[PLAYGROUND].splits['test'])} questions, {SAMPLES} samples"
        return json.loads(json.dumps({name: value for name, value in fields.items() if name != "output_dir"}))

    @property
    def name(self) -> str:
        return f"{self.setting}, seed {self.seed}" + (f", split in {self.split}" if self.split > 1 else "")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; none if there is no file yet."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise SystemExit(
                f"{path}, line {number}, is not JSON. Delete the line, and its run is repeated."
            ) from None
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def key_of(row: dict[str, Any]) -> Key:
    return row["setting"], row["seed"], row["split"]


def check_same(path: Path, rows: Sequence[dict[str, Any]], jobs: Iterable[Job]) -> None:
    """Refuse a results file with runs of other fields than those of today's jobs, and with a run twice."""
    done = {key_of(row): row for row in rows}
    if len(done) < len(rows):
        raise SystemExit(f"{path} has a run twice. Delete one of the lines: each setting, seed and split once.")
    for job in jobs:
        if job.key not in done or done[job.key]["fields"] == job.fields:
            continue
        then, now = done[job.key]["fields"], job.fields
        changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        differences = ", ".join(f"{name}={then.get(name)} (now {now.get(name)})" for name in changed)
        raise SystemExit(
            f"{path} has {job.name} with {differences}. Choose another --results FILE, or delete the lines of such "
            "runs, which repeats them."
        )
