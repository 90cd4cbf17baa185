"""Publication-quality pictures of entropy curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opefo_trl.files import write_whole

_RAISES, _LOWERS = "#2166ac", "#b2182b"  # everywhere in this package blue raises entropy and red lowers it
# One for each run; distinguishable without colour vision
RUNS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLE: dict[str, Any] = {"linewidth": 1.6, "solid_capstyle": "round"}


class _Curves(Protocol):  # EntropyCurves, which imports this module
    frame: pd.DataFrame
    name: str


class Picture(Figure):
    """A figure that a notebook displays even if pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def draw(runs: Sequence[_Curves], path: str | Path | None = None, smooth: int | None = None) -> Figure:
    """
    Draw four panels: entropy, flow up and down, lambda, reward. Faint lines are single steps, strong lines their
    moving mean. A fifth panel shows benchmark scores of checkpoints, where a run has them (`opefo-trl eval --watch`).
    """
    if not runs:
        raise ValueError("There is no run to draw. Give at least one.")
    if smooth is not None and smooth < 1:
        raise ValueError(f"`smooth={smooth}` must be a number of steps, 1 or more.")
    scored = any(name.startswith("eval/") for run in runs for name in run.frame)
    figure = Picture(figsize=(9.0, 8.2 if scored else 5.6), layout="constrained")
    layout = [["entropy", "flow"], ["lambda", "reward"], *([["scores", "scores"]] if scored else [])]
    panels: dict[str, Axes] = figure.subplot_mosaic(layout, sharex=True)
    entropy, flow, lam, reward = (panels[name] for name in ("entropy", "flow", "lambda", "reward"))
    several = len(runs) > 1
    for run, color in zip(runs, cycle(RUNS), strict=False):
        window = smooth or max(1, len(run.frame) // 30)
        curve(entropy, run.frame, "entropy", window, color, run.name if several else None)
        _level(entropy, run.frame, "flow/target", color, None if several else "target")
        up, down = (color, color) if several else (_RAISES, _LOWERS)
        curve(flow, run.frame, "flow/increase", window, up, None if several else "raises (E+)")
        curve(flow, run.frame, "flow/decrease", window, down, None if several else "lowers (E\N{MINUS SIGN})", "--")
        curve(lam, run.frame, "flow/lambda", window, color, None if several else "applied")
        if not several:
            curve(lam, run.frame, "flow/lambda_star", window, "#888888", "that would balance", ":")
        curve(reward, run.frame, "reward", window, color, None)
    finish(entropy, "Entropy of the policy", "nats per token", floor=0, legend=not several)
    finish(flow, "Flow: up solid, down dashed" if several else "Entropy flow", "nats per token and unit step")
    finish(lam, "Lambda", "weight or push that was applied")
    finish(reward, "Reward", "mean over the batch")
    if scored:
        _draw_scores(panels["scores"], runs)
    for axes in (panels["scores"],) if scored else (lam, reward):
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if several:
        figure.legend(*entropy.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image_format = Path(path).suffix[1:] or "png"
        write_whole(Path(path), lambda part: figure.savefig(part, dpi=160, format=image_format))
    return figure


def _draw_scores(axes: Axes, runs: Sequence[_Curves]) -> None:
    """Draw the benchmark scores of the evaluated checkpoints, with their intervals."""
    colors = cycle(RUNS[1:])
    for run in runs:
        for column in [name for name in run.frame if name.startswith("eval/") and name.count("/") == 1]:
            scores = run.frame[["step", column, f"{column}/low", f"{column}/high"]].dropna()
            steps, middle, low, high = (scores[name] for name in scores)
            label = column.removeprefix("eval/") + (f", {run.name}" if len(runs) > 1 else "")
            axes.errorbar(
                steps, middle, [middle - low, high - middle], marker="o", capsize=2, label=label, color=next(colors)
            )
    finish(axes, "Benchmarks", "share of right answers")


def curve(
    axes: Axes, frame: pd.DataFrame, column: str, window: int, color: str, label: str | None, dash: str = "-"
) -> None:
    """Draw one column, if the run has it: single steps faintly, and their moving mean over `window` steps."""
    if column not in frame:
        return
    measured = frame[["step", column]].dropna()
    steps, values = measured["step"], measured[column]
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    mean = values.rolling(window, center=True, min_periods=1).mean()
    axes.plot(steps, mean, dash, color=color, label=label, marker="o" if len(steps) == 1 else None, **_STYLE)


def _level(axes: Axes, frame: pd.DataFrame, column: str, color: str, label: str | None) -> None:
    """Draw a thin dotted line, for a value that is aimed at rather than measured."""
    if column in frame:
        wanted = frame[["step", column]].dropna()
        axes.plot(wanted["step"], wanted[column], ":", color=color, linewidth=1.2, label=label)


def finish(axes: Axes, title: str, unit: str, floor: float | None = None, legend: bool = True) -> None:
    """Give a panel its title, unit, grid, lower limit and legend."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if floor is not None:
        axes.set_ylim(floor, floor + 1.05 * max(axes.dataLim.ymax - floor, 1e-9))
    if legend and axes.get_legend_handles_labels()[1]:  # beside the title, clear of the curves
        position = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
        axes.legend(**position, ncols=2, frameon=False, fontsize=8.5, handlelength=1.6, columnspacing=1.2)
