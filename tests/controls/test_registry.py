"""Tests of every control: options, state, TRL's own fields, ten steps of training."""

import json
import math

import pytest
import torch
from control_inputs import close, random_tokens, totals
from tiny import assert_all_moved, build, parameters, tiny_dataset, train
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS, make_control

OFF_POLICY = {"strict_on_policy": False, "num_iterations": 2}
# A control, an option, a wrong value, and what is allowed
WRONG = [
    ("steer", "map", "cubic", "'exponential'"), ("steer", "w_min", 0, "above 0"),
    ("clip_cov", "ratio", 2, "in [0, 1]"), ("clip_cov", "low", 6, "below `high=5.0`"),
    ("kl_cov", "coef", "much", "a number"), ("covariance_kernel", "width", 0, "above 0"),
    ("positive_advantage", "schedule", "cosine", "'entropy', 'stage', 'epoch'"),
    ("random_positive_clip", "ratio", -1, "in [0, 1]"), ("advantage_sign", "keep", "both", "'positive', 'negative'"),
    ("negative_reinforcement", "positive_weight", -1, "at least 0"), ("entropy_bonus", "coef", True, "a number"),
    ("adaptive_entropy", "target", 0, "above 0"), ("adaptive_entropy", "coef", 2, "in [0, 1]"),
    ("aer", "target", "half", "first step's entropy"), ("aer", "ease", 0, "above 0"),
    ("clip_higher", "low", 2, "in [0, 1]"), ("clip_low", "high", -0.1, "at least 0"),
    ("dynamic_clip", "schedule", "up", "'oscillating'"), ("ce_gppo", "dual_clip", 1, "above 1"),
    ("bapo", "low_end", 0.5, "in [0.6, 1]"), ("dcpo", "most", float("nan"), "above 1"),
    ("entropy_advantage", "kappa", 0, "above 0"), ("high_entropy_tokens", "share", 0, "above 0"),
    ("stare", "variant", "o1", "'reinforce', 'both'"), ("stare", "adaptive", 1, "True or False"),
    ("repo", "zeta", 1, "in [0.0001, 0.05]"), ("repo", "variant", "r", "'rescaled', 'additive'"),
    ("entropy_dynamics", "mu", -1, "at least 0"), ("entropy_dynamics", "variant", "v", "'batch', 'vocabulary'"),
    ("entropic", "target", 0, "first step's entropy"), ("entropic", "integral", -1, "at least 0"),
    ("entropic", "threshold", 95, "in [0, 1]"), ("entropic", "schedule", "up", "'hold_then_anneal'"),
    ("entrocraft", "low", 0.6, "at most `high`"), ("entrocraft", "high", "0.5x", "both in nats"),
    ("entrocraft", "schedule", "cosine", "`low_start`"), ("entrocraft", "low_start", 0.6, "`schedule='constant'`"),
    ("asym_grpo", "positive_exponent", -0.9, "at least 0"), ("asym_grpo", "negative_exponent", "x", "a number"),
    ("opefo", "flow_schedule", "linear", "`flow_target`"), ("opefo", "sides", "up", "'both', 'increase'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value", "allowed"), WRONG)
def test_a_wrong_value_is_refused_in_plain_words(name, option, value, allowed):
    with pytest.raises(ValueError) as refused:
        make_control(name, **{option: value})
    assert f"`{option}={value!r}`" in str(refused.value) and allowed in str(refused.value)


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_the_state_of_a_control_survives_a_restart(name):
    kwargs = {"flow_target": 0.5} if name == "opefo" else {"adaptive": True} if name == "stare" else {}
    control, restarted = make_control(name, **kwargs), make_control(name, **kwargs)
    for step, entropy in enumerate([1.0, 0.7, 0.4, 0.1, 0.05]):
        control.observe(totals(entropy=entropy), step, 10)
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    tokens, shaped = random_tokens()[0], []
    for run in (control, restarted):
        run.observe(totals(entropy=0.3), 5, 10)
        torch.manual_seed(1)
        shaped.append(run.advantages(tokens))
    close(shaped[0], shaped[1].detach().numpy())
    assert json.dumps(control.state_dict()) == json.dumps(restarted.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("control", "kwargs", "native", "off"),
    [
        ("entropy_bonus", {"coef": 0.02}, {"entropy_coef": 0.02}, False),
        (
            "adaptive_entropy",
            {"target": 3.0, "step": 0.01, "coef": 0.01},
            {"use_adaptive_entropy": True, "entropy_target": 3.0, "entropy_coef_delta": 0.01, "entropy_coef": 0.01},
            False,
        ),
        ("high_entropy_tokens", {"share": 0.3}, {"top_entropy_quantile": 0.3}, False),
        ("clip_higher", {}, {"epsilon": 0.2, "epsilon_high": 0.28}, True),
        ("clip_low", {"low": 0.05}, {"epsilon": 0.05, "epsilon_high": 0.2}, True),
    ],
)
def test_controls_that_trl_has_are_trls_own_bit_for_bit(control, kwargs, native, off, out):
    run = {"max_steps": 4, "gradient_accumulation_steps": 2, **({"num_iterations": 2} if off else {})}
    theirs = train(GRPOTrainer, GRPOConfig, out, **native, **run)
    more = {"strict_on_policy": not off, "micro_batching": "trl"}
    ours = train(OPEFOTrainer, OPEFOConfig, out, control=control, control_kwargs=kwargs, **more, **run)
    for name, value in parameters(theirs).items():
        assert torch.equal(parameters(ours)[name], value), name


def test_a_preset_does_not_overrule_what_the_user_has_set(out):
    with pytest.raises(ValueError, match=r"`entropy_coef=0\.5` .*`control='entropy_bonus'`.* 0\.001.*'none'"):
        build(OPEFOTrainer, OPEFOConfig, out, control="entropy_bonus", entropy_coef=0.5)
    args = build(OPEFOTrainer, OPEFOConfig, out, control="clip_higher", epsilon_high=0.28, **OFF_POLICY).args
    assert (args.epsilon, args.epsilon_high) == (0.2, 0.28)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONTROLS))
@pytest.mark.filterwarnings("ignore:`control=")
def test_ten_steps_move_every_parameter_and_stay_finite(name, out):
    run = {} if CONTROLS[name].acts_on_policy else dict(OFF_POLICY)
    extra = {"train_dataset": tiny_dataset(16)}
    run.update(max_steps=10, gradient_accumulation_steps=2)
    trainer = train(OPEFOTrainer, OPEFOConfig, out, control=name, extra=extra, **run)
    assert_all_moved(trainer)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 10
    assert all(math.isfinite(number) for row in rows for number in row.values() if isinstance(number, float))
