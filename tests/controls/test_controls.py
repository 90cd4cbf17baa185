import json
import math

import pytest
import torch

from opefo_trl.controls import CONTROLS, Control, Tokens, make_control
from opefo_trl.controls.opefo import GAIN, MOST, RATE
from opefo_trl.controls.target import SCHEDULES
from opefo_trl.flow import FlowTotals


def totals(increase: float, decrease: float, entropy: float = 1.0) -> FlowTotals:
    flow = torch.tensor([[increase, -decrease]])
    return FlowTotals.of(flow, torch.ones(1, 2), torch.zeros(1, 2)).with_entropy(torch.tensor(entropy))


def tokens(flow: list[list[float]], advantages: list[float]) -> Tokens:
    shape = torch.tensor(flow)
    zeros = torch.zeros_like(shape)
    return Tokens(zeros, zeros, torch.tensor(advantages).unsqueeze(1), torch.ones_like(shape), zeros, shape)


def lam(control) -> float:
    return float(control.metrics()["flow/lambda"])


def test_none_and_the_base_change_nothing():
    some = tokens([[1.0, -1.0]], [2.0])
    for control in (make_control("none"), Control()):
        control.observe(totals(1, 3), 0, 10)
        assert control.advantages(some) is some.advantages
        assert control.clip_range(some) is None and control.penalty(some) is None
        assert control.metrics() == {} and control.state_dict() == {} and not control.needs_totals


def test_opefo_balances_both_flows():
    control = make_control("opefo", flow_lambda_max=1.0)
    assert control.needs_totals and lam(control) == 0
    control.observe(totals(1, 3), 0, 10)
    assert lam(control) == 0.5  # = (3 - 1) / (3 + 1)
    # raising tokens count 1.5 times, lowering ones 0.5 times, silent ones once
    shaped = control.advantages(tokens([[1.0, -1.0, 0.0], [-2.0, 2.0, 0.0]], [2.0, -4.0]))
    assert shaped.tolist() == [[3.0, 1.0, 2.0], [-2.0, -6.0, -4.0]]


def test_lambda_is_bounded_on_both_sides():
    control = make_control("opefo")
    control.observe(totals(1, 3), 0, 10)
    assert lam(control) == pytest.approx(0.1)
    control.observe(totals(3, 1), 0, 10)
    assert lam(control) == pytest.approx(-0.1)


def test_one_empty_side_gives_lambda_zero():
    control = make_control("opefo", flow_lambda_max=1.0)
    control.observe(totals(0, 3), 0, 10)
    assert lam(control) == 0


def test_static_lambda_and_sides():
    control = make_control("opefo", static_lambda=0.5, sides="decrease")
    control.observe(totals(1, 3), 0, 10)
    assert lam(control) == 0.5 and not control.needs_totals
    assert control.advantages(tokens([[1.0, -1.0]], [2.0])).tolist() == [[2.0, 1.0]]
    some = tokens([[1.0, -1.0]], [2.0])
    assert make_control("opefo", static_lambda=0).advantages(some) is some.advantages


def share(control) -> float:
    return float(control.metrics()["flow/share"])


def test_a_target_is_held_by_a_share_of_the_balance():
    control = make_control("opefo", flow_target=0.5)
    control.observe(totals(1, 3, entropy=0.6), 0, 10)
    assert lam(control) == share(control) == 0  # above the target
    control.observe(totals(1, 3, entropy=0.49), 1, 10)
    missing = 0.01 / 0.5
    assert share(control) == pytest.approx(RATE * missing) and float(control.metrics()["flow/target"]) == 0.5
    assert lam(control) == pytest.approx(share(control) * 0.5 + GAIN * missing)  # lambda* = (3 - 1) / (3 + 1)
    control.observe(totals(1, 3, entropy=0.49), 1, 10)  # another micro-batch of the same step
    assert share(control) == pytest.approx(RATE * missing)
    control.observe(totals(3, 1, entropy=0.5), 2, 10)  # entropy is on its way up by itself
    assert lam(control) == 0 and share(control) == pytest.approx(RATE * missing)
    for step in range(3, 60):
        control.observe(totals(1, 3, entropy=0.1), step, 100)
    assert lam(control) == 1 and share(control) == MOST
    for step in range(60, 120):
        control.observe(totals(1, 3, entropy=0.9), step, 200)
    assert lam(control) == share(control) == 0


def test_a_target_that_moves_is_followed_down_as_well_once_it_has_been_reached():
    control = make_control("opefo", flow_target=0.4, flow_schedule="oscillating")
    for step, (entropy, expected) in enumerate([(1.2, 0.0), (0.9, 0.0), (0.2, 1.0), (1.1, -1.0)]):
        control.observe(totals(1, 3, entropy=entropy), step, 100)
        assert lam(control) == expected
    restarted = make_control("opefo", flow_target=0.4, flow_schedule="oscillating")
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    restarted.observe(totals(1, 3, entropy=1.1), 4, 100)
    assert lam(restarted) == -1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4, 0.4]),
        ("linear", [1.2, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", [1.2, 0.8 + 0.4 * math.sqrt(0.5), 0.8, 0.8 - 0.4 * math.sqrt(0.5), 0.4]),
        ("increase_decrease", [0.4, 0.4 + 0.2 * math.sqrt(0.5), 0.6, 0.4 + 0.2 * math.sqrt(0.5), 0.4]),
        ("decrease_increase_decrease", [0.6, 0.4 - 0.2 * math.sqrt(0.5), 0.4, 0.4 + 0.2 * math.sqrt(0.5), 0.2]),
        ("oscillating", [0.6, 0.4, 0.3, 0.4, 0.4]),
    ],
)
def test_targets_that_move(schedule, expected):
    control = make_control("opefo", flow_target=0.4, flow_schedule=schedule)
    targets = []
    for step, entropy in enumerate([1.2, 1.0, 0.8, 0.6, 0.5]):
        control.observe(totals(1, 3, entropy=entropy), step, 5)
        targets.append(float(control.metrics()["flow/target"]))
    assert targets == pytest.approx(expected)
    assert set(SCHEDULES) == set(EVERY_SCHEDULE)


EVERY_SCHEDULE = ["constant", "linear", "cosine", "increase_decrease", "decrease_increase_decrease", "oscillating"]


def test_a_relative_target_is_anchored_at_the_first_entropy_and_survives_a_restart():
    control = make_control("opefo", flow_target="0.5x")
    control.observe(totals(1, 3, entropy=torch.nan), 0, 10)  # nothing measured yet
    assert lam(control) == 0
    control.observe(totals(1, 3, entropy=1.2), 0, 10)
    control.observe(totals(1, 3, entropy=0.9), 1, 10)
    assert float(control.metrics()["flow/target"]) == pytest.approx(0.6) and lam(control) == 0

    restarted = make_control("opefo", flow_target="0.5x")
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for run in (control, restarted):
        run.observe(totals(1, 3, entropy=0.5), 2, 10)
    assert restarted.metrics() == control.metrics() and lam(restarted) > 0.5
    fresh = make_control("opefo", flow_target="0.5x")
    fresh.load_state_dict(json.loads(json.dumps(fresh.state_dict())))
    assert fresh.state_dict() == {"anchor": None, "share": 0.0, "reached": False}


def test_what_a_control_says_of_itself_does_not_hold_for_a_subclass_that_changes_it():
    class Bonus(CONTROLS["opefo"]):
        def penalty(self, tokens):
            return -tokens.entropies

    class Relabelled(CONTROLS["opefo"]):
        def metrics(self):
            return {}

    class Clip(CONTROLS["opefo"]):
        def clip_range(self, tokens):
            return 0.1, 0.3

    class Sure(Bonus):
        by_row = True

    class Mixed(type("Mixin", (), {"advantages": lambda self, tokens: tokens.entropies}), CONTROLS["opefo"]):
        pass

    def promises(control):
        return control.by_row, control.keeps_zeros

    assert promises(CONTROLS["none"]) == promises(CONTROLS["opefo"]) == promises(Relabelled) == (True, True)
    assert promises(Bonus) == promises(Mixed) == (False, False)
    assert promises(Clip) == (False, True) and promises(Sure) == (True, False)


def test_the_registry_takes_a_control_of_ones_own(monkeypatch):
    class Halve(Control):
        def __init__(self, *, by: float = 2.0):
            self.by = by

        def advantages(self, tokens):
            return tokens.advantages / self.by

    monkeypatch.setitem(CONTROLS, "halve", Halve)
    assert make_control("halve", by=4.0).advantages(tokens([[1.0]], [2.0])).tolist() == [[0.5]]
    with pytest.raises(ValueError, match=r"`control='halve'` has no option 'buy'\. Did you mean 'by'\? It takes 'by'"):
        make_control("halve", buy=1)
