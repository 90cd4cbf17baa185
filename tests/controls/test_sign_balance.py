import json
from dataclasses import replace

import literature
import numpy as np
import pytest
import torch
from control_inputs import arrays, close, random_tokens, totals
from tiny import build, parameters, train

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import make_control


def test_entropic_shifts_likely_tokens_by_a_proportional_and_an_integral_part():
    tokens, _ = random_tokens()
    logps, advantages, *_ = arrays(tokens)
    entropies = [0.9, 0.5, 0.3, float("nan"), 0.2, 0.45]
    expected = literature.entropic(entropies, 0.4, 0.8, 0.2)
    assert expected[0] == pytest.approx(0.4)  # = 0.8 * (0.9 - 0.4) + 0.2 * 0
    assert expected[2] == pytest.approx(0.04)  # = 0.8 * (0.3 - 0.4) + 0.2 * (0.5 + 0.1)
    control = make_control("entropic", target=0.4, proportional=0.8, integral=0.2, threshold=0.3)
    assert control.needs_totals and control.shapes_tokens
    close(control.advantages(tokens), advantages)
    for step, (entropy, alpha) in enumerate(zip(entropies, expected, strict=True)):
        for _ in range(2):  # the second micro-batch of a step changes nothing
            control.observe(totals(entropy=entropy), step, 10)
        assert float(control.metrics()["coef"]) == pytest.approx(alpha, abs=1e-6)
        likely = np.exp(logps) > 0.3
        assert 5 < likely.sum() < likely.size - 5
        close(control.advantages(tokens), np.where(likely, advantages + alpha * np.abs(advantages), advantages))


@pytest.mark.parametrize(("entropy", "alpha"), [(5.0, 1), (-5.0, -1)])
def test_entropic_at_its_bounds_drops_one_sign_and_doubles_the_other(entropy, alpha):
    tokens, _ = random_tokens()
    advantages = arrays(tokens)[1]
    control = make_control("entropic", threshold=0)
    control.observe(totals(entropy=entropy), 0, 10)
    close(control.advantages(tokens), np.where(advantages * alpha > 0, 2 * advantages, 0))


def test_entropic_follows_a_moving_and_a_relative_target():
    control = make_control("entropic", target="0.5x", schedule="hold_then_anneal")
    errors = []
    for step, entropy in enumerate([1.0, 0.6, 0.6, 0.6, 0.6]):
        control.observe(totals(entropy=entropy), step, 5)
        errors.append(entropy - float(control.metrics()["flow/target"]))
    assert errors == pytest.approx([0.5, 0.1, 0.1, 0.225, 0.35])


def test_the_integral_of_entropic_survives_a_restart_bit_for_bit():
    whole, resumed = (make_control("entropic", target="0.3x", integral=0.013) for _ in range(2))
    for step in range(7):
        whole.observe(totals(entropy=0.7 - 0.07 * step), step, 20)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for step in range(7, 12):
        for control in (whole, resumed):
            control.observe(totals(entropy=0.1 + 0.03 * step), step, 20)
    assert whole.state_dict() == resumed.state_dict() and torch.equal(whole.coef, resumed.coef)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["batch", "running"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("entropic", {"target": "0.9x", "integral": 0.1}), ("entrocraft", {"low": "0.97x", "high": "0.99x"})],
)
@pytest.mark.filterwarnings("ignore:`control=")
def test_a_resumed_run_continues_bit_for_bit(name, kwargs, scope, out):
    run = {"control": name, "control_kwargs": kwargs, "flow_scope": scope, "max_steps": 4}
    run |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole = train(OPEFOTrainer, OPEFOConfig, out / "whole", **run)
    resumed = build(OPEFOTrainer, OPEFOConfig, out / "resumed", **run)
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    assert whole.entropy_control.state_dict() == resumed.entropy_control.state_dict()
    for key, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[key], value), key
    rows = [row for row in whole.state.log_history if "control/coef" in row]
    assert any(row["control/coef"] != 0 for row in rows)
    if name == "entropic" and scope == "batch":  # from the entropy of the batch itself, in its own step
        assert rows[0]["control/coef"] == pytest.approx(0.1 * rows[0]["entropy"], rel=1e-3)


def test_entrocraft_keeps_one_sign_outside_its_band_and_all_inside():
    tokens, _ = random_tokens()
    a = tokens.advantages.numpy()
    control = make_control("entrocraft", low=0.4, high=0.5)
    assert control.needs_totals and not control.shapes_tokens
    close(control.advantages(tokens), a)
    steps = [(0.39, np.minimum(a, 0)), (0.4, a), (0.45, a), (0.5, a), (0.51, np.maximum(a, 0))]
    steps += [(float("nan"), np.maximum(a, 0)), (0.3, np.minimum(a, 0))]  # without an entropy nothing changes
    for step, (entropy, expected) in enumerate(steps):
        control.observe(totals(entropy=entropy), step, 10)
        close(control.advantages(tokens), expected)


BANDS = {
    "constant": [(0.4, 0.5)] * 5,
    "linear": [(0.6, 0.7), (0.55, 0.65), (0.5, 0.6), (0.45, 0.55), (0.4, 0.5)],
    "cosine": [(0.5 + c, 0.6 + c) for c in 0.1 * np.cos(np.pi * np.arange(5) / 4)],
    "hold_then_anneal": [(0.4, 0.5)] * 3 + [(0.3, 0.375), (0.2, 0.25)],
}


@pytest.mark.parametrize("schedule", BANDS)
def test_the_band_of_entrocraft_moves(schedule):
    starts = {"low_start": 0.6, "high_start": 0.7} if schedule in ("linear", "cosine") else {}
    control = make_control("entrocraft", schedule=schedule, **starts)
    bands = []
    for step in range(5):
        control.observe(totals(entropy=2.0), step, 5)
        shown = control.metrics()
        bands += [float(shown["low"]), float(shown["high"])]
        assert float(shown["flow/target"]) == pytest.approx(sum(bands[-2:]) / 2)
    assert bands == pytest.approx([bound for band in BANDS[schedule] for bound in band])


def test_asym_grpo_gives_rare_right_answers_and_rare_wrong_ones_more():
    tokens, _ = random_tokens()
    solved = torch.tensor([[0.25], [0.25], [0.5], [0.875], [0.5], [0.875]])
    tokens = replace(tokens, solved=solved)
    a, p = tokens.advantages.numpy().ravel(), solved.numpy().ravel()
    expected = [literature.asym_grpo(advantage, share) for advantage, share in zip(a, p, strict=True)]
    assert expected[0] == pytest.approx(3**0.9) and expected[3] == pytest.approx(-(7**0.4)) and expected[4] == 0
    control = make_control("asym_grpo")
    close(control.advantages(tokens), np.array(expected)[:, None])
    assert not control.shapes_tokens and not control.needs_totals


def test_asym_grpo_with_equal_exponents_is_grpo():
    right = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]).view(2, 4)
    p = right.mean(1, keepdim=True)
    grpo = (right - p) / right.std(1, keepdim=True, correction=0)
    tokens = replace(random_tokens(rows=6)[0], advantages=grpo.view(-1, 1), solved=p.expand_as(right).reshape(-1, 1))
    control = make_control("asym_grpo", positive_exponent=0.5, negative_exponent=0.5)
    close(control.advantages(tokens), tokens.advantages.double().numpy())


def test_asym_grpo_leaves_groups_as_they_are_where_the_formula_has_no_value():
    tokens, _ = random_tokens()
    control = make_control("asym_grpo")
    assert control.advantages(replace(tokens, solved=None)) is tokens.advantages
    for share in (0.0, 1.0):  # a second reward gave these advantages
        alike = replace(tokens, solved=torch.full_like(tokens.solved, share))
        assert torch.equal(control.advantages(alike), tokens.advantages)
