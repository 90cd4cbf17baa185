"""Metrics against exact values, brute force over their definition, and arithmetic by hand."""

import itertools
import json
import math
import re
import tracemalloc
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from material import MATERIAL

from opefo_trl.evaluation.metrics import (
    MAX_EXACT,
    PairedDifference,
    averages,
    avg_at_k,
    bootstrap_interval,
    calibration_error,
    majorities,
    majority_at_k,
    metric_path,
    paired_difference,
    pass_at_k,
    pass_of,
    passes,
    standard_error,
)

CASES = json.loads((MATERIAL / "passk_cases.json").read_text())
ROWS = st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=9), min_size=1, max_size=5)


def test_public_cases_are_met():
    assert len(CASES["estimator_cases"]) >= 27
    for case in CASES["estimator_cases"]:
        value = pass_of(case["n"], case["c"], case["k"])
        assert value == float(Fraction(case["exact"]))
        assert value == pytest.approx(case["pass_at_k"], abs=1e-12)
    assert len(CASES["aggregate_cases"]) >= 7
    for case in CASES["aggregate_cases"]:
        assert pass_at_k(case["samples"], case["k"]) == pytest.approx(case["expected"], abs=1e-12), case["name"]
        if "avg_at_n" in case:
            assert avg_at_k(case["samples"]) == pytest.approx(case["avg_at_n"], abs=1e-12), case["name"]


@given(ROWS)
def test_pass_at_k_grows_with_k_from_the_average_to_any(rows):
    values = [pass_at_k(rows, k) for k in range(1, min(map(len, rows)) + 1)]
    assert values == sorted(values) and values[0] >= 0 and values[-1] <= 1
    assert values[0] == pytest.approx(avg_at_k(rows), abs=1e-15)
    same = [row[: len(min(rows, key=len))] for row in rows]
    assert pass_at_k(same, len(same[0])) == sum(map(any, same)) / len(same)


def test_problems_count_once_however_many_samples_they_have():
    # (2/2 + 0/6) / 2, and not 2/8; pass@2: (1 + 0) / 2
    assert avg_at_k([[1, 1], [0] * 6]) == 0.5
    assert averages([[1, 1], [0] * 6]) == [1.0, 0.0]
    assert pass_at_k([[1, 1], [0] * 6], 2) == 0.5
    # of two: 1 - C(3, 2) / C(4, 2) = 1/2; of three: 1 - C(1, 2) / C(3, 2) = 1
    assert passes([[0, 1, 0, 0], [1, 1, 0]], 2) == [0.5, 1.0]
    assert pass_of(4, np.int64(1), np.int64(2)) == 0.5
    assert majorities([["a"], ["a"]], [[1], [0]]) == [1.0, 0.0]  # each judges its answers for itself


def test_verdicts_may_be_booleans_numbers_or_an_array():
    for rows in ([[True, False]], [[1, 0]], [[1.0, 0.0]], np.array([[True, False]]), ((value,) for value in (1, 0))):
        assert avg_at_k(rows) == 0.5


@pytest.mark.parametrize(
    "measure", [lambda rows: pass_at_k(rows, 1), avg_at_k, lambda rows: majority_at_k(rows, rows)]
)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no problems"),
        ([[1], []], "Problem 1 "),
        ([1, 0], "`right`.*problem 0 is 1"),
        ([[1, 0], [0, 0.5]], "problem 1 has 0.5.*rewards"),
        ([[math.nan]], "problem 0 has nan"),
        ([[None]], "problem 0 has None.* 0"),
        (["10"], "problem 0 has '1'"),
        ([[2]], "problem 0 has 2"),
    ],
)
def test_a_value_that_is_no_verdict_is_refused(measure, rows, message):
    with pytest.raises(ValueError, match=message):
        measure(rows)


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        # the first block is aab, the second bba, the last b is no block; a is right
        (list("aabbbab"), [1, 1, 0, 0, 0, 1, 0], 3, 0.5),
        (list("aabbbab"), [1, 1, 0, 0, 0, 1, 0], None, 0),  # b by 4 to 3
        # three answers have one vote each, one of them is right
        (["a", "b", "c"], [0, 1, 0], None, 1 / 3),
        # no answer does not vote: the first block has a, the second none, and none is wrong
        (["a", None, None, None], [1, 0, 0, 0], 2, 0.5),
        # an answer with two verdicts is worth their mean: a wins either block; of its 4 verdicts 3 are right
        (["a", "a", "a", "a"], [1, 1, 1, 0], 2, 0.75),
    ],
)
def test_the_most_frequent_answer_of_each_block_wins(answers, right, k, expected):
    assert majority_at_k([answers], [right], k) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1, max_size=8), st.data())
def test_majority_is_the_expected_verdict_of_ties_broken_at_random(samples, data):
    answers, right = [name for name, _ in samples], [verdict for _, verdict in samples]
    k = data.draw(st.integers(1, len(samples)))
    blocks = []
    for start in range(0, len(samples) - len(samples) % k, k):
        block, verdicts = answers[start : start + k], []
        for order in itertools.permutations("abc"):  # whoever comes first wins a tie
            winner = max(order, key=block.count)
            judged = [verdict for name, verdict in samples if name == winner]
            verdicts.append(sum(judged) / len(judged) if block.count(winner) else 0)
        blocks.append(sum(verdicts) / len(verdicts))
    assert majority_at_k([answers], [right], k) == pytest.approx(sum(blocks) / len(blocks))


def test_the_uncertainty_of_four_problems_by_hand():
    # deviations of 1, 0, 0, 1 from 1/2: variance 4 (1/4) / 3 = 1/3, over 4 problems 1/12
    assert standard_error([1, 0, 0, 1]) == pytest.approx(math.sqrt(1 / 12))
    # the mean of 4 draws from 0, 0, 1, 1 is 0, 1/4, 1/2, 3/4, 1 with 1, 4, 6, 4, 1 sixteenths: a tail of 1/10 ends in
    # 1/4, one of 1/40 in 0
    assert bootstrap_interval([0, 0, 1, 1], level=0.8) == (0.25, 0.75)
    assert bootstrap_interval([0, 0, 1, 1], level=0.95) == (0.0, 1.0)


def test_bootstrap_of_many_problems_is_the_normal_one_in_bounded_memory():
    values = np.random.default_rng(0).normal(0.5, 0.1, size=5_000)
    tracemalloc.start()
    low, high = bootstrap_interval(values, resamples=2_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # all at once, 2,000 x 5,000 numbers would be 80 MB, and their places as much again
    assert low == pytest.approx(values.mean() - 1.96 * standard_error(values), abs=2e-4)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error(values), abs=2e-4)


def test_bootstrap_repeats_itself_and_follows_its_seed():
    values = np.random.default_rng(0).random(30)
    assert bootstrap_interval(values) == bootstrap_interval(list(values)) == bootstrap_interval(values, seed=0)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


@pytest.mark.parametrize("measure", [bootstrap_interval, standard_error, partial(paired_difference, [0])])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "is empty"),
        ([0.5, math.nan], "number 1, counted from 0, is nan"),
        ([math.inf, 0.5], "number 0, counted from 0, is inf"),
        ([[1, 0], [1]], "one per problem; `averages` and `passes`"),
        ([[1, 0], [1, 1]], "one per problem"),
        (["x"], "one per problem"),
    ],
)
def test_a_value_that_is_none_of_a_problem_is_refused(measure, values, message):
    with pytest.raises(ValueError, match=f"`(values|after)` .*{message}"):
        measure(values)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=7))
def test_p_value_is_that_of_all_signs_and_ties_survive_rounding(pairs):
    changes = np.array([after - before for before, after in pairs])
    sums = np.abs(np.array(list(itertools.product((1, -1), repeat=len(changes)))) @ changes)
    # tenths are not exact, so sums that are equal differ in their last digit
    result = paired_difference([before / 10 for before, _ in pairs], [after / 10 for _, after in pairs], resamples=1)
    assert result.p_value == pytest.approx((sums >= abs(changes.sum())).mean(), abs=1e-12)


def test_problems_without_a_change_change_no_p_value():
    # changes 1, 1, 1: of 8 ways to sign them 2 are as far from 0
    assert paired_difference([0] * 3 + [1] * 30, [1] * 33).p_value == 0.25
    assert paired_difference([1, 0.5], [1, 0.5]) == PairedDifference(0.0, 0.0, 0.0, 1.0, 2)


def test_a_difference_is_that_of_the_changes_and_its_p_value_is_drawn_near_that_of_all_signs():
    rng = np.random.default_rng(3)
    before, after = rng.random(MAX_EXACT + 2), rng.random(MAX_EXACT + 2) + 0.12
    changes = after - before
    signs = 1 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)
    exact = (np.abs(signs @ changes) >= abs(changes.sum()) - 1e-9).mean()
    assert 0.02 < exact < 0.5
    result = paired_difference(before, after)
    assert result.difference == pytest.approx(changes.mean())
    assert (result.low, result.high) == bootstrap_interval(changes)
    found = result.p_value
    # standard deviation of a share of 10,000
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000)) and found != exact


def test_a_drawn_p_value_is_never_zero_and_depends_on_nothing_but_the_seed():
    before, after = np.zeros(500), np.ones(500)
    result = paired_difference(before, after, resamples=99)
    assert result == PairedDifference(1.0, 1.0, 1.0, 1 / 100, 500)  # what was seen is one of 1 + 99
    noisy = np.random.default_rng(0).normal(0.05, 1, size=500)
    assert paired_difference(before, noisy) == paired_difference(before, noisy)
    assert paired_difference(before, noisy).p_value != paired_difference(before, noisy, seed=1).p_value


def test_a_bin_holds_its_lower_bound_and_the_last_one_also_its_upper():
    # 1 and .9 are in one bin: |(0 - 1) + (1 - .9)| / 2
    assert calibration_error([1.0, 0.9], [0, 1], bins=10) == pytest.approx(0.45)
    # 100 * 0.57 is 56.99999999999999; both are in [.57, .58), so the errors cancel: |.43 - .575| / 2
    assert calibration_error([0.57, 0.575], [1, 0], bins=100) == pytest.approx((0.575 - 0.43) / 2)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=20), st.integers(1, 12))
def test_calibration_error_is_that_of_a_loop_over_bins(samples, bins):
    total = 0.0
    for place in range(bins):
        upper = math.inf if place == bins - 1 else (place + 1) / bins
        members = [(sure, right) for sure, right in samples if place / bins <= sure < upper]
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            total += abs(accuracy - sum(sure for sure, _ in members) / len(members)) * len(members) / len(samples)
    found = calibration_error([sure for sure, _ in samples], [right for _, right in samples], bins)
    assert found == pytest.approx(total, abs=1e-12)
    assert 0 <= found <= 1


TOO_FEW = "`k=4`.*problem 1 has 3.*lower k"
(NO_ESTIMATE,) = CASES["must_not_silently_score"]
REFUSED = {  # a number that cannot be computed -> the field, value and fix that are named
    "more draws than cases": (
        lambda: pass_of(NO_ESTIMATE["n"], NO_ESTIMATE["c"], NO_ESTIMATE["k"]),
        f"`k={NO_ESTIMATE['k']}`.*`n={NO_ESTIMATE['n']}`",
    ),
    "more draws than samples": (lambda: pass_at_k([[1, 0, 0, 0], [1, 1, 1]], 4), TOO_FEW),
    "more votes than samples": (lambda: majority_at_k([["a"] * 4, ["a"] * 3], [[1] * 4, [1] * 3], 4), TOO_FEW),
    "a negative count": (lambda: pass_of(4, -1, 1), r"`c=-1`.*\[0, 4\].*`n=4`"),
    "a count above all": (lambda: pass_of(4, 5, 1), r"`c=5`.*\[0, 4\].*`n=4`"),
    "fewer answers": (lambda: majority_at_k([["a"]], [[1], [0]]), "`answers` has 1 .*`right` has 2"),
    "more verdicts": (lambda: majority_at_k([["a"], ["a"]], [[1], [0, 1]]), "Problem 1 has 1 .* 2"),
    # 12 and "12" would be two answers, and NaN one that is never the same
    "NaN as an answer": (lambda: majority_at_k([["12", math.nan]], [[1, 1]]), "problem 0 has nan"),
    "a number as an answer": (lambda: majority_at_k([["12", 12]], [[1, 1]]), "problem 0 has 12"),
    "one problem": (lambda: standard_error([0.5]), "two or more problems"),
    "no pair": (lambda: paired_difference([0, 1], [1]), "`before` has 2 .*`after` has 1"),
    "above 1": (lambda: calibration_error([0.5, 1.1], [1, 0]), "1.1 is not"),
    "below 0": (lambda: calibration_error([-0.2], [1]), "-0.2 is not"),
    "NaN": (lambda: calibration_error([math.nan], [1]), "`confidence` .*number 0, counted from 0, is nan"),
    "half right": (lambda: calibration_error([0.5], [0.5]), "0.5 is not"),
    "two verdicts": (lambda: calibration_error([0.5], [1, 0]), "`confidence` has 1 .*`right` has 2"),
    "no samples": (lambda: calibration_error([], []), "`confidence` is empty"),
    "rows": (lambda: calibration_error([0.5], [[1]]), "`right` .*one per sample"),
    "a metric's name": (lambda: metric_path("pass@k"), "`metric='pass@k'`.*'avg_at_k', .*'pass_at_k'"),
    "a module's name": (lambda: metric_path("__init__"), "`metric='__init__'`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_value_is_refused(case):
    compute, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        compute()


NOT_WHOLE = (0, -1, 1.0, True, "1")


@pytest.mark.parametrize(
    ("measure", "name", "values"),
    [
        (partial(pass_at_k, [[1, 0]]), "k", (*NOT_WHOLE, None)),
        (partial(majority_at_k, [["a", "b"]], [[1, 0]]), "k", NOT_WHOLE),
        (partial(calibration_error, [0.5], [1]), "bins", NOT_WHOLE),
        (partial(bootstrap_interval, [0.5]), "resamples", NOT_WHOLE),
        (partial(paired_difference, [0], [0.5]), "resamples", NOT_WHOLE),
        (partial(bootstrap_interval, [0.5]), "level", (0, 1, 95, -0.1, math.nan)),
        (partial(paired_difference, [0], [0.5]), "level", (0, 1, 95, -0.1, math.nan)),
    ],
)
def test_an_option_that_cannot_be_is_refused(measure, name, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"`{name}={value!r}`")):
            measure(**{name: value})
