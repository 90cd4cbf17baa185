import math
import re
import warnings
from types import SimpleNamespace

import pytest
from tiny import settings

from opefo_trl import OPEFOConfig
from opefo_trl.config_checks import check_guards, check_processes
from opefo_trl.controls import CONTROLS

OFF = {"strict_on_policy": False}
OPTIONS = {"control": "none", "control_kwargs": {"sides": "both"}}
SPANS = {"steps_per_generation": 2, "gradient_accumulation_steps": 4}
FIXED = {"control_kwargs": {"static_lambda": 0.1}}
LIGER = {"fused_linear_cross_entropy": True}
VOCABULARY = {"control": "entropy_dynamics", "control_kwargs": {"variant": "vocabulary"}}
VALUES = [  # wrong by themselves, and what is allowed
    ("flow_estimator", "Exact", "'exact'"), ("flow_schedule", "Constant", "'constant'"), ("flow_shape", "-", "'sign'"),
    ("flow_scope", "global", "'batch', 'running', 'micro'"), ("control", ["opefo"], "'none', 'opefo'"),
    ("strict_on_policy", "false", "True or False"), ("entropy_curves", "no", "True or False"),
    ("resample_keep", "right", "'all_right'"), ("zero_advantage_tokens", "drop", "'count', 'leave_out'"),
    *(("resample_rounds", value, "0 is off") for value in (-1, 1.5, "many", True, 2.0)),
    ("nonfinite", "ignore", "'stop', 'skip'"), ("micro_batching", "Exact", "'exact', 'trl'"),
    *(("sampling_drift_max", value, "above 0. It is in nats") for value in (0, "little", float("nan"), True)),
    ("flow_lambda_max", "small", "above 0 and at most 1"), ("flow_lambda_max", 0.0, "above 0 and at most 1"),
]  # fmt: skip


def config(**overrides):
    return OPEFOConfig(**settings("out", **overrides))


def case(overrides, *parts):
    """Settings, and what a message about them must name: field, value and the way out."""
    return pytest.param(overrides, parts, id=", ".join(f"{name}={value}" for name, value in overrides.items()))


def names(message, parts):
    return [part for part in parts if part not in str(message)] == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        *(case({name: value}, f"`{name}={value!r}`", allowed) for name, value, allowed in VALUES),
        case({"control": "opfeo"}, "`control='opfeo'`", "mean 'opefo'", "'none', 'opefo'"),
        case({"control": "OPEFO"}, "`control='OPEFO'`", "mean 'opefo'"),
        case({"control_kwargs": {"side": "both"}}, "'side'", "mean 'sides'"),
        case(OPTIONS, "`control='none'`", "'sides'", "no options"),
        *(case({"control_kwargs": text}, f"`control_kwargs={text!r}`", "map", "JSON") for text in ("a=b", '{"a": ')),
        case({"control_kwargs": {1: 2}}, "`control_kwargs={1: 2}`", "map"),
        case({"control_kwargs": {"flow_target": 0.3}}, "'flow_target'", "set `flow_target`"),
        case({"control_kwargs": {"sides": "up"}}, "`sides='up'` in `control_kwargs`", "'both', 'increase'"),
        case({"control_kwargs": {"static_lambda": 2}}, "`static_lambda=2`", "[-1, 1]"),
        case({**FIXED, "flow_target": 0.3}, "`static_lambda=0.1`", "`flow_target=0.3`", "Drop one"),
        case({"flow_lambda_max": 2.0}, "`flow_lambda_max=2.0`", "above 0 and at most 1", "change sign"),
        case({"flow_target": -0.1}, "`flow_target=-0.1`", '"0.4x"'),
        case({"flow_target": 0.3, "flow_schedule": "cosin"}, "`flow_schedule='cosin'`", "'cosine'"),
        case({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps=0`", "at least 1"),
        case({"num_iterations": 2}, "`num_iterations=2`", "`num_iterations=1`", "`strict_on_policy=False`"),
        case(
            {"steps_per_generation": 8, "gradient_accumulation_steps": 4},
            "`steps_per_generation=8`", "`gradient_accumulation_steps=4`", "takes 2 ", "`strict_on_policy=False`",
        ),
        case(SPANS, "takes 0.5 "),
        case({**SPANS, **OFF}, "`steps_per_generation=2`", "several rollouts", "`flow_scope='running'`"),
        case({"nonfinite": "skip", "optim": "galore_adamw_layerwise"}, "`nonfinite='skip'`", "`nonfinite='stop'`"),
        case(
            {"importance_sampling_level": "sequence"},
            "`importance_sampling_level='sequence'`", "`control='opefo'`", "'token'", "'none'", "'additive'",
        ),
        case({"liger_kernel_config": LIGER}, "`liger_kernel_config=", "fused_linear_cross_entropy", "Drop that key"),
        case({**VOCABULARY, "loss_type": "grpo"}, "`control='entropy_dynamics'`", "`loss_type='grpo'`", "'dapo'"),
        case(
            {"control": "dcpo", "importance_sampling_level": "sequence", **OFF},
            "`control='dcpo'`", "`importance_sampling_level='sequence'`", "'token'",
        ),
        *(
            case({"control": name, "delta": 1.5, **OFF}, "`delta=1.5`", f"`control='{name}'`", "Drop it")
            for name in ("ce_gppo", "kl_cov")
        ),
        case({"loss_type": "dapoo"}, "`loss_type='dapoo'`", "Did you mean 'dapo'"),
        case({"scale_rewards": "groups"}, "`scale_rewards='groups'`", "'group'"),
        case({"temperature": 0}, "`temperature=0`", "above 0"),
        case({"top_p": 5}, "`top_p=5`", "at most 1"),
        case({"learning_rate": math.nan}, "`learning_rate=nan`"),
        case({"epsilon": -1}, "`epsilon=-1`", "at least 0"),
        case({"seed": -1}, "`seed=-1`"),
        case({"num_generations": 0}, "`num_generations=0`", "at least 1"),
        case({"max_completion_length": 0}, "`max_completion_length=0`", "at least 1"),
        case({"per_device_train_batch_size": 1.5}, "`per_device_train_batch_size=1.5`", "whole number"),
        case({"vllm_gpu_memory_utilization": 5}, "`vllm_gpu_memory_utilization=5`", "at most 1"),
        case({"reward_weights": [1.0, math.nan]}, "`reward_weights=nan`", "[1.0, nan]"),
        case({"flow_target": 50}, "`flow_target=50`", '`"0.5x"`'),
        *(
            case({"flow_target": 0.4, "flow_estimator": name}, f"`flow_estimator='{name}'`", "'sampled'", "'sign'")
            for name in ("covariance", "expected")
        ),
        *(
            case({"control": name, "loss_type": loss, **OFF}, f"`control='{name}'`", f"`loss_type='{loss}'`", "'dapo'")
            for name in ("clip_higher", "clip_low", "dynamic_clip", "ce_gppo", "bapo", "dcpo")
            for loss in ("cispo", "sapo", "vespo")
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_in_plain_words(overrides, parts):
    with pytest.raises(ValueError) as refused:
        config(**overrides)
    assert names(refused.value, parts), refused.value


def test_several_gpus_in_one_process_are_refused():
    check_processes(SimpleNamespace(n_gpu=1))
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*`opefo-trl train`.*CUDA_VISIBLE_DEVICES=0"):
        check_processes(SimpleNamespace(n_gpu=2))


def test_skip_under_deepspeed_is_refused():
    # DeepSpeed is not installed here: the check alone, with what an `accelerate launch` of it sets
    args = config()
    args.nonfinite, args.deepspeed_plugin = "skip", object()
    with pytest.raises(ValueError, match="`nonfinite='skip'`.*DeepSpeed.*`nonfinite='stop'`"):
        check_guards(args)
    args.nonfinite = "stop"
    check_guards(args)
    assert args.updates_in_backward


TWICE = {"num_iterations": 2, **OFF, "save_strategy": "steps"}
LEAVE_OUT = {"zero_advantage_tokens": "leave_out"}
BEST = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "reward"}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        case({"entropy_coef": 0.01}, "`entropy_coef=0.01`", "`control='opefo'`"),
        case({"use_adaptive_entropy": True}, "`use_adaptive_entropy=True`", "`control='opefo'`"),
        case({"top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2`", "`control='opefo'`"),
        case({"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold=0.5`", "`control='opefo'`"),
        case({"loss_type": "luspo"}, "`loss_type='luspo'`", "`loss_type='dapo'`"),
        case({"control": "none", "flow_target": 0.3}, "`control='none'` does not use `flow_target=0.3`"),
        case({"control": "none", "flow_scope": "micro"}, "`control='none'` does not use `flow_scope='micro'`"),
        case({**FIXED, "flow_scope": "running"}, "`control='opefo'` does not use `flow_scope='running'`"),
        case({**FIXED, "flow_lambda_max": 0.05}, "does not use `flow_lambda_max=0.05`", "`static_lambda`"),
        case({"flow_target": 0.3, "flow_lambda_max": 0.05}, "does not use `flow_lambda_max=0.05`", "`flow_target`"),
        case({**VOCABULARY, "flow_estimator": "steer"}, "does not use `flow_estimator='steer'`", "'exact'"),
        case({"resample_keep": "all_right"}, "`resample_keep='all_right'`", "`resample_rounds=0`"),
        case({**TWICE, "save_steps": 3}, "`save_steps=3`", "2 optimizer steps", "multiple of 2"),
        case({**TWICE, "save_steps": 0.1, "max_steps": 30}, "`save_steps=0.1`"),  # = every 3 steps
        case({**TWICE, **BEST}, "`eval_steps=3`"),
        *(
            case({"control": name}, f"`control='{name}'`", "strictly on-policy", "`strict_on_policy=False`",
                 "`steps_per_generation=4`")
            for name, control in CONTROLS.items() if not control.acts_on_policy
        ),
        *(
            case({"control": name, **OFF}, f"`control='{name}'`", control.source)
            for name, control in CONTROLS.items() if control.source is not None
        ),
        case({"control": "steer", "control_kwargs": {"map": "asymmetric"}}, "`control='steer'`", "asymmetric map"),
        case({"control": "dcpo", **OFF}, "`control='dcpo'`", "several updates per rollout"),
    ],
)  # fmt: skip
def test_a_doubtful_setting_is_warned_about_once(overrides, parts):
    with pytest.warns(UserWarning) as warned:
        config(**overrides)
    messages = [str(warning.message) for warning in warned]
    assert len([message for message in messages if names(message, parts)]) == 1, messages
    # transformers warns of its own names, by a FutureWarning
    assert all(one.filename.endswith("test_config_checks.py") for one in warned if one.category is UserWarning)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"control": "none", "importance_sampling_level": "sequence"},
        {"flow_target": 0.4, "importance_sampling_level": "sequence"},
        {"control": "none", "entropy_coef": 0.01, "top_entropy_quantile": 0.2, "loss_type": "luspo"},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4, **OFF},
        {**TWICE, "save_steps": 4},
        {**TWICE, "save_steps": 0.1, "max_steps": 40},
        {"flow_target": " 0.4x "},
        {"resample_rounds": 3, "resample_keep": "all_right"},
        *({**LEAVE_OUT, "loss_type": loss_type} for loss_type in ("dapo", "cispo", "vespo")),
        {**LEAVE_OUT, "flow_target": 0.3},
        {"control_kwargs": None},
        {"flow_lambda_max": 1.0, "flow_estimator": "exact", "flow_scope": "running", "nonfinite": "skip"},
        {**SPANS, **OFF, "flow_scope": "running"},
        *({"control": name, "steps_per_generation": 4, **OFF} for name in CONTROLS if CONTROLS[name].source is None),
    ],
)
def test_a_right_setting_is_accepted_in_silence(overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(**overrides).make_control()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        *(
            case({"loss_type": name}, f"`loss_type='{name}'`", "'dapo', 'cispo' and 'vespo'")
            for name in ("grpo", "sapo", "bnpo", "dr_grpo", "luspo")
        ),
        case({"beta": 0.1}, "`beta=0.1`", "reference model"),
        case({"control": "aer"}, "`control='aer'`"),
        case({"control": "kl_cov"}, "`control='kl_cov'`"),
        case({"flow_target": 0.3, "flow_rows": "all"}, "`control='opefo'`"),
    ],
)
def test_tokens_that_the_loss_does_not_count_or_that_are_trained_cannot_be_left_out(overrides, parts):
    with pytest.raises(ValueError) as refused:
        config(**LEAVE_OUT, **{"control": "none", **overrides} if "flow_target" not in overrides else overrides)
    parts = ("`zero_advantage_tokens='leave_out'`", "`zero_advantage_tokens='count'`", *parts)
    assert names(refused.value, parts), refused.value


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_kl_cov_needs_no_clip_range(loss_type):
    with pytest.warns(UserWarning, match="`noise`"):
        assert config(control="kl_cov", loss_type=loss_type, **TWICE).loss_type == loss_type


def test_other_ranks_do_not_repeat_a_warning(monkeypatch):
    monkeypatch.setattr(OPEFOConfig, "process_index", property(lambda self: 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(control="aer", top_entropy_quantile=0.2)


def test_a_source_is_one_clause():
    for name, control in CONTROLS.items():
        assert control.source is None or re.fullmatch(r"[^.]*(second-hand|our choice)[^.]*", control.source), name
