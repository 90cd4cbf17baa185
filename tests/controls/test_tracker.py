"""The law that holds an entropy, on simulated runs (tests/plants.py) and number by number."""

import json
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from plants import FADING, PLAYGROUND, SMOLLM2, WEAK, outcome, random_plant, simulate, simulate_with_bounds

from opefo_trl.controls.tracker import EntropyTracker


def test_it_lands_on_its_target_and_holds_it():
    runs = [outcome(PLAYGROUND, seed) for seed in range(6)]
    assert np.median([run.rms for run in runs]) < 0.010 and abs(np.mean([run.mean for run in runs])) < 0.004
    assert all(0 < run.lands <= 1.2 * run.free for run in runs)
    entropy = simulate(PLAYGROUND, 0)
    assert (PLAYGROUND.target - entropy).max() < 0.03  # nor does it go far below it
    before = slice(0, runs[0].free * 2 // 3)
    assert (entropy[before] == simulate(PLAYGROUND, 0, held_by=None)[before]).all()  # far away nothing is held back


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 1.0},
        {"ratio": 30.0},
        {"rate": 8e-4},
        {"decays": False},
        {"momentum": 0.95},
        {"momentum": 0.0, "told": 0.9},
        {"momentum": 0.9, "told": 0.0},
        {"noise": 0.003},
        {"noise": 0.04},
        {"target": 0.25},
        {"target": 0.6},
        {"shape": "wave", "decays": False},
        {"shape": "hill", "decays": False},
        {"steps": 1000, "natural": 0.06},
    ],
    ids=str,
)
def test_it_needs_no_tuning(changes):
    plant = replace(PLAYGROUND, **changes)
    runs = [outcome(plant, seed) for seed in range(3)]
    assert np.median([run.rms for run in runs]) < max(0.025, plant.noise)
    assert abs(np.mean([run.mean for run in runs])) < 0.015
    assert all(run.lands >= 0 for run in runs)
    assert np.median([run.lands for run in runs]) <= 1.5 * np.median([run.free for run in runs])


def test_the_end_of_a_decay_does_not_take_all_of_the_push():
    """What an update cannot move at a rate near 0, no push has to undo."""
    last = [simulate_with_bounds(PLAYGROUND, seed)[1][-20:] for seed in range(12)]
    assert np.mean(last) < 0.02


def test_several_updates_on_a_rollout_do_not_add_up_to_too_much():
    runs = [outcome(replace(PLAYGROUND, updates=4), seed) for seed in range(6)]
    assert np.median([run.rms for run in runs]) < 0.015 and all(run.end < 0.1 for run in runs)


def test_an_entropy_below_its_target_is_raised_to_it():
    run = outcome(replace(PLAYGROUND, shape="above", decays=False), 0)
    assert 0 < run.lands < 60 and run.rms < 0.06


@pytest.mark.slow
def test_random_runs():
    """The strict measure: rms within the measurement noise (or 0.02 of the target), mean within half of it, landing
    within 1.5 times the free fall. More than nine in ten of the runs meet it whose optimizer has a momentum and says
    it, and whose target is below the first entropy; more than three in four of all, and nearly all three times of it.
    A law that knows all meets it in nine in ten of all."""
    strict, possible, loose, worst = defaultdict(list), defaultdict(list), [], None
    for seed in range(200):
        plant = random_plant(seed)
        run, limit = outcome(plant, seed), max(plant.noise, 0.02 * plant.target)
        if run.free < 0:  # nothing to hold: it is above its target to the end
            continue
        assert run.end < 0.5, plant  # none diverges
        kind = "usual" if plant.momentum else "no momentum"
        if plant.shape == "above":
            kind = "above"
        elif plant.told not in (None, plant.momentum):
            kind = "wrong momentum"
        for name in ("all", kind):
            strict[name].append(run.meets(limit))
            possible[name].append(outcome(plant, seed, held_by="knows all").meets(limit))
        badness = run.badness(limit)
        loose.append(badness <= 3)
        if worst is None or badness > worst[0]:
            worst = badness, seed, plant, run
    met = {
        name: f"{np.mean(group):.3f} of {len(group)}, by a law that knows all {np.mean(possible[name]):.3f}"
        for name, group in strict.items()
    }
    print(f"{met} meet the strict measure, {np.mean(loose):.3f} three times it; worst: {worst}")
    assert np.mean(strict["all"]) > 0.75 and np.mean(strict["usual"]) > 0.91 and np.mean(loose) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "scatter", "bounded"), [(FADING, 0.07, 0.12), (WEAK, 0.08, 0.3)], ids=["fading", "weak"]
)
def test_gains_that_fade_once_entropy_has_come_down(plant, scatter, bounded):
    plant = replace(plant, steps=120)
    runs = [simulate_with_bounds(plant, seed) for seed in range(24)]
    errors = np.array([entropy for entropy, _ in runs]) - plant.target
    early, late = errors[:, 15:45].mean(1), errors[:, 45:].mean(1)
    at_bound = np.mean([bounds[15:] for _, bounds in runs])
    print(
        f"mean of steps 15 to 45: {early.mean():+.3f}, scatter {early.std():.3f}; later {late.mean():+.3f}; "
        f"rms {np.sqrt((errors[:, 15:] ** 2).mean()):.3f}; at the bound: {at_bound:.2f}"
    )
    assert abs(early.mean()) < 0.015 and early.std() < 0.055
    assert abs(late.mean()) < 0.01 and errors[:, 15:].std() < scatter and at_bound < bounded


# As SmolLM2 was on a GPU, with eight prompts a step. The push is so weak that lambda is at a bound in more than half
# of the steps after the landing
NOISIER = {"ratio": 0.45, "noise": 0.15}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rms", "mean"),
    [
        ({}, 0.070, 0.02),
        ({"ratio": 3.0}, 0.070, 0.02),
        ({"ratio": 0.7}, 0.085, 0.02),
        ({"kept": (1.0, 1.0)}, 0.120, 0.03),
        (NOISIER, 0.150, 0.05),
    ],
    ids=str,
)
def test_runs_as_noisy_as_a_real_models(changes, rms, mean):
    plant = replace(SMOLLM2, **changes)
    runs = [outcome(plant, seed) for seed in range(24)]
    bounded = np.mean([simulate_with_bounds(plant, seed)[1][15:30] for seed in range(24)])
    print(np.median([run.rms for run in runs]), np.mean([run.mean for run in runs]), f"at the bound: {bounded:.2f}")
    assert np.median([run.rms for run in runs]) < rms and abs(np.mean([run.mean for run in runs])) < mean
    assert np.median([run.lands for run in runs]) <= 1.5 * np.median([run.free for run in runs])


def filled(tracker: EntropyTracker, steps: int = 30) -> EntropyTracker:
    for step in range(steps):
        tracker.measure(1.2 - 0.03 * step)
        tracker.aim(-0.1, 0.5, 0.0, 1e-3, 0.9)
        tracker.record_update(-0.1, 0.05 * (step > 20), 1e-3, 0.9)
    return tracker


def test_its_state_survives_a_restart_bit_for_bit():
    tracker, restored = filled(EntropyTracker()), EntropyTracker()
    restored.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for law in (tracker, restored):
        filled(law, 5)
    assert restored.state_dict() == tracker.state_dict()
    assert {type(value) for value in tracker.state_dict().values()} <= {bool, int, float, list, tuple}
    assert restored.aim(-0.2, 0.5, 0.0, 1e-3, 0.9) == tracker.aim(-0.2, 0.5, 0.0, 1e-3, 0.9)


def test_a_gain_of_the_push_counts_once_it_is_known():
    """Else a run whose weak pushes seem to do much, by the scatter of its measurements, would go on with weak ones."""
    wanted = []
    for deviation in (300.0, 3000.0):
        tracker = filled(EntropyTracker())
        tracker._unit, tracker._guessed_at, tracker._mean[1:3] = 300.0, 0.0, (300.0, 2700.0)
        tracker._covariance[1:3, :] = tracker._covariance[:, 1:3] = 0.0
        tracker._covariance[2, 2] = deviation**2
        wanted.append(tracker.aim(-0.1, 0.6, 0.0, 1e-3, 0.9))
    assert 3 * wanted[0] < wanted[1]


def test_it_lets_go_of_an_entropy_that_is_far_away_again():
    tracker = EntropyTracker()
    for step in range(48):
        tracker.measure(1.5 - 0.02 * step)
        tracker.aim(-0.1, 0.5, 0.0, 1e-3, 0.9)
        tracker.record_update(-0.1, 0.0, 1e-3, 0.9)
    assert tracker.engaged and tracker.aim(-0.1, 0.5, 0.0, 1e-3, 0.9) is not None
    assert tracker.aim(-0.1, 0.45, 0.0, 1e-3, 0.9) is not None  # a little further, it goes on braking
    assert tracker.aim(-0.1, 0.1, 0.0, 1e-3, 0.9) is None


def test_it_waits_until_it_knows_something():
    tracker = EntropyTracker()
    assert tracker.aim(-0.1, 0.5, 0.0, 1e-3, 0.9) is None  # nothing measured
    tracker.measure(math.nan)
    assert tracker.aim(-0.1, 0.5, 0.0, 1e-3, 0.9) is None
    tracker.measure(1.0)
    assert tracker.aim(-0.1, 0.5, 0.0, 1e-3, 0.9) is None  # above the target, and no gain is known
    assert tracker.aim(-0.1, 0.5, 0.0, 0.0, 0.9) is None  # an update that moves nothing
    assert tracker.aim(-0.1, 2.0, 0.0, 1e-3, 0.9) > 0  # below the target, a guess is better than nothing
    assert tracker.entropy == 1.0 and tracker.engaged
