"""Figures of a comparison: the entropy under each setting, and right answers beside distinct ones."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from comparison.statistics import mean_interval
from comparison.tables import Comparison
from opefo_trl.curves.plot import RUNS, Picture, curve, finish

GREY = "#8a8a8a"
SHOWN = ("", "4 updates", "moving")  # the points that are drawn
SEEDS = 3  # runs in a panel


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draw the entropy of every setting in a small panel, over that of GRPO."""
    names = [name for name in _shown(comparison) if comparison.runs(name)]
    if not names:  # all of them failed
        return
    columns = min(4, len(names))
    count = math.ceil(len(names) / columns)
    figure = Picture(figsize=(2.9 * columns, 2.3 * count + 0.3), layout="constrained")
    panels = figure.subplots(count, columns, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for setting, color in ((comparison.settings[name].plain, GREY), (name, RUNS[1])):
            for row in list(comparison.runs(setting).values())[:SEEDS]:
                frame = pd.DataFrame({"step": range(1, len(row["entropy"]) + 1), "entropy": row["entropy"]})
                curve(axes, frame, "entropy", 10, color, None)
        finish(axes, textwrap.fill(name, 28), "", floor=0, legend=False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supylabel("entropy, nats per token (grey: GRPO)", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_plane(comparison: Comparison, path: Path) -> None:
    """Draw held-out reward over diversity: mean and 95 % interval of each setting."""
    names = [name for name in _shown(comparison) if comparison.values(name, "avg16")]
    figure = Picture(figsize=(9.5, max(5.2, 1 + 0.16 * len(names))), layout="constrained")
    axes = figure.subplots()
    points = {
        name: [mean_interval(list(comparison.values(name, measure).values())) for measure in ("distinct", "avg16")]
        for name in names
    }
    for number, (name, ((x, across), (y, up))) in enumerate(points.items(), 1):
        better = any(a >= x and b >= y and (a, b) != (x, y) for (a, _), (b, _) in points.values())
        color = GREY if better else RUNS[2]  # behind the front, or on it
        label = f"{number}  {name}"
        axes.errorbar(x, y, up, across, "o", color=color, elinewidth=0.7, alpha=0.9, label=label)
        axes.annotate(str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=9, fontweight="bold")
    finish(axes, "Right and diverse, on held-out questions", "avg@16", legend=False)
    axes.set_xlabel("distinct right answers of 64")
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False, title="orange: none is better in both")
    figure.savefig(path, dpi=130)


def _shown(comparison: Comparison) -> Sequence[str]:
    names = [name for name, setting in comparison.settings.items() if setting.point in SHOWN]
    return names or list(comparison.settings)
