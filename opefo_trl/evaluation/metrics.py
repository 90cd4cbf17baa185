"""Metrics of graded samples: pass@k, avg@k, majority@k, their uncertainty, and calibration.

    pass@k       1 - C(n - c, k) / C(n, k) for n samples, c of them right: the chance that one of k samples is right
                 (Chen et al., arXiv 2107.03374); unbiased for k <= n, and there is no such estimate for k > n
    avg@k        c / n, which is pass@1
    majority@k   the share of votes won by a right answer; samples vote in consecutive blocks of k (Wang et al., arXiv
                 2203.11171)
    calibration  sum over bins of |sum of (right - confidence)|, divided by the samples (Guo et al., arXiv 1706.04599)

The first three are means over problems. Each problem counts once, however many samples it has. `passes`, `averages`
and `majorities` return the values per problem, which the uncertainty is computed from: problems differ far more than
the samples of one problem, so intervals and tests resample problems.
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

Samples = Iterable[Iterable[float]]  # for each problem its samples, 1 (right) or 0
Answers = Iterable[Iterable[str | None]]  # for each problem the answers of its samples

MAX_EXACT = 16  # with up to this many differences the permutation test goes through all signs, 65,536 of them
_CHUNK = 2**20  # random numbers drawn at once, 8 MiB
_SCRIPTS = Path(__file__).parent / "evaluate_metrics"


def pass_of(n: int, c: int, k: int) -> float:
    """Return pass@k of one problem with n samples, c of them right."""
    _check_draws(k, n)
    if not 0 <= c <= n:
        raise ValueError(f"`c={c}` right samples must be in [0, {n}], as there are `n={n}` samples.")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws  # integers until here, so it is rounded only once


def passes(right: Samples, k: int) -> list[float]:
    """Return pass@k of each problem."""
    rows = _verdicts(right)
    for problem, samples in enumerate(rows):
        _check_draws(k, len(samples), problem)
    return [pass_of(len(samples), sum(samples), k) for samples in rows]


def pass_at_k(right: Samples, k: int) -> float:
    """Return the chance that one of k samples is right, averaged over problems."""
    return fmean(passes(right, k))


def averages(right: Samples) -> list[float]:
    """Return the share of right samples of each problem."""
    return [fmean(samples) for samples in _verdicts(right)]


def avg_at_k(right: Samples) -> float:
    """Return the share of right samples, averaged over problems, which may have different numbers of samples."""
    return fmean(averages(right))


def majorities(answers: Answers, right: Samples, k: int | None = None) -> list[float]:
    """
    Return for each problem the share of votes won by a right answer.

    Samples vote in consecutive blocks of k (None: all together); a last block of fewer does not vote. Tied answers
    share the vote. An answer of None does not vote, and a block without any answer is wrong.
    """
    verdicts, answer_rows = _verdicts(right), [list(row) for row in answers]
    if len(answer_rows) != len(verdicts):
        raise ValueError(
            f"`answers` has {len(answer_rows)} problems and `right` has {len(verdicts)}; give both for each."
        )
    for problem, (row, samples) in enumerate(zip(answer_rows, verdicts, strict=True)):
        if len(row) != len(samples):
            raise ValueError(f"Problem {problem} has {len(row)} answers and {len(samples)} verdicts.")
        for answer in row:
            if answer is not None and not isinstance(answer, str):
                raise ValueError(f"An answer is a text, or None if there is none; problem {problem} has {answer!r}.")
        if k is not None:
            _check_draws(k, len(samples), problem)
    return [_vote_share(row, samples, k) for row, samples in zip(answer_rows, verdicts, strict=True)]


def majority_at_k(answers: Answers, right: Samples, k: int | None = None) -> float:
    """Return the share of votes won by a right answer, averaged over problems."""
    return fmean(majorities(answers, right, k))


def standard_error(values: Iterable[float]) -> float:
    """Return the standard error of the mean over problems, from one value per problem."""
    array = _finite_values("values", values)
    if len(array) < 2:
        raise ValueError("A standard error takes two or more problems, as one does not show how problems differ.")
    return float(array.std(ddof=1) / math.sqrt(len(array)))


def bootstrap_interval(
    values: Iterable[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over problems, from one value per problem."""
    array = _finite_values("values", values)
    _check_resampling(level, resamples)
    rng = np.random.default_rng(seed)
    means = [rng.choice(array, (rows, len(array))).mean(1) for rows in _chunks(resamples, len(array))]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedDifference:
    """
    Comparison of two settings on the same problems.

    Args:
        difference (`float`): mean after minus mean before.
        low (`float`), high (`float`): bootstrap interval of the difference.
        p_value (`float`): chance of a difference at least as large, of either sign, if before and after are swapped
            at random.
        problems (`int`): number of problems.
    """

    difference: float
    low: float
    high: float
    p_value: float
    problems: int


def paired_difference(
    before: Iterable[float], after: Iterable[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare one value per problem, in the same order: bootstrap over problems and a sign-flip permutation test."""
    old, new = _finite_values("before", before), _finite_values("after", after)
    if len(old) != len(new):
        raise ValueError(
            f"`before` has {len(old)} problems and `after` has {len(new)}; a paired difference takes the same "
            "problems in the same order."
        )
    differences = new - old
    low, high = bootstrap_interval(differences, level, resamples, seed)
    p_value = _sign_flip(differences[differences != 0], resamples, seed)
    return PairedDifference(float(differences.mean()), low, high, p_value, len(differences))


def calibration_error(confidence: Iterable[float], right: Iterable[float], bins: int = 10) -> float:
    """Return the expected calibration error, from a confidence in [0, 1] and a verdict for each sample. Bins are
    equally wide and include their lower bound; the last one includes 1 too."""
    sure, verdicts = _finite_values("confidence", confidence, "sample"), _finite_values("right", right, "sample")
    if not _is_whole(bins) or bins < 1:
        raise ValueError(f"`bins={bins!r}` must be a whole number, 1 or more.")
    if len(sure) != len(verdicts):
        raise ValueError(f"`confidence` has {len(sure)} values and `right` has {len(verdicts)}; give both for each.")
    if ((sure < 0) | (sure > 1)).any():
        raise ValueError(f"A confidence is a probability, in [0, 1]; {sure[(sure < 0) | (sure > 1)][0]:g} is not.")
    if not np.isin(verdicts, (0, 1)).all():
        raise ValueError(f"A verdict is 0 or 1; {verdicts[~np.isin(verdicts, (0, 1))][0]:g} is not.")
    lower = np.arange(bins) / bins  # not `sure * bins`: 0.57 * 100 is 56.99999999999999, below its bin
    bin_of_sample = np.searchsorted(lower, sure, side="right") - 1
    return float(np.abs(np.bincount(bin_of_sample, verdicts - sure)).sum() / len(sure))


def metric_path(name: str) -> str:
    """Return the path that `evaluate.load` takes for a metric, given its function's name. Needs no network."""
    names = sorted(path.stem for path in _SCRIPTS.glob("[!_]*.py"))
    return str(_SCRIPTS / f"{check_choice('metric', name, names)}.py")


def _vote_share(answers: Sequence[str | None], right: Sequence[int], k: int | None) -> float:
    size, verdicts_of = k or len(answers), defaultdict(list)
    for answer, verdict in zip(answers, right, strict=True):
        verdicts_of[answer].append(verdict)
    # A grader may judge one text in two ways, so an answer is worth the mean of its verdicts
    worth = {answer: fmean(verdicts) for answer, verdicts in verdicts_of.items()}
    starts = range(0, len(answers) - size + 1, size)
    return fmean(_vote(answers[start : start + size], worth) for start in starts)


def _vote(block: Sequence[str | None], worth: dict[str | None, float]) -> float:
    votes = Counter(answer for answer in block if answer is not None)
    most = max(votes.values(), default=0)
    return fmean(worth[answer] for answer, count in votes.items() if count == most) if votes else 0.0


def _sign_flip(changes: NDArray[np.float64], resamples: int, seed: int) -> float:
    """Return the two-sided p value: the share of all assignments of signs to the changes whose sum is as far from 0.
    Too many are sampled at random, and the observed one is counted among them."""
    # A sum that equals the observed one but for rounding counts
    observed = abs(changes.sum()) - 1e-12 * np.abs(changes).sum()
    if len(changes) <= MAX_EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)  # (2^changes, changes)
        return float((np.abs(signs @ changes) >= observed).mean())
    rng = np.random.default_rng(seed)
    drawn = (rng.choice((-1.0, 1.0), (rows, len(changes))) for rows in _chunks(resamples, len(changes)))
    return (1 + sum(int((np.abs(signs @ changes) >= observed).sum()) for signs in drawn)) / (1 + resamples)


def _chunks(rows: int, width: int) -> Iterator[int]:
    """Divide `rows` rows of `width` numbers into chunks that fit into memory, and yield the rows of each."""
    most = max(1, _CHUNK // width)
    for done in range(0, rows, most):
        yield min(most, rows - done)


def _verdicts(right: Samples) -> list[list[int]]:
    rows = []
    for problem, samples in enumerate(right):
        if not isinstance(samples, Iterable):
            raise ValueError(f"`right` must have a row of samples for each problem; problem {problem} is {samples!r}.")
        row = list(samples)
        if not row:
            raise ValueError(f"Problem {problem} has no samples. Remove it, or sample it.")
        for value in row:
            if value not in (0, 1):
                raise ValueError(
                    f"A verdict is 0 or 1; problem {problem} has {value!r}. Turn rewards into verdicts first, and "
                    "count a sample without one (a timeout, a truncated text) as 0."
                )
        rows.append([int(value) for value in row])
    if not rows:
        raise ValueError("There are no problems to average over.")
    return rows


def _finite_values(name: str, values: Iterable[float], per: str = "problem") -> NDArray[np.float64]:
    """Return finite numbers as an array, (values,)."""
    try:
        array = np.asarray(list(values), dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1:
        fix = "`averages` and `passes` compute them from samples" if per == "problem" else "flatten rows first"
        raise ValueError(f"`{name}` must be numbers, one per {per}; {fix}.")
    if not len(array):
        raise ValueError(f"`{name}` is empty.")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"`{name}` must be finite numbers; number {index}, counted from 0, is {array[index]}.")
    return array


def _check_draws(k: int, samples: int, problem: int | None = None) -> None:
    if not _is_whole(k) or k < 1:
        raise ValueError(f"`k={k!r}` must be a whole number, 1 or more.")
    if k > samples:
        has = f"`n={samples}`" if problem is None else f"problem {problem} has {samples}"
        raise ValueError(
            f"`k={k}` takes {k} samples or more, but {has}: there is no unbiased estimate from fewer. Draw {k} or "
            "more for each problem, or lower k."
        )


def _check_resampling(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level={level!r}` must lie between 0 and 1, such as 0.95.")
    if not _is_whole(resamples) or resamples < 1:
        raise ValueError(f"`resamples={resamples!r}` must be a whole number, 1 or more.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
