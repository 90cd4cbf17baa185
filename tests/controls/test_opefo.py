import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from control_inputs import arrays, close, random_tokens, tokens_of, totals

from opefo_trl.controls import make_control
from opefo_trl.controls.target import SCHEDULES
from opefo_trl.flow import FlowTotals, entropy_score, flow_score


def lam(control) -> float:
    return float(control.metrics()["flow/lambda"])


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


RIGHT = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]).unsqueeze(1)  # the fifth row has no advantage


@pytest.mark.parametrize(
    ("rows", "pushed"),
    [("right", [1, 0, 1, 0, 1, 0]), ("advantaged", [1, 0, 1, 0, 0, 1]), ("all", [1] * 6)],
)
def test_the_additive_shape_adds_the_bonus_that_the_flow_lacks(rows, pushed):
    tokens = random_tokens()[0]
    logps, advantages, mask, _, entropies = arrays(tokens)
    control = make_control("opefo", flow_shape="additive", flow_rows=rows, flow_lambda_max=1.0)
    marked = control.pushes(tokens.advantages, RIGHT)
    tokens = replace(tokens, pushed=marked)
    push = control.push(tokens.logps, tokens.entropies) * marked
    score = flow_score(tokens.logps, tokens.entropies, "sampled")
    sums = FlowTotals.of(tokens.flow, tokens.mask, tokens.entropies, push, push * score)
    control.observe(sums, 0, 10)

    D = np.clip(logps + entropies, -4, 4) * np.array(pushed)[:, None]
    S = (1 - np.exp(logps)) ** 2 * (logps + entropies)
    mu = (advantages * S * mask).sum() / (D * S * mask).sum()  # the net flow of A - mu D is 0
    assert abs(((advantages - mu * D) * S * mask).sum()) < 1e-9
    close(control.penalty(tokens), -mu * entropies * np.array(pushed)[:, None], 1e-5)
    assert control.penalty(tokens).requires_grad and control.advantages(tokens) is tokens.advantages
    size = math.sqrt((D**2 * mask).sum() / ((D != 0) * mask).sum())
    assert lam(control) == pytest.approx(mu * size, rel=1e-5) and abs(mu * size) > 0.01
    assert control.trained_zeros == {"right": "right", "advantaged": None, "all": "any"}[rows]


def test_the_push_is_bounded():
    control = make_control("opefo", flow_shape="additive")
    control.observe(totals(1, 3, hold=0.1), 0, 10)
    assert lam(control) == pytest.approx(0.1)  # flow_lambda_max
    control.observe(totals(1, 3, hold=0.0), 1, 10)  # no row to push
    assert lam(control) == 0


def test_the_push_that_predicts_the_flow_is_on_average_the_gradient_of_the_entropy():
    """By enumeration: the mean of -(log p + H) grad log p over the tokens is grad H."""
    logits = torch.tensor([1.3, -0.4, 0.2, 0.9, -1.1], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    (expected,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    push = make_control("opefo", flow_shape="additive").push(logps.detach(), entropy.detach())
    (gradient,) = torch.autograd.grad((logps.detach().exp() * -push * logps).sum(), logits)
    assert (gradient - expected).abs().max() < 1e-6
    assert entropy_score(torch.tensor([-9.0, torch.nan]), torch.tensor([1.0, 1.0])).tolist() == [-4.0, 0.0]


def test_a_token_without_an_entropy_adds_nothing_to_the_loss():
    control = make_control("opefo", flow_shape="additive", flow_rows="all")
    assert control.penalty(random_tokens()[0]) is None  # nothing is to be pushed yet
    control.mu = 0.7
    tokens = replace(random_tokens()[0], pushed=torch.ones(6, 1, dtype=torch.bool))
    entropies = tokens.entropies.detach().clone()
    entropies[0, 0] = torch.nan
    assert control.penalty(replace(tokens, entropies=entropies))[0, 0] == 0
    assert control.penalty(replace(tokens, pushed=None)) is None  # rows that nothing has marked


def test_with_a_target_the_flow_of_a_push_is_averaged_over_some_steps():
    """One batch says it with a scatter of a half; the bonus that follows from it would scatter with it."""
    steady, scattered = (make_control("opefo", flow_target=0.5) for _ in range(2))
    falling(steady, FALL[:47])
    falling(scattered, FALL[:47])
    low = falling(steady, [0.58])[0]
    assert 0 < low < 1
    assert falling(scattered, [0.58], hold=8.0)[0] == pytest.approx(low * 4 / (0.8 * 4 + 0.2 * 8), rel=1e-3)
    resumed = make_control("opefo", flow_target=0.5)
    resumed.load_state_dict(json.loads(json.dumps(scattered.state_dict())))
    for each in (scattered, resumed):
        each.learning_rate, each.momentum = 1e-3, 0.9
        each.observe(totals(entropy=0.57, hold=1.0), 90, 1000)
    assert resumed.state_dict() == scattered.state_dict() and resumed.mu == scattered.mu


def test_a_batch_with_few_pushed_tokens_says_little_about_the_push():
    control = make_control("opefo", flow_target=0.5)
    for step, (hold, pushed) in enumerate([(40.0, 5.0), (2.0, 500.0)]):
        sums = torch.tensor([1.0, 3.0, 500.0, 500.0, 0.0, hold, pushed, pushed])
        control.observe(FlowTotals(sums), step, 100)
    assert control._flow_of_unit_lambda(FlowTotals(sums)) == pytest.approx((0.8 * 40 + 2) / (0.8 * 5 + 500) * 500)


def test_in_scope_micro_every_micro_batch_tells_of_the_push():
    control = make_control("opefo", flow_target=0.5)
    falling(control, FALL, hold=0.0)
    control.observe(totals(entropy=FALL[-1], hold=0.0), 90, 1000)
    assert lam(control) == 0  # no row to push
    control.observe(totals(entropy=FALL[-1]), 90, 1000)  # the next one of the same step has rows
    assert lam(control) > 0


def falling(control, entropies, rate=1e-3, **flows):
    """Show a control a run, and return its lambdas."""
    control.learning_rate, control.momentum, lambdas = rate, 0.9, []
    for step, entropy in enumerate(entropies):
        control.observe(totals(entropy=entropy, **flows), step, 1000)
        lambdas.append(lam(control))
    return lambdas


FALL = [1.5 - 0.02 * step for step in range(60)]  # 0.5 is reached at step 50


@pytest.mark.parametrize("shape", ["additive", "sign"])
def test_entropy_falls_freely_and_is_braked_shortly_before_its_target(shape):
    lambdas = falling(make_control("opefo", flow_target=0.5, flow_shape=shape), FALL)
    assert lambdas[:35] == [0] * 35
    assert max(lambdas[40:50]) > 0 and min(lambdas[51:]) > 0.2


@pytest.mark.filterwarnings("ignore:lambda has been at its bound")
def test_as_many_right_rows_without_an_advantage_are_pushed_as_lambda_needs():
    control, low = make_control("opefo", flow_target=0.5), FALL[-1]
    assert control.flat_share == 0.2
    falling(control, [*FALL, *[low] * 10])
    assert (lam(control), control.flat_share) == (2, 1)  # entropy stays below its target
    weak = make_control("opefo", flow_target=0.5)
    falling(weak, FALL[:46], hold=1e-3)
    assert falling(weak, [0.55, 0.54], hold=1e-3) == [2, 2]
    assert weak.flat_share == 0.8  # twice as many after each lambda that is cut, before its average is large
    falling(control, [0.5] * 60, hold=1e3)
    assert abs(lam(control)) < 0.1 and control.flat_share == 0.2
    falling(control, [low, low], hold=0.0)  # no row to push
    assert lam(control) == 0 and control.flat_share == 0.8
    resumed = make_control("opefo", flow_target=0.5)
    resumed.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert resumed.flat_share == 0.8
    for each in (control, resumed):
        falling(each, [0.5, low], hold=1e3)
    assert resumed.state_dict() == control.state_dict()
    falling(control, [0.5 + 0.05 * step for step in range(40)])  # entropy rises: pushed down
    assert lam(control) == -0.5 and control.flat_share == 1
    assert make_control("opefo", flow_shape="additive").flat_share == 1  # nothing says how many it needs
    on_all = make_control("opefo", flow_target=0.5, flow_rows="all")
    falling(on_all, FALL)
    assert on_all.flat_share == 1


def test_a_target_out_of_reach_is_warned_of_once():
    control = make_control("opefo", flow_target=5.0)
    with pytest.warns(UserWarning, match=r"at its bound \(2\) for 20 steps.* 1.4 nats, .* target of 5\.") as warned:
        falling(control, [1.4] * 60)
    assert len(warned) == 1
    near = make_control("opefo", flow_target=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        falling(near, FALL)


def test_several_updates_on_a_rollout_choose_its_rows_once():
    control, rollout = make_control("opefo", flow_target=5.0), totals(0.1, 3)
    for step in range(4):
        control.observe(rollout, step, 10)
    assert control.flat_share <= 0.4


@pytest.mark.filterwarnings("ignore:lambda has been at its bound")
def test_an_entropy_past_its_target_is_brought_back_from_both_sides_or_held_from_below_only():
    low, high = FALL[-1], [FALL[-1] + 0.05 * step for step in range(40)]
    for sides, least, shape, most in (("both", -0.5, "additive", 2.0), ("floor", 0.0, "sign", 1.0)):
        control = make_control("opefo", flow_target=0.5, flow_sides=sides, flow_shape=shape)
        lambdas = falling(control, [*FALL, *[low] * 10, *high])
        assert max(lambdas) == most and min(lambdas) == least == lambdas[-1]
        assert control.metrics()["flow/bounded"] == (sides == "both") and control.metrics()["flow/estimate"] > 1
    floor = make_control("opefo", flow_target=0.5, flow_sides="floor")
    falling(floor, [*FALL, *[low] * 10, *high])
    assert lam(floor) == 0 and floor.flat_share == 0.2  # nothing to push, so no row for it
    assert falling(floor, [0.4], rate=0.0, increase=9.0, decrease=1.0) == [0]  # not even where entropy rises by itself


def test_updates_on_one_rollout_and_micro_batches_of_a_step_measure_once():
    control, once = (make_control("opefo", flow_target=0.5) for _ in range(2))
    lambdas = falling(once, FALL)
    control.learning_rate, control.momentum = 1e-3, 0.9
    for step, entropy in enumerate(FALL):
        control.observe(totals(entropy=entropy), step, 1000)
        control.observe(totals(entropy=entropy), step, 1000)  # another micro-batch of the same step
    assert lam(control) == lambdas[-1]
    rollout, four = totals(entropy=0.8), make_control("opefo", flow_target=0.5)
    for step in range(4):
        four.observe(rollout, step, 1000)
    assert four.tracker.entropy == pytest.approx(0.8)
    with_one = make_control("opefo", flow_target=0.5)
    with_one.observe(rollout, 0, 1000)
    assert four.tracker.state_dict()["_measured"] == with_one.tracker.state_dict()["_measured"] == 1


@pytest.mark.parametrize("delayed", [None, "entropy", "totals"])
@pytest.mark.parametrize("skips", [False, True])
def test_an_update_is_held_against_the_change_of_entropy_that_it_made(delayed, skips):
    """Entropy moves exactly as the flows predict. The gains are learned, also where each entropy is of the step
    before, and an update that was skipped moves nothing."""
    control, natural_gain, push_gain = make_control("opefo", flow_target=0.5), 8.0, 20.0
    entropy, last, average, made, before = 1.5, 1.5, [0.0, 0.0], 0, None
    for step in range(300):
        flows = {"increase": 1.0, "decrease": 3.0 + 1.6 * math.sin(step), "hold": 4.0 + 2 * math.cos(step)}
        now = totals(entropy=entropy, **flows)
        shown = {None: now, "entropy": totals(entropy=last, **flows), "totals": before}[delayed]
        control.learning_rate, control.delayed = 1e-3, delayed
        if shown is not None:
            control.observe(shown, step, 1000)
        if step % 50 == 7:  # goes on from a checkpoint
            state, control = json.loads(json.dumps(control.state_dict())), make_control("opefo", flow_target=0.5)
            control.load_state_dict(state)
            lam_now = state["update"][1] if state["update"] else 0.0
        else:
            lam_now = lam(control)
        before, last = now, entropy
        control.updated = not (skips and step % 7 == 6)
        if control.updated:  # as an optimizer that averages by 0.8
            made, (natural, reach) = made + 1, (now.net.item() / 2, control._flow_of_unit_lambda(now) / 2)  # 2 tokens
            average = [0.8 * old + 0.2 * new for old, new in zip(average, (natural, lam_now * reach), strict=True)]
            moved = natural_gain * average[0] + push_gain * average[1]
            entropy += 1e-3 * moved / (1 - 0.8**made)
        assert step < 250 or abs(entropy - 0.5) < 0.01
    assert control.tracker._gains() == pytest.approx((natural_gain, push_gain), rel=0.1)


def test_a_checkpoint_of_the_former_law_goes_on_with_a_warning():
    control = make_control("opefo", flow_target="0.5x")
    with pytest.warns(UserWarning, match="another rule.*learns anew"):
        control.load_state_dict({"anchor": 1.2, "share": 0.3, "reached": True})
    control.observe(totals(entropy=0.9), 7, 10)
    assert float(control.metrics()["flow/target"]) == pytest.approx(0.6)
    make_control("opefo").load_state_dict({"anchor": 1.2, "share": 0.0, "reached": False})  # nothing is held: silent


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
    assert control.state_dict()["anchor"] is None
    restarted.load_state_dict(control.state_dict())
    control.observe(totals(entropy=torch.nan), 0, 10)  # nothing measured yet
    assert lam(control) == 0
    control.observe(totals(entropy=1.2), 1, 10)
    control.observe(totals(entropy=0.9), 2, 10)
    assert float(control.metrics()["flow/target"]) == pytest.approx(0.6) and lam(control) == 0
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for run in (control, restarted):
        run.observe(totals(entropy=0.5), 3, 10)
    assert restarted.metrics() == control.metrics() and lam(restarted) > 0
    assert restarted.state_dict() == control.state_dict()


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, "sign"),  # the paper's
        ({"flow_target": 0.4}, "additive"),
        ({"flow_target": 0.4, "flow_shape": "sign"}, "sign"),
        ({"flow_target": 0.4, "sides": "increase"}, "sign"),  # a push has no groups
        ({"flow_target": 0.4, "flow_schedule": "oscillating"}, "additive"),
        ({"flow_shape": "additive"}, "additive"),
    ],
)
def test_the_default_shape(options, shape):
    assert make_control("opefo", **options).shape == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow_shape": "minimal"}, "`flow_shape='minimal'`.*'additive'"),
        ({"flow_shape": "additive", "sides": "increase"}, "`sides='increase'`.*`flow_shape='sign'`"),
        ({"flow_shape": "additive", "static_lambda": 0.1}, "`static_lambda=0.1`.*`flow_shape='sign'`"),
        ({"flow_rows": "left"}, "`flow_rows='left'`.*'right', 'advantaged'"),
        ({"flow_sides": "ceiling"}, "`flow_sides='ceiling'`.*'floor'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        make_control("opefo", **options)
