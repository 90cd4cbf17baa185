import json
import math

import literature
import pytest
import torch
from control_inputs import arrays, close, random_tokens, tokens_of, totals

from opefo_trl.controls import make_control
from opefo_trl.controls.target import SCHEDULES
from opefo_trl.flow import FlowTotals, minimal_weights


def lam(control) -> float:
    return float(control.metrics()["flow/lambda"])


def share(control) -> float:
    return float(control.metrics()["flow/share"])


def test_opefo_balances_both_flows():
    control = make_control("opefo", flow_lambda_max=1.0)
    assert control.needs_totals and lam(control) == 0
    control.observe(totals(1, 3), 0, 10)
    assert lam(control) == 0.5  # = (3 - 1) / (3 + 1)
    # raising tokens count 1.5 times, lowering ones 0.5 times, those without a flow once
    shaped = control.advantages(tokens_of([[1.0, -1.0, 0.0], [-2.0, 2.0, 0.0]], [2.0, -4.0]))
    assert shaped.tolist() == [[3.0, 1.0, 2.0], [-2.0, -6.0, -4.0]]
    bounded = make_control("opefo")
    for increase, decrease, expected in ((1, 3, 0.1), (3, 1, -0.1)):
        bounded.observe(totals(increase, decrease), 0, 10)
        assert lam(bounded) == pytest.approx(expected)


def test_static_lambda_and_sides():
    control = make_control("opefo", static_lambda=0.5, sides="decrease")
    control.observe(totals(1, 3), 0, 10)
    assert lam(control) == 0.5 and not control.needs_totals
    tokens = tokens_of([[1.0, -1.0]], [2.0])
    assert control.advantages(tokens).tolist() == [[2.0, 1.0]]
    assert make_control("opefo", static_lambda=0).advantages(tokens) is tokens.advantages


def test_a_target_is_held_by_a_share_of_the_balance():
    # lambda = clamp(share lambda* + 3 e, 0, 1), share <- clamp(share + 0.2 e, 0, 1.5), e = (target - entropy) / target
    control = make_control("opefo", flow_target=0.5)
    control.observe(totals(entropy=0.6), 0, 10)
    assert lam(control) == share(control) == 0  # above the target
    control.observe(totals(entropy=0.49), 1, 10)  # e = 0.01 / 0.5 = 0.02, lambda* = (3 - 1) / (3 + 1) = 0.5
    assert share(control) == pytest.approx(0.004) and float(control.metrics()["flow/target"]) == 0.5
    assert lam(control) == pytest.approx(0.004 * 0.5 + 0.06)
    control.observe(totals(entropy=0.49), 1, 10)  # another micro-batch of the same step
    assert share(control) == pytest.approx(0.004)
    control.observe(totals(3, 1, entropy=0.5), 2, 10)  # entropy rises by itself
    assert lam(control) == 0 and share(control) == pytest.approx(0.004)
    for step in range(3, 60):
        control.observe(totals(entropy=0.1), step, 100)
    assert lam(control) == 1 and share(control) == 1.5
    for step in range(60, 120):
        control.observe(totals(entropy=0.9), step, 200)
    assert lam(control) == share(control) == 0


def test_a_moving_target_is_followed_downwards_once_it_has_been_reached():
    control, restarted = (make_control("opefo", flow_target=0.4, flow_schedule="oscillating") for _ in range(2))
    for step, (entropy, expected) in enumerate([(1.2, 0.0), (0.9, 0.0), (0.2, 1.0), (1.1, -1.0)]):
        control.observe(totals(entropy=entropy), step, 100)
        assert lam(control) == expected
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    restarted.observe(totals(entropy=1.1), 4, 100)
    assert lam(restarted) == -1


ROOT_HALF = math.sqrt(0.5)
TARGETS = {
    "constant": [0.4, 0.4, 0.4, 0.4, 0.4],
    "linear": [1.2, 1.0, 0.8, 0.6, 0.4],
    "cosine": [1.2, 0.8 + 0.4 * ROOT_HALF, 0.8, 0.8 - 0.4 * ROOT_HALF, 0.4],
    "increase_decrease": [0.4, 0.4 + 0.2 * ROOT_HALF, 0.6, 0.4 + 0.2 * ROOT_HALF, 0.4],
    "decrease_increase_decrease": [0.6, 0.4 - 0.2 * ROOT_HALF, 0.4, 0.4 + 0.2 * ROOT_HALF, 0.2],
    "oscillating": [0.6, 0.4, 0.3, 0.4, 0.4],
    "hold_then_anneal": [0.4, 0.4, 0.4, 0.3, 0.2],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_the_target(schedule):
    control, targets = make_control("opefo", flow_target=0.4, flow_schedule=schedule), []
    for step, entropy in enumerate([1.2, 1.0, 0.8, 0.6, 0.5]):
        control.observe(totals(entropy=entropy), step, 5)
        targets.append(float(control.metrics()["flow/target"]))
    assert targets == pytest.approx(TARGETS[schedule])


def test_a_relative_target_refers_to_the_first_entropy_and_survives_a_restart():
    control, restarted = (make_control("opefo", flow_target="0.5x") for _ in range(2))
    assert control.state_dict() == {"anchor": None, "share": 0.0, "reached": False}
    restarted.load_state_dict(control.state_dict())
    control.observe(totals(entropy=torch.nan), 0, 10)  # nothing measured yet
    assert lam(control) == 0
    control.observe(totals(entropy=1.2), 0, 10)
    control.observe(totals(entropy=0.9), 1, 10)
    assert float(control.metrics()["flow/target"]) == pytest.approx(0.6) and lam(control) == 0
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for run in (control, restarted):
        run.observe(totals(entropy=0.5), 2, 10)
    assert restarted.metrics() == control.metrics() and lam(restarted) > 0.5


def test_the_minimal_shape_moves_the_flow_as_far_with_the_least_change():
    tokens, _ = random_tokens()
    _, advantages, mask, *_ = arrays(tokens)
    d = tokens.flow.numpy() * mask
    sums = FlowTotals.of(tokens.flow, tokens.mask, tokens.entropies, tokens.advantages)
    total = 0.05 * float(sums.increase + sums.decrease)
    weights = minimal_weights(tokens.flow, tokens.advantages, total / sums.leverage).numpy()
    expected = literature.minimal(d.ravel(), (advantages * mask).ravel(), total)
    assert ((expected > 0) & (expected < 3)).all()  # no bound is met here
    close(weights[mask == 1], expected.reshape(d.shape)[mask == 1], 1e-4)
    assert ((weights - 1) * d * mask).sum() == pytest.approx(total, rel=1e-3)
    assert (weights[4] == 1).all()  # no advantage
    extreme = minimal_weights(tokens.flow, tokens.advantages, 1e6)
    assert extreme.min() == 0 and extreme.max() == 3
    with pytest.raises(ValueError, match="`sides='increase'` .*`flow_shape='minimal'`"):  # it has no groups
        make_control("opefo", flow_shape="minimal", sides="increase")


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, "sign"),  # the paper's
        ({"flow_target": 0.4}, "minimal"),
        ({"flow_target": 0.4, "flow_shape": "sign"}, "sign"),
        ({"flow_target": 0.4, "sides": "increase"}, "sign"),  # `minimal` has no groups
        ({"flow_target": 0.4, "flow_schedule": "oscillating"}, "sign"),
        ({"flow_shape": "minimal"}, "minimal"),
    ],
)
def test_the_default_shape(options, shape):
    assert make_control("opefo", **options).shape == shape
