import math
from dataclasses import replace

import literature
import numpy as np
import pytest
from control_inputs import arrays, close, random_tokens, totals

from opefo_trl.controls import make_control


def test_ce_gppo_keeps_the_gradient_of_clipped_tokens():
    tokens, _ = random_tokens(moved=1.2)
    logps, advantages, _, old, _ = arrays(tokens)
    r = np.exp(logps - old)
    expected = [literature.ce_gppo(x, a) for x, a in zip(r.ravel(), advantages.ravel(), strict=True)]
    control = make_control("ce_gppo")
    # TRL's loss without clipping multiplies by the ratio
    close(control.advantages(tokens).detach().numpy() * r, np.array(expected).reshape(r.shape))
    assert control.clip_range(tokens) == (1.0, math.inf)
    for case in ((r < 0.8) & (advantages < 0), (r > 1.2) & (advantages > 0), (r > 3) & (advantages < 0)):
        assert case.any()


@pytest.mark.parametrize("shift", [-1.5, -0.3, 0.3, 1.5])
def test_bapo_widens_its_bounds_until_positive_samples_weigh_enough(shift):
    tokens, _ = random_tokens(seed=3)
    tokens = replace(tokens, advantages=tokens.advantages + shift)
    logps, advantages, mask, old, _ = arrays(tokens)
    low, high = literature.bapo(np.exp(logps - old), advantages, mask)
    control = make_control("bapo")
    close([float(bound) for bound in control.clip_range(tokens)], [1 - low, high - 1])
    assert float(control.metrics()["clip_low"]) == pytest.approx(low)


def test_dcpo_widens_the_bounds_of_unlikely_tokens():
    tokens, _ = random_tokens()
    q = np.exp(arrays(tokens)[3])
    expected = np.array([literature.dcpo(x) for x in q.ravel()])
    low, high = make_control("dcpo").clip_range(tokens)
    close(1 - low, expected[:, 0].reshape(q.shape))
    close(1 + high, expected[:, 1].reshape(q.shape))


@pytest.mark.parametrize("schedule", ["increase_decrease", "decrease_increase_decrease"])
@pytest.mark.parametrize("step", [0, 3, 5, 6, 9])
def test_dynamic_clip_moves_between_its_bounds(schedule, step):
    tokens, _ = random_tokens()
    control = make_control("dynamic_clip", schedule=schedule)
    control.observe(totals(), step, 10)
    p = np.exp(arrays(tokens)[3])
    expected = np.array([literature.dynamic_bounds(x, step / 10, schedule) for x in p.ravel()])
    low, high = control.clip_range(tokens)
    close(low, expected[:, 0].reshape(p.shape))
    close(high, expected[:, 1].reshape(p.shape))


def test_dynamic_clip_oscillates_between_the_floor_and_a_falling_ceiling():
    control, tokens = make_control("dynamic_clip", schedule="oscillating"), random_tokens()[0]
    rising = []
    for step, entropy in enumerate([1.0, 0.95, 0.5, 0.19, 0.3, 0.7]):  # ceiling 1, .87, .73, .6, .47, .33
        control.observe(totals(entropy=entropy), step, 6)
        rising.append(float(control.coef))
        low, high = control.clip_range(tokens)
        constant = low if rising[-1] else high
        assert (constant - 0.2).abs().max() < 1e-6 and max(high.max(), low.max()) > 0.21
    assert rising == [1, 0, 0, 1, 1, 0]
