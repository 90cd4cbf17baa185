"""FlowStep without a trainer: when the control is shown which totals, and what a step logs."""

import math
from types import SimpleNamespace

import pytest
import torch
from control_inputs import tokens_of
from tiny import OneRank, settings
from transformers import TrainerState

from opefo_trl import OPEFOConfig
from opefo_trl.controls import Control, make_control
from opefo_trl.flow import FlowTotals
from opefo_trl.training.flow_step import FlowStep
from opefo_trl.training.scoring import Scores

STATE = TrainerState(global_step=4, max_steps=10)
OPTIMIZER = torch.optim.AdamW([torch.zeros(1)], betas=(0.85, 0.99))


class Watching(Control):
    """Remembers the net flow and the entropy of everything that it is shown."""

    def __init__(self):
        self.shown = []

    def observe(self, totals, step, max_steps):
        self.shown.append((totals.net.item(), totals.entropy.item()))

    def metrics(self):
        return {"flow/lambda": 0.25, "gain": 2.0}


def totals(increase, decrease, entropy=1.0):
    return FlowTotals(torch.tensor([increase, decrease, 2 * entropy, 2.0, 0.0, 0.0, 0.0, 0.0]))


def flow_step(out, **overrides) -> FlowStep:
    return FlowStep(OPEFOConfig(**settings(out, **overrides)), Watching(), OneRank())


def take_step(step, *micro_batches):
    step.begin(STATE, 1e-3, OPTIMIZER)
    for micro_batch in micro_batches:
        step.add(micro_batch, True, STATE)
        step.record_lambda()
    return step.end()


def test_running_scope_shows_the_step_before(out):
    step = flow_step(out, flow_scope="running")
    take_step(step, totals(1.0, 3.0), totals(1.0, 1.0))
    assert step.control.shown == []
    take_step(step, totals(5.0, 5.0))
    assert step.control.shown == [(-2.0, 1.0)]  # = (1 + 1) - (3 + 1)


def test_micro_scope_shows_each_micro_batch_with_the_entropy_of_the_last_step(out):
    step = flow_step(out, flow_scope="micro")
    take_step(step, totals(1.0, 3.0, entropy=0.5))
    take_step(step, totals(4.0, 3.0, entropy=9.0), totals(1.0, 1.0, entropy=9.0))
    (_, first), *others = step.control.shown
    assert first != first  # NaN: nothing is known before the first step
    assert others == [(1.0, 0.5), (0.0, 0.5)]


def test_live_measuring_shows_the_batch_once_its_dropped_rows_are_added(out):
    step = flow_step(out, gradient_accumulation_steps=1)
    assert step.measuring == "live"
    step.begin(STATE, 1e-3, OPTIMIZER)
    step.add(totals(1.0, 0.0), False, STATE)  # dropped rows
    assert step.control.shown == []
    step.add(totals(1.0, 3.0), True, STATE)
    assert step.control.shown == [(-1.0, 1.0)]


def test_a_measured_rollout_is_shown_before_it_is_trained_on(out):
    step = flow_step(out, gradient_accumulation_steps=2)
    assert step.measuring == "ahead"
    batch = {"advantages": torch.tensor([1.0, -1.0])}
    scores = Scores(torch.full((2, 3), -1.0), torch.full((2, 3), 0.5), None)
    step.measure_rollout(batch, torch.ones(2, 3), scores)
    assert batch["token_flow"].shape == (2, 3)
    step.begin(STATE, 1e-3, OPTIMIZER)
    assert step.control.shown == [(pytest.approx(0.0, abs=1e-6), 0.5)]


@pytest.mark.parametrize(
    ("method", "returned", "refusal"),
    [
        ("advantages", None, "returned None; return a tensor"),
        ("penalty", torch.tensor(0.5), r"returned a tensor of shape \(\); return one term for each token"),
    ],
)
def test_what_a_control_may_not_return_is_named(method, returned, refusal, out):
    step = flow_step(out)
    setattr(step.control, method, lambda tokens: returned)
    more = [torch.tensor(8), 1] if method == "penalty" else []
    with pytest.raises(TypeError, match=rf"`{method}\(\)` of `control='opefo'` {refusal}"):
        getattr(step, method)(tokens_of([[1.0]], [1.0]), *more)


def test_a_step_logs_totals_lambda_and_change_and_starts_over(out):
    step = flow_step(out, flow_scope="running")
    metrics, entropy = take_step(step, totals(1.0, 3.0, entropy=0.5))
    assert entropy == 0.5 and metrics["flow/lambda"] == 0.25 and metrics["control/gain"] == 2.0
    assert metrics["flow/net"] == -1.0 and "entropy/delta" not in metrics  # = (1 - 3) / 2 tokens
    assert step.current is None and step.lambdas == []
    metrics, _ = take_step(step, totals(1.0, 1.0, entropy=0.75))
    assert metrics["entropy/delta"] == 0.25


def test_short_completions_weigh_more_where_the_loss_averages_each_by_itself(out):
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    logps, entropies = torch.tensor([[-1.0] * 4, [-2.0] * 4]), torch.full((2, 4), 0.5)

    def flow_of(weights=None, **overrides):
        batch = {"advantages": torch.tensor([1.0, 0.0])}
        if weights is not None:
            batch["importance_sampling_ratio"] = weights
        step = flow_step(out, **overrides)
        totals = step.measure(batch, mask, logps, entropies)
        weighed = batch["token_flow"] * step._token_weight(batch, mask)
        assert totals.net == pytest.approx((weighed * mask).sum().item())
        assert weights is None or torch.equal(batch["token_flow"], flow_of())  # a control sees A x, as it is
        return weighed

    by_token, by_row = flow_of(), flow_of(loss_type="grpo")
    assert torch.allclose(by_row[0], by_token[0] * 12 / 2)  # max_completion_length / tokens of the row
    covariance = flow_of(flow_estimator="covariance")
    assert all((flow[1] == 0).all() for flow in (by_token, by_row, covariance))  # no advantage, no flow
    weighed = flow_of(torch.tensor([[0.5, 0.0, 1.0, 1.0]]))
    assert torch.allclose(weighed[0, :2], by_token[0, :2] * torch.tensor([0.5, 0.0]))  # a token that is masked out
    of_vespo = flow_of(torch.tensor([[0.5, 1.0, 1.0, 1.0]] * 2), loss_type="vespo")
    assert torch.allclose(of_vespo, by_token * math.exp(3 - 3 * 0.5) * 0.5**2)  # exp(lambda (1 - w)) w^k, w = 0.5


@pytest.mark.filterwarnings("ignore:`loss_type='luspo'` is a sequence-level")
def test_the_push_has_the_weight_of_a_penalty_beside_the_loss(out):
    def sums(right, **overrides):
        step = flow_step(out, **overrides)
        step.control = make_control("opefo", flow_target=0.4)
        rows = {"advantages": torch.tensor([1.0, 0.0]), "pushed": torch.tensor(right)}
        batch = {**rows, "num_items_in_batch": torch.tensor(3 * step.args.generation_batch_size / 2)}
        logps, entropies = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]]), torch.full((2, 2), 0.5)
        totals = step.measure(batch, torch.tensor([[1, 0], [1, 1]]), logps, entropies)
        return totals.hold.item(), totals.push_size.item(), totals.sums[7].item()

    # D = log p + H is -0.5 in the first row and -1.5 in the second, S = (1 - p)^2 D
    first, second = (0.25 * (1 - math.exp(-1)) ** 2, 2.25 * (1 - math.exp(-2)) ** 2)
    assert sums([True, False]) == pytest.approx((first, 0.5, 1))
    assert sums([True, True]) == pytest.approx((first + 2 * second, math.sqrt((0.25 + 4.5) / 3), 3))
    # A penalty is a mean over tokens, of which a completion has 1.5
    for loss_type, unit, strength in (
        ("cispo", 0.2, 5),  # `epsilon`, which bounds the ratio itself
        ("sapo", 12 / 1.5, 1),
        ("dr_grpo", 1, 12 / 1.5),
        ("luspo", 1, 1 / 1.5),
    ):
        hold, size, _ = sums([True, True], loss_type=loss_type)
        assert hold == pytest.approx((first + 2 * second) * unit * strength), loss_type
        assert size == pytest.approx(math.sqrt((0.25 + 4.5) / 3) * strength), loss_type


RIGHT = torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    ("right", "share", "scope", "pushed"),
    [
        (None, 1.0, "batch", [1, 0, 0, 0]),
        (RIGHT, 1.0, "batch", [1, 0, 1, 1]),
        (RIGHT, 0.5, "batch", [1, 0, 1, 0]),
        (RIGHT, 0.5, "running", [1, 0, 1, 1]),  # its lambda comes from other rows
    ],
)
def test_a_rollout_is_marked_by_places_over_all_ranks(right, share, scope, pushed, out):
    step = flow_step(out, flow_scope=scope)
    step.control = make_control("opefo", flow_shape="additive")
    step.control.flat_share = share
    advantages, marked = torch.tensor([1.0, -1.0, 0.0, 0.0]), []
    for rank in (0, 1):
        step.accelerator = SimpleNamespace(process_index=rank)
        batch = {"advantages": advantages}
        step.mark_pushed(batch, right)
        marked += batch["pushed"].tolist()
    step.accelerator = SimpleNamespace(process_index=0)
    both = {"advantages": advantages.repeat(2)}
    step.mark_pushed(both, None if right is None else right.repeat(2))
    assert marked == both["pushed"].tolist() and marked[:4] == pushed


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (OPTIMIZER, 0.85),
        (torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.7), 0.7),
        (torch.optim.Adagrad([torch.zeros(1)]), 0.0),
    ],
)
def test_the_control_knows_what_the_optimizer_averages(optimizer, expected, out):
    step = flow_step(out)
    step.begin(STATE, 2e-3, optimizer)
    assert (step.control.learning_rate, step.control.momentum) == (2e-3, expected)
