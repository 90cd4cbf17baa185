"""Tables of a comparison: means with intervals, paired differences, how targets are held, and what rounding does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from comparison.measures import LEARNED
from comparison.settings import Setting
from comparison.statistics import difference, landing, mean_interval, separates, track

Row = Mapping[str, Any]
PM = "\N{PLUS-MINUS SIGN}"
MEASURES = {  # name in a row -> label, digits
    "end_entropy": ("end entropy", 2),
    "least_entropy": ("least", 2),
    "mean_entropy": ("mean", 2),
    "reward": ("reward", 2),
    "avg16": ("avg@16", 3),
    "pass16": ("pass@16", 3),
    "distinct": ("distinct of 64", 1),
    "calibration": ("calibration error", 3),
    "step": ("step time", 2),
}
COMPARED = {"avg16": 3, "distinct": 1}  # measures whose differences are shown, with digits
BONUS = "adaptive_entropy"
MEANS = f"Mean {PM} half the width of the 95 % interval over seeds (Student's t)."
DIFFERENCES = (
    "Paired differences over the seeds that both settings have, with 95 % bootstrap intervals. Bold: the interval "
    "excludes 0 and so does an exact sign-flip test (p <= 0.05), which takes six seeds; all else is not separated. "
    "Best bonus: the adaptive bonus with the highest mean avg@16, of those with the most seeds."
)
HOLDING = (
    "Medians over seeds; all but the landing counts from the landing on, in nats. GRPO passes: the step at which "
    "plain GRPO with the same seed reaches the same target. Undershoot: the deepest step, and the deepest mean of ten "
    "steps. At bound: the most steps in a row with lambda or mu at its bound."
)
LEARNING = (
    f"Medians over seeds, to the first step with a mean reward of {LEARNED} over ten steps, of all generated: steps, "
    "tokens of prompts and completions, and seconds, which depend on the load of the machine. To GRPO: relative to it "
    "with the same seed, with the least and the most."
)
EFFORT = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}
ROUNDING = (
    "Standard deviations over seeds, and over repetitions of one seed with micro-batches that are 2, 4, ... times as "
    "many and as small: the same rollouts and gradients but for rounding, for all that does not look at a whole "
    "micro-batch."
)


@dataclass(frozen=True)
class Comparison:
    """The runs of a results file that belong to the settings to show, in their order."""

    rows: Sequence[Row]
    settings: Mapping[str, Setting]

    def runs(self, name: str) -> dict[int, Row]:
        """Return a setting's runs by seed, without the repetitions for rounding."""
        return {row["seed"]: row for row in self.rows if row["setting"] == name and row["split"] == 1}

    def values(self, name: str, measure: str) -> dict[int, float]:
        """Return a measure of a setting by seed."""
        if measure == "step":
            return self.step_times(name)
        return {seed: row[measure] for seed, row in self.runs(name).items() if measure in row}

    def step_times(self, name: str) -> dict[int, float]:
        """Return times of a step relative to the median of plain GRPO."""
        plain = self.values(self.settings[name].plain, "seconds") if name in self.settings else {}
        base = float(np.median(list(plain.values()))) if plain else math.nan
        return {} if math.isnan(base) else {seed: t / base for seed, t in self.values(name, "seconds").items()}

    def best_bonus(self, point: str) -> str | None:
        """Return the adaptive bonus with the highest mean avg@16 at a point, of those with the most seeds: a mean over
        a few seeds may be high because these are easy."""
        bonuses = [name for name, one in self.settings.items() if (one.control, one.point) == (BONUS, point)]
        scores = {name: values for name in bonuses if (values := self.values(name, "avg16"))}
        most = max(map(len, scores.values()), default=0)
        means = {name: np.mean(list(values.values())) for name, values in scores.items() if len(values) == most}
        return max(means, key=means.get, default=None)


def document(comparison: Comparison, command: str) -> str:
    """Return all tables as Markdown."""
    shown = {name: setting for name, setting in comparison.settings.items() if comparison.runs(name)}
    parts = [f"`{command}`", made(comparison.rows), "## Results", MEANS, results(comparison, shown)]
    if any(comparison.values(name, "avg16") for name in shown):
        parts += ["## Differences", DIFFERENCES, differences(comparison, shown)]
    if any("learned" in row for row in comparison.rows):
        parts += ["## Learning", LEARNING, learning(comparison, shown)]
    if tracked := [name for name in shown if any("target" in row for row in comparison.runs(name).values())]:
        parts += ["## Holding a target", HOLDING]
        for point, names in by_point(shown, tracked):
            parts += [f"### {point[0].upper() + point[1:]}" if point else "### Main target, rate x1"]
            parts += [holding(comparison, names)]
    if rounding_of := [row for row in comparison.rows if row["split"] > 1 and row["setting"] in shown]:
        parts += ["## Rounding", ROUNDING, rounding(comparison, rounding_of)]
    return "\n\n".join(parts) + "\n"


def made(rows: Iterable[Row]) -> str:
    """Return which code and which versions made how many of the runs."""
    counts = Counter(tuple(f"{name} {value}" for name, value in row["made"].items()) for row in rows)
    return "Made with " + "; ".join(f"{', '.join(key)} ({count} runs)" for key, count in counts.items()) + "."


def by_point(shown: Mapping[str, Setting], names: Iterable[str]) -> list[tuple[str, list[str]]]:
    def point(name: str) -> str:
        return shown[name].point

    return [(key, list(group)) for key, group in groupby(sorted(names, key=point), point)]


def results(comparison: Comparison, shown: Iterable[str]) -> str:
    shown = list(shown)
    present = [name for name in MEASURES if any(comparison.values(setting, name) for setting in shown)]
    header = ["", *(MEASURES[name][0] for name in present), "seeds"]
    lines = []
    for setting in shown:
        runs = len(comparison.runs(setting))
        cells = []
        for name in present:
            values = list(comparison.values(setting, name).values())
            cells.append(_mean_cell(values, MEASURES[name][1]) + _count(len(values), runs) if values else "")
        lines.append([setting, *cells, str(runs)])
    return table(header, lines)


def differences(comparison: Comparison, shown: Mapping[str, Setting]) -> str:
    header = ["", *(f"{MEASURES[name][0]}, to {other}" for name in COMPARED for other in ("GRPO", "best bonus"))]
    lines = []
    for name, setting in shown.items():
        if name == setting.plain:
            continue
        bonus = comparison.best_bonus(setting.point)
        others = [setting.plain, bonus if bonus != name else None]
        cells = [_difference_cell(comparison, name, other, measure) for measure in COMPARED for other in others]
        lines.append([name, *cells, str(len(comparison.runs(name))), bonus if others[1] else ""])
    return table([*header, "seeds", "best bonus"], lines)


def learning(comparison: Comparison, shown: Iterable[str]) -> str:
    def learned_by(name: str) -> dict[int, Row]:
        return {seed: row["learned"] for seed, row in comparison.runs(name).items() if "learned" in row}

    lines = []
    for name in shown:
        learned, plain = learned_by(name), comparison.settings[name].plain
        theirs = {} if name == plain else learned_by(plain)
        pairs = [(one, theirs[seed]) for seed, one in learned.items() if seed in theirs]
        if learned:
            medians = [_median([one[measure] for one in learned.values()], 0) for measure in EFFORT]
            ratios = [_spread([ours[measure] / other[measure] for ours, other in pairs]) for measure in EFFORT]
            lines.append([name, *medians, *ratios, f"{len(learned)} of {len(comparison.runs(name))}"])
    header = [*EFFORT.values(), *(f"{word}, to GRPO" for word in EFFORT.values())]
    return table(["", *header, "seeds that learned"], lines)


def holding(comparison: Comparison, names: Iterable[str]) -> str:
    header = ["", "lands at", "GRPO passes", "ratio", "mean error", "rms", "undershoot", "of ten steps"]
    lines = []
    for name in names:
        runs = {seed: row for seed, row in comparison.runs(name).items() if "target" in row}
        plain = comparison.runs(comparison.settings[name].plain)
        tracked = {seed: track(row["entropy"], row["target"]) for seed, row in runs.items()}
        passes = {seed: _crossing(plain[seed], row["target"]) for seed, row in runs.items() if seed in plain}
        ratios = [tracked[seed].lands / step for seed, step in passes.items() if math.isfinite(step)]
        landed = [one for one in tracked.values() if math.isfinite(one.lands)]
        bounded = [row["bounded"] for row in runs.values() if "bounded" in row]
        cells = [
            _median([one.lands for one in tracked.values()], 0) + _count(len(landed), len(runs)),
            _median(passes.values(), 0),
            _median(ratios, 2),
            _median([one.mean_error for one in landed], 3, sign=True),
            *(
                _median([getattr(one, measure) for one in landed], 3)
                for measure in ("rms", "undershoot", "undershoot_smooth")
            ),
            _median(bounded, 0),
            str(len(runs)),
        ]
        lines.append([name, *cells])
    return table([*header, "at bound", "seeds"], lines)


def _crossing(plain: Row, target: Any) -> float:
    """Return the step at which plain GRPO passes a target; infinity without one, or for a run of another length."""
    length = len(target) if isinstance(target, list) else None
    return landing(plain["entropy"][:length], target) if not length or length <= len(plain["entropy"]) else math.inf


def rounding(comparison: Comparison, repeated: Iterable[Row]) -> str:
    """Return the noise of rounding beside that of seeds."""
    measures: dict[str, Callable[[Row], float]] = {
        "avg@16": lambda row: row.get("avg16", math.nan),
        "distinct": lambda row: row.get("distinct", math.nan),
        "end entropy": lambda row: row["end_entropy"],
        "rms": lambda row: track(row["entropy"], row["target"]).rms if "target" in row else math.nan,
    }
    header = ["", *(f"{name}, {over}" for name in measures for over in ("seeds", "rounding")), "seeds", "repetitions"]
    lines = []
    repeated = sorted(repeated, key=lambda row: (list(comparison.settings).index(row["setting"]), row["seed"]))
    for (name, seed), group in groupby(repeated, lambda row: (row["setting"], row["seed"])):
        seeds = comparison.runs(name)
        same = [*([seeds[seed]] if seed in seeds else []), *group]
        cells = [
            _deviation([get(row) for row in runs]) for get in measures.values() for runs in (seeds.values(), same)
        ]
        lines.append([f"{name}, seed {seed}", *cells, str(len(seeds)), str(len(same))])
    return table(header, lines)


# ---- cells


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table without the columns that are empty throughout."""
    lines = list(lines)
    kept = [0, *(column for column in range(1, len(header)) if any(line[column] for line in lines))]
    rows = [[line[column] for column in kept] for line in (header, *lines)]
    rows.insert(1, ["---"] * len(kept))
    rule = "|" + "|".join(rows[1]) + "|"
    texts = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([texts[0].replace("|  |", "| |"), rule, *texts[2:]])


def _mean_cell(values: Sequence[float], digits: int) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} {PM} {half:.{digits}f}"


def _difference_cell(comparison: Comparison, name: str, other: str | None, measure: str) -> str:
    change = other and difference(comparison.values(name, measure), comparison.values(other, measure))
    if not change:
        return ""
    digits = COMPARED[measure]
    text = f"{change.difference:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"
    text += _count(change.problems, len(comparison.runs(name)))
    return f"**{text}**" if separates(change) else text


def _median(values: Iterable[float], digits: int, sign: bool = False) -> str:
    values = list(values)
    middle = float(np.median(values)) if values else math.nan
    return "" if math.isnan(middle) else "never" if math.isinf(middle) else f"{middle:{'+' * sign}.{digits}f}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def _deviation(values: Sequence[float]) -> str:
    values = [value for value in values if math.isfinite(value)]
    return f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""


def _count(some: int, every: int) -> str:
    return f" ({some} of {every})" if some < every else ""
