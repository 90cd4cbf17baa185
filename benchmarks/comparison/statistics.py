"""Statistics of a comparison, as pure functions of numbers.

landing        the first step at which the entropy is at or below its target
off target     error = entropy - target, from the landing on: its mean, its root mean square
undershoot     how far the entropy is below the target at most, in one step and in the mean of ten
interval       of a mean over seeds: Student's t, which is right for few seeds if they scatter normally
difference     paired over seeds, with a percentile bootstrap interval. It separates two settings if it excludes 0
               and the exact sign-flip test agrees (p <= 0.05), which takes six seeds or more: of three seeds of
               equal settings one in four bootstrap intervals excludes 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opefo_trl.evaluation.metrics import PairedDifference, paired_difference

SMOOTH = 10  # steps of the smoothed undershoot
# Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond them a series in 1 / degrees is exact to 1e-3
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_Z = 1.959964


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    third, fifth = _Z**3 + _Z, 5 * _Z**5 + 16 * _Z**3 + 3 * _Z
    return _Z + third / (4 * degrees) + fifth / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % interval; NaN from a single value."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedDifference | None:
    """Return ours minus theirs over the seeds that both have; None without two such seeds."""
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        return None
    return paired_difference([theirs[seed] for seed in seeds], [ours[seed] for seed in seeds])


def separates(change: PairedDifference) -> bool:
    """Return whether the interval excludes 0, and an exact test agrees."""
    return (change.low > 0 or change.high < 0) and change.p_value <= 0.05


def landing(entropy: Sequence[float], target: Sequence[float] | float) -> float:
    """Return the first step, counted from 1, at which entropy is at or below its target; infinity without one."""
    reached = np.flatnonzero(np.asarray(entropy) <= np.asarray(target))
    return float(reached[0] + 1) if len(reached) else math.inf


@dataclass(frozen=True)
class Tracking:
    """How a run holds its target, in nats from the landing on; NaN without a landing."""

    lands: float  # step, infinity if it never does
    mean_error: float = math.nan
    rms: float = math.nan
    undershoot: float = math.nan  # deepest step
    undershoot_smooth: float = math.nan  # deepest mean of ten steps
    furthest: float = math.nan  # step furthest from the target, on either side


def track(entropy: Sequence[float], target: Sequence[float] | float) -> Tracking:
    """Measure how the entropy of each step follows its target."""
    lands = landing(entropy, target)
    if math.isinf(lands):
        return Tracking(lands)
    error = (np.asarray(entropy, dtype=float) - np.asarray(target, dtype=float))[int(lands) - 1 :]
    window = min(SMOOTH, len(error))
    smooth = np.convolve(error, np.full(window, 1 / window), mode="valid")
    return Tracking(
        lands,
        float(error.mean()),
        float(np.sqrt((error**2).mean())),
        max(0.0, float(-error.min())),
        max(0.0, float(-smooth.min())),
        float(np.abs(error).max()),
    )


def longest_run(flags: Sequence[bool] | NDArray) -> int:
    """Return the largest number of true values in a row."""
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
