"""Tables and a figure of the runs of benchmarks/smollm2.py.

    python benchmarks/smollm2_tables.py benchmarks/results/gpu/words.jsonl --target 1.0 --picture words.png

Each cell is the mean over the seeds, with the least and the most where there are several. `lands at` is the first step
with an entropy at or below the target, and the mean error is that of all steps from five after the landing on. Entropy
and reward of training are means of the last ten steps; all else is measured after the last step, on held-out prompts.
Below it a line for each run says how it was held, and one for each setting what it wrote.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from comparison.statistics import landing
from comparison.tables import table as markdown

from opefo_trl.cli.progress import EDGE
from opefo_trl.curves.plot import RUNS, Picture, curve, finish

SETTLING = 5  # steps after the landing that the mean error leaves out
SCORES = ("pass@1", "pass@16", "pass@64", "distinct")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="results of benchmarks/smollm2.py")
    parser.add_argument("--target", type=float, required=True, help="entropy that was to be held, in nats")
    parser.add_argument("--settings", nargs="+", help="settings to show, else all, in the order of the file")
    parser.add_argument("--picture", type=Path, help="file for the curves")
    options = parser.parse_args(arguments)
    runs = read(options.file, options.settings)
    print(table(runs, options.target))
    print(f"{holds(runs, options.target)}\n\n{samples(runs)}")
    if options.picture:
        draw(runs, options.target, options.picture)


def read(path: Path, settings: Sequence[str] | None = None) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the runs that are done, by setting and seed: the line of the end, with the steps as `frame`."""
    steps: dict[tuple[str, int], list[dict]] = defaultdict(list)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        setting, seed = line["setting"], line["seed"]
        if settings and setting not in settings:
            continue
        if "held_out" in line:
            runs.setdefault(setting, {})[seed] = {**line, "frame": pd.DataFrame(steps[setting, seed])}
        else:
            steps[setting, seed].append(line)
    return {name: runs[name] for name in settings or runs}


def table(runs: dict[str, dict[int, dict[str, Any]]], target: float) -> str:
    names = ["lands at", "mean error", "entropy", "reward", *SCORES, "seeds"]
    lines = []
    for setting, seeds in runs.items():
        rows = [measures(run, target) for run in seeds.values()]
        cells = [spread([row[name] for row in rows if row.get(name) is not None], name) for name in names[:-1]]
        lines.append([setting, *cells, str(len(seeds))])
    return markdown(["", *names], lines) + "\n"


def measures(run: dict[str, Any], target: float) -> dict[str, float | None]:
    """Return the numbers of a run; None for what it does not have, such as the steps of the base."""
    numbers = {name: run["held_out"].get(name) for name in SCORES}
    frame = run["frame"]
    if frame.empty:
        return numbers
    numbers |= {name: frame[name].tail(EDGE).mean() for name in ("entropy", "reward")}
    lands = landing(frame["entropy"], target)
    if math.isfinite(lands):
        numbers["lands at"] = lands
        numbers["mean error"] = settled(frame, lands)["entropy"].mean() - target
    return numbers


def settled(frame: pd.DataFrame, lands: float) -> pd.DataFrame:
    return frame[int(lands) - 1 + SETTLING :]


def holds(runs: dict[str, dict[int, dict[str, Any]]], target: float) -> str:
    """Return a line for each run that landed, on the steps that its mean error is of."""
    lines = []
    for setting, seeds in runs.items():
        for seed, run in seeds.items():
            lands = landing(run["frame"]["entropy"], target) if len(run["frame"]) else math.inf
            if math.isfinite(lands):
                held = settled(run["frame"], lands)
                means = held["entropy"].rolling(EDGE).mean() - target
                line = f"- {setting}, seed {seed}: means of {EDGE} steps {means.min():+.2f} to {means.max():+.2f}"
                line += f", lambda {held['flow/lambda'].mean():.2f} on average"
                if "grad_norm" in held:
                    line += f", norm of the gradient up to {held['grad_norm'].max():.1f}"
                lines.append(line)
    return "\n".join(lines)


def spread(values: list[float], name: str) -> str:
    if not values:
        return ""
    form = {"lands at": "{:.0f}", "distinct": "{:.1f}", "mean error": "{:+.2f}"}.get(name, "{:.2f}").format
    least, mean, most = form(min(values)), form(sum(values) / len(values)), form(max(values))
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


def samples(runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return what the first seed of each setting wrote at the end."""
    return "\n".join(
        f"- {setting}: {'; '.join(next(iter(seeds.values()))['held_out']['written'])}"
        for setting, seeds in runs.items()
    )


def draw(runs: dict[str, dict[int, dict[str, Any]]], target: float, path: Path) -> None:
    """Draw entropy and distinct right answers of a rollout over the steps, a line for each seed."""
    figure = Picture(figsize=(10.5, 4.2), layout="constrained")
    entropy, distinct = figure.subplots(1, 2)
    trained = {name: seeds for name, seeds in runs.items() if not next(iter(seeds.values()))["frame"].empty}
    for (name, seeds), color in zip(trained.items(), RUNS, strict=False):
        for number, run in enumerate(seeds.values()):
            for axes, column in ((entropy, "entropy"), (distinct, "answers/distinct")):
                label = name if axes is entropy and not number else None
                curve(axes, run["frame"], column, EDGE, color, label)
    entropy.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    finish(entropy, "Entropy", "nats per token", floor=0)
    finish(distinct, "Distinct right answers", "of 8 to a prompt", floor=0, legend=False)
    for axes in (entropy, distinct):
        axes.set_xlabel("optimizer step", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
