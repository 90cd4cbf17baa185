"""benchmarks/comparison: statistics by hand and by integration, and the tables of invented runs."""

import math

import numpy as np
import pytest
from comparison.settings import settings
from comparison.statistics import difference, landing, longest_run, mean_interval, separates, t_quantile, track
from comparison.tables import Comparison, document, table


@pytest.mark.parametrize("degrees", [1, 2, 9, 15, 16, 30, 200])
def test_student_s_t_has_95_percent_between_its_quantiles(degrees):
    x = np.linspace(0, t_quantile(degrees), 200_001)
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    assert 2 * constant * np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-4)


def test_the_interval_of_a_mean():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    mean, half = mean_interval([5.0])
    assert mean == 5 and math.isnan(half)


def test_a_difference_is_paired_by_seed():
    change = difference({0: 1.0, 1: 3.0, 7: 9.0}, {1: 1.0, 0: 0.0, 8: 5.0})
    assert (change.difference, change.problems) == (1.5, 2) and (change.low, change.high) == (1.0, 2.0)
    assert difference({0: 1.0}, {0: 1.0}) is None


def test_few_seeds_separate_nothing():
    def change(seeds):
        return difference({seed: 1 + seed / 10 for seed in range(seeds)}, dict.fromkeys(range(seeds), 0.0))

    assert change(3).low > 0 and not separates(change(3))  # three of one sign: one in four by chance
    assert not separates(change(5)) and separates(change(6))
    noise = {seed: (-1.0) ** seed for seed in range(10)}
    assert not separates(difference(noise, dict.fromkeys(range(10), 0.0)))


def test_how_a_target_is_held():
    held = track([1.0, 0.6, 0.4, 0.5, 0.3], 0.4)
    assert held.lands == 3 and held.mean_error == pytest.approx(0)
    assert held.rms == pytest.approx(math.sqrt(0.02 / 3))
    assert held.undershoot == pytest.approx(0.1)
    assert held.undershoot_smooth == pytest.approx(0)  # of three steps, since there are no ten
    moving = track([1.0, 0.6, 0.4], [0.9, 0.7, 0.6])
    assert moving.lands == 2 and moving.mean_error == pytest.approx(-0.15)
    never = track([1.0, 0.6], 0.4)
    assert math.isinf(never.lands) and math.isnan(never.rms)
    assert track([0.4, 0.5], 0.4).undershoot == 0
    long = track([0.4] * 10 + [0.3] * 10, 0.4)
    assert long.undershoot_smooth == pytest.approx(0.1) and track([0.4] * 30 + [0.3], 0.4).undershoot_smooth < 0.011


def test_landing_counts_steps_from_one():
    assert landing([0.4], 0.4) == 1 and landing([0.5, 0.4], 0.45) == 2 and math.isinf(landing([0.5], 0.4))


def test_the_longest_run():
    assert [longest_run(flags) for flags in ([], [False], [True, True, False, True])] == [0, 0, 2]


# ---- tables


def row(setting, seed, entropy, split=1, **measures):
    made = {"commit": "abc", "torch": "2"}
    measures = {"end_entropy": entropy[-1], "seconds": 2.0, **measures}
    return {"setting": setting, "seed": seed, "split": split, "entropy": entropy, "made": made, **measures}


LEARNED = {"step": 40, "tokens": 5000, "seconds": 9.6}


def example():
    rows = []
    for seed in range(6):
        wobble = (-1) ** seed / 100
        rows += [
            row("none", seed, [1.0, 0.4, 0.2, 0.1], avg16=0.9 + wobble, distinct=3.0, learned=LEARNED),
            row("opefo, target", seed, [1.0, 0.5, 0.4, 0.3], target=0.4, avg16=0.9, distinct=10.0 + wobble, bounded=1),
            row("adaptive_entropy, step 0.005", seed, [1.0, 0.5, 0.5, 0.5], target=0.4, avg16=0.8, distinct=9.0),
            row("adaptive_entropy, step 0.05", seed, [1.0, 0.5, 0.3, 0.4], target=0.4, avg16=0.95, distinct=9.0),
        ]
    rows += [row("adaptive_entropy, step 0.01", 0, [1.0, 0.5, 0.4, 0.4], target=0.4, avg16=1.0, distinct=9.0)]
    rows += [row("opefo, target", 0, [1.0, 0.5, 0.4, 0.4], split, target=0.4, avg16=0.8) for split in (2, 4)]
    shown = {name: one for name, one in settings(0.4).items() if name in {run["setting"] for run in rows}}
    return Comparison(rows, shown)


def cells(text, heading, name):
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    header, *lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
    (found,) = (line for line in lines if line[0] == name)
    return dict(zip(header[0].split("| ")[1:] + header[1:], found[1:], strict=True))


def test_the_tables_of_invented_runs():
    text = document(example(), "python compare")
    assert text.startswith("`python compare`\n\nMade with commit abc, torch 2 (27 runs).")
    ours = cells(text, "Results", "opefo, target")
    assert (ours["avg@16"], ours["end entropy"], ours["step time"]) == ("0.900 ± 0.000", "0.30 ± 0.00", "1.00 ± 0.00")
    assert ours["seeds"] == "6" and "reward" not in ours

    ours = cells(text, "Differences", "opefo, target")
    assert ours["avg@16, to GRPO"].startswith("+0.000 [-0.0")  # not bold
    assert ours["avg@16, to best bonus"] == "**-0.050 [-0.050, -0.050]**"
    assert ours["distinct of 64, to GRPO"] == "**+7.0 [+7.0, +7.0]**"
    assert ours["best bonus"] == "adaptive_entropy, step 0.05"  # 0.01 has a single seed

    assert cells(text, "Learning", "none") == {
        "steps": "40", "tokens": "5000", "seconds": "10", "seeds that learned": "6 of 6",
    }  # fmt: skip
    assert cells(text, "Holding a target", "opefo, target") == {
        "lands at": "3", "GRPO passes": "2", "ratio": "1.50", "mean error": "-0.050", "rms": "0.071",
        "undershoot": "0.100", "of ten steps": "0.050", "at bound": "1", "seeds": "6",
    }  # fmt: skip
    never = cells(text, "Holding a target", "adaptive_entropy, step 0.005")
    assert (never["lands at"], never["ratio"], never["mean error"]) == ("never (0 of 6)", "never", "")

    noise = cells(text, "Rounding", "opefo, target, seed 0")
    assert noise["avg@16, seeds"] == "0.000" and noise["avg@16, rounding"] == "0.058"  # of 0.9, 0.8, 0.8
    assert (noise["seeds"], noise["repetitions"]) == ("6", "3")


def test_columns_without_a_value_are_left_out():
    assert table(["", "a", "b"], [["x", "", "1"], ["y", "", ""]]) == "| | b |\n|---|---|\n| x | 1 |\n| y |  |"
