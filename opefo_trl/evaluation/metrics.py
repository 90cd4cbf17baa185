"""What graded samples say of a model: pass@k, avg@k, majority@k, how sure they are, and calibration.

    pass@k       1 - C(n - c, k) / C(n, k) of n samples, c of them right: the chance that k samples have a right one
                 (Chen et al., arXiv 2107.03374); unbiased for k <= n, and of k > n there is no such estimate
    avg@k        c / n, which is pass@1
    majority@k   whether the most frequent answer of k samples is right (Wang et al., arXiv 2203.11171)
    calibration  sum over bins of |sum of (right - confidence)|, over all samples (Guo et al., arXiv 1706.04599)

The first three are means over problems, each of which counts once, however many samples it has. `passes`, `averages`
and `majorities` are their values per problem, from which the uncertainty comes: problems differ far more than samples
of one problem do, so intervals and tests draw problems.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opefo_trl.validation import check_choice

Samples = Iterable[Iterable[float]]  # of each problem its samples, 1 (right) or 0
Answers = Iterable[Iterable[str | None]]

EXACT = 16  # up to so many differences the permutation test goes through all signs, 65,536 of them
AT_ONCE = 2**20  # random numbers, 8 MiB
SCRIPTS = Path(__file__).parent / "evaluate_metrics"


def pass_of(n: int, c: int, k: int) -> float:
    """pass@k of one problem, of whose n samples c are right."""
    _check_draws(k, n)
    if not 0 <= c <= n:
        raise ValueError(f"`c={c}` right samples of `n={n}`: there can be 0 to {n}.")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws  # whole numbers until here: rounded once


def passes(right: Samples, k: int) -> list[float]:
    """pass@k of each problem."""
    rows = _verdicts(right)
    for problem, samples in enumerate(rows):
        _check_draws(k, len(samples), problem)
    return [pass_of(len(samples), sum(samples), k) for samples in rows]


def pass_at_k(right: Samples, k: int) -> float:
    """The chance that one of k samples is right, mean over problems."""
    return fmean(passes(right, k))


def averages(right: Samples) -> list[float]:
    """The share of right samples of each problem."""
    return [fmean(samples) for samples in _verdicts(right)]


def avg_at_k(right: Samples) -> float:
    """The share of right samples, mean over problems. If some have more samples, this is not the share of all."""
    return fmean(averages(right))


def majorities(answers: Answers, right: Samples, k: int | None = None) -> list[float]:
    """
    Of each problem, the share of its votes that a right answer wins. Its samples vote in blocks of k, one after the
    other (None: all of them together); fewer than k at the end do not vote. Tied answers share the vote. An answer of
    None does not vote, and a block without any answer is wrong.
    """
    verdicts, named = _verdicts(right), [list(row) for row in answers]
    if len(named) != len(verdicts):
        raise ValueError(f"`answers` has {len(named)} problems and `right` has {len(verdicts)}; give both for each.")
    for problem, (names, samples) in enumerate(zip(named, verdicts, strict=True)):
        if len(names) != len(samples):
            raise ValueError(f"Problem {problem} has {len(names)} answers and {len(samples)} verdicts.")
        for name in names:
            if name is not None and not isinstance(name, str):
                raise ValueError(f"Answers are texts, or None where there is none; problem {problem} has {name!r}.")
        if k is not None:
            _check_draws(k, len(samples), problem)
    return [_vote_share(names, samples, k) for names, samples in zip(named, verdicts, strict=True)]


def majority_at_k(answers: Answers, right: Samples, k: int | None = None) -> float:
    """The share of votes among k samples that a right answer wins, mean over problems."""
    return fmean(majorities(answers, right, k))


def standard_error(values: Iterable[float]) -> float:
    """Of the mean over problems, from one value per problem."""
    known = _values("values", values)
    if len(known) < 2:
        raise ValueError("One problem says nothing of how problems differ; a standard error takes two or more.")
    return float(known.std(ddof=1) / math.sqrt(len(known)))


def bootstrap_interval(
    values: Iterable[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """
    Percentile bootstrap of the mean of one value per problem: the middle `level` of the means of as many problems,
    drawn with replacement.
    """
    known = _values("values", values)
    _check_resampling(level, resamples)
    rng = np.random.default_rng(seed)
    means = [rng.choice(known, (rows, len(known))).mean(1) for rows in _parts(resamples, len(known))]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedDifference:
    """
    Two settings on the same problems.

    Args:
        difference (`float`): mean after less mean before.
        low (`float`), high (`float`): the bootstrap interval of the difference.
        p_value (`float`): how often a difference as large, of either sign, comes about by swapping before and after
            at random.
        problems (`int`): how many there were.
    """

    difference: float
    low: float
    high: float
    p_value: float
    problems: int


def paired_difference(
    before: Iterable[float],
    after: Iterable[float],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """From a value per problem, in the same order: bootstrap over problems, and a sign-flip permutation test."""
    first, second = _values("before", before), _values("after", after)
    if len(first) != len(second):
        raise ValueError(
            f"`before` has {len(first)} problems and `after` has {len(second)}; a paired difference takes the same "
            "problems in the same order."
        )
    differences = second - first
    low, high = bootstrap_interval(differences, level, resamples, seed)
    p_value = _sign_flip(differences[differences != 0], resamples, seed)
    return PairedDifference(float(differences.mean()), low, high, p_value, len(differences))


def calibration_error(confidence: Iterable[float], right: Iterable[float], bins: int = 10) -> float:
    """
    Expected calibration error, of one confidence in [0, 1] and one verdict per sample. Bins are equally wide and hold
    their lower bound; the last one holds 1 too.
    """
    known, verdicts = _values("confidence", confidence, "sample"), _values("right", right, "sample")
    if not _is_whole(bins) or bins < 1:
        raise ValueError(f"`bins={bins!r}` must be a whole number, 1 or more.")
    if len(known) != len(verdicts):
        raise ValueError(f"`confidence` has {len(known)} values and `right` has {len(verdicts)}; give both for each.")
    if ((known < 0) | (known > 1)).any():
        raise ValueError(f"A confidence is a probability, in [0, 1]; {known[(known < 0) | (known > 1)][0]:g} is not.")
    if not np.isin(verdicts, (0, 1)).all():
        raise ValueError(f"A verdict is 0 or 1; {verdicts[~np.isin(verdicts, (0, 1))][0]:g} is not.")
    lower = np.arange(bins) / bins  # of 100 bins 0.57 begins one, though 0.57 * 100 is 56.99999999999999
    place = np.searchsorted(lower, known, side="right") - 1
    return float(np.abs(np.bincount(place, verdicts - known)).sum() / len(known))


def metric_path(name: str) -> str:
    """What `evaluate.load` takes for a measure of this module, by the name of its function; no network is needed."""
    known = sorted(path.stem for path in SCRIPTS.glob("[!_]*.py"))
    return str(SCRIPTS / f"{check_choice('metric', name, known)}.py")


def _vote_share(answers: Sequence[str | None], right: Sequence[int], k: int | None) -> float:
    size, judged = k or len(answers), defaultdict(list)
    for name, verdict in zip(answers, right, strict=True):
        judged[name].append(verdict)
    worth = {name: fmean(verdicts) for name, verdicts in judged.items()}  # a grader may judge one text in two ways
    return fmean(_vote(answers[i : i + size], worth) for i in range(0, len(answers) - size + 1, size))


def _vote(block: Sequence[str | None], worth: dict[str | None, float]) -> float:
    votes = Counter(name for name in block if name is not None)
    most = max(votes.values(), default=0)
    return fmean(worth[name] for name, count in votes.items() if count == most) if votes else 0.0


def _sign_flip(changes: NDArray[np.float64], resamples: int, seed: int) -> float:
    """
    The two-sided p value: the share of all ways to give the changes signs whose sum is as far from 0. Where there are
    too many ways, of some drawn at random, the one that was seen counted among them.
    """
    seen = abs(changes.sum()) - 1e-12 * np.abs(changes).sum()  # sums that are equal but for rounding are
    if len(changes) <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)  # (2^changes, changes)
        return float((np.abs(signs @ changes) >= seen).mean())
    rng = np.random.default_rng(seed)
    drawn = (rng.choice((-1.0, 1.0), (rows, len(changes))) for rows in _parts(resamples, len(changes)))
    return (1 + sum(int((np.abs(signs @ changes) >= seen).sum()) for signs in drawn)) / (1 + resamples)


def _parts(rows: int, width: int) -> Iterator[int]:
    """So many rows of numbers, in parts that fit into memory."""
    most = max(1, AT_ONCE // width)
    for done in range(0, rows, most):
        yield min(most, rows - done)


def _verdicts(right: Samples) -> list[list[int]]:
    rows = []
    for problem, samples in enumerate(right):
        if not isinstance(samples, Iterable):
            raise ValueError(f"`right` is a row of samples for each problem; problem {problem} is {samples!r}.")
        row = list(samples)
        if not row:
            raise ValueError(f"Problem {problem} has no samples. Leave it out, or sample it.")
        for value in row:
            if value not in (0, 1):
                raise ValueError(
                    f"A verdict is 0 or 1; problem {problem} has {value!r}. Make verdicts of rewards first, and "
                    "count a sample without one (a timeout, a cut text) as 0."
                )
        rows.append([int(value) for value in row])
    if not rows:
        raise ValueError("There are no problems, so there is no mean over them.")
    return rows


def _values(name: str, values: Iterable[float], per: str = "problem") -> NDArray[np.float64]:
    """Numbers as an array, (values,)."""
    try:
        known = np.asarray(list(values), dtype=np.float64)
    except (TypeError, ValueError):
        known = np.empty((0, 0))
    if known.ndim != 1:
        fix = "`averages` and `passes` make them of samples" if per == "problem" else "flatten rows first"
        raise ValueError(f"`{name}` must be numbers, one per {per}; {fix}.")
    if not len(known):
        raise ValueError(f"`{name}` is empty.")
    if not np.isfinite(known).all():
        place = int(np.flatnonzero(~np.isfinite(known))[0])
        raise ValueError(f"`{name}` must be finite numbers; number {place}, counted from 0, is {known[place]}.")
    return known


def _check_draws(k: int, samples: int, problem: int | None = None) -> None:
    if not _is_whole(k) or k < 1:
        raise ValueError(f"`k={k!r}` must be a whole number, 1 or more.")
    if k > samples:
        has = f"`n={samples}` is fewer" if problem is None else f"problem {problem} has {samples}"
        raise ValueError(
            f"`k={k}` takes {k} samples or more, and {has}: what {k} do cannot be told from fewer without guessing. "
            f"Draw {k} or more for each problem, or lower k."
        )


def _check_resampling(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level={level!r}` must lie between 0 and 1, such as 0.95.")
    if not _is_whole(resamples) or resamples < 1:
        raise ValueError(f"`resamples={resamples!r}` must be a whole number, 1 or more.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
