import dataclasses
import inspect
import warnings

import pytest
from tiny import settings
from trl import TrlParser

from opefo_trl import OPEFOConfig


def config(**overrides):
    return OPEFOConfig(**settings("out", **overrides))


OFF = {"strict_on_policy": False}
WRONG = {
    "control": (
        {"control": "opfeo"},
        r"`control='opfeo'` is unknown\. Did you mean 'opefo'\? Choose one of 'none', 'opefo'",
    ),
    "option": ({"control_kwargs": {"side": "both"}}, r"no option 'side'\. Did you mean 'sides'\? It takes 'sides'"),
    "option of none": ({"control": "none", "control_kwargs": {"sides": "both"}}, r"It takes no options\."),
    "options": ({"control_kwargs": "sides=both"}, r"`control_kwargs='sides=both'` is not a map.*JSON"),
    "option with a field": ({"control_kwargs": {"flow_target": 0.3}}, r"'flow_target', which has a field of its own"),
    "sides": (
        {"control_kwargs": {"sides": "up"}},
        r"`sides='up'` in `control_kwargs` is unknown.*'both', 'increase'",
    ),
    "static lambda": (
        {"control_kwargs": {"static_lambda": 2}},
        r"`static_lambda=2` .*\[-1, 1\]",
    ),
    "two lambdas": (
        {"control_kwargs": {"static_lambda": 0.1}, "flow_target": 0.3},
        r"fixes lambda for the whole run and `flow_target=0\.3` moves it",
    ),
    "estimator": ({"flow_estimator": "Exact"}, r"`flow_estimator='Exact'` is unknown.*'exact'"),
    "scope": (
        {"flow_scope": "global"},
        r"`flow_scope='global'` is unknown.*'batch', 'running', 'micro'",
    ),
    "lambda 0": ({"flow_lambda_max": 0.0}, r"`flow_lambda_max=0\.0` .*above 0 and at most 1"),
    "lambda 2": ({"flow_lambda_max": 2.0}, r"`flow_lambda_max=2\.0` .*above 0 and at most 1.*change sign"),
    "target sign": ({"flow_target": -0.1}, r"`flow_target=-0\.1` is not an entropy"),
    "target unit": ({"flow_target": "0.4y"}, r"`flow_target='0\.4y'` is not an entropy.*\"0\.4x\""),
    "target nan": ({"flow_target": float("nan")}, r"`flow_target=nan` is not an entropy"),
    "target number": ({"flow_target": "1-2x"}, r"`flow_target='1-2x'` is not an entropy"),
    "schedule": ({"flow_target": 0.3, "flow_schedule": "cosin"}, r"`flow_schedule='cosin'` is unknown"),
    "schedule in capitals": ({"flow_schedule": "Constant"}, r"`flow_schedule='Constant'` is unknown.*'constant'"),
    "control in capitals": ({"control": "OPEFO"}, r"`control='OPEFO'` is unknown\. Did you mean 'opefo'"),
    "control as a list": ({"control": ["opefo"]}, r"`control=\['opefo'\]` is unknown"),
    "option that is no name": ({"control_kwargs": {1: 2}}, r"`control_kwargs=\{1: 2\}` is not a map"),
    "broken JSON": ({"control_kwargs": '{"sides": '}, r"`control_kwargs='\{\"sides\": '` is not a map.*JSON"),
    "lambda as words": ({"flow_lambda_max": "small"}, r"`flow_lambda_max='small'` must be a number"),
    "strict as text": ({"strict_on_policy": "false"}, r"`strict_on_policy='false'` must be True or False"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, r"`gradient_accumulation_steps=0` must be 1 or more"),
    "shape": ({"flow_shape": "round"}, r"`flow_shape='round'` is unknown.*'sign'"),
    "iterations": (
        {"num_iterations": 2},
        r"`num_iterations=2` trains 2 times on one rollout.*`strict_on_policy=False`",
    ),
    "generation": (
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4},
        r"`steps_per_generation=8` with `gradient_accumulation_steps=4` takes 2 optimizer steps per rollout.*Set them "
        r"equal, or pass `strict_on_policy=False`",
    ),
    "generations per step": (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
        r"takes 0\.5 optimizer steps per rollout",
    ),
    "nonfinite": ({"nonfinite": "ignore"}, r"`nonfinite='ignore'` is unknown.*'stop', 'skip'"),
    "micro-batching": (
        {"micro_batching": "Exact"},
        r"`micro_batching='Exact'` is unknown.*'exact', 'trl'",
    ),
    "no drift": (
        {"sampling_drift_max": 0},
        r"`sampling_drift_max=0` must be a number above 0, in nats, or None to let any drift pass",
    ),
    "drift in words": ({"sampling_drift_max": "little"}, r"`sampling_drift_max='little'` must be a number"),
    "drift nan": ({"sampling_drift_max": float("nan")}, r"`sampling_drift_max=nan` must be a number"),
    "drift as a switch": ({"sampling_drift_max": True}, r"`sampling_drift_max=True` must be a number"),
    "sequence level": (
        {"importance_sampling_level": "sequence"},
        r"token weights of `control='opefo'` would be averaged",
    ),
    "skip with a layer-wise optimizer": (
        {"nonfinite": "skip", "optim": "galore_adamw_layerwise"},
        r"cannot be kept under DeepSpeed or with a layer-wise optimizer",
    ),
    "a step that spans rollouts": (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4, **OFF},
        r"`steps_per_generation=2` with `gradient_accumulation_steps=4` lets an optimizer step span several rollouts.*"
        r"`flow_scope='running'`",
    ),
    "liger": (
        {"liger_kernel_config": {"fused_linear_cross_entropy": True}},
        r"'fused_linear_cross_entropy': True\}` replaces the forward",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused_in_plain_words(case):
    overrides, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_skip_under_deepspeed_is_refused(monkeypatch):
    # DeepSpeed is not installed here: the check alone, on what an `accelerate launch` with it sets
    args = config()
    args.nonfinite, args.deepspeed_plugin = "skip", object()
    with pytest.raises(ValueError, match=r"`nonfinite='skip'` cannot be kept under DeepSpeed.*`nonfinite='stop'`"):
        args._check_guards()
    args.nonfinite = "stop"
    args._check_guards()
    assert args.updates_in_backward


WARNED = {
    "bonus": ({"entropy_coef": 0.01}, r"`entropy_coef=0\.01` pushes entropy at the same time as `control='opefo'`"),
    "adaptive": ({"use_adaptive_entropy": True}, r"`use_adaptive_entropy=True` pushes entropy"),
    "quantile": ({"top_entropy_quantile": 0.2}, r"`top_entropy_quantile=0\.2` drops tokens from the loss"),
    "luspo": ({"loss_type": "luspo"}, r"`loss_type='luspo'` is a sequence-level objective.*'dapo'"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5}, r"`off_policy_mask_threshold=0\.5` drops completions"),
    "unused": ({"control": "none", "flow_target": 0.3}, r"`control='none'` does not use `flow_target=0\.3`"),
    "unused scope": (
        {"control": "none", "flow_scope": "micro"},
        r"`control='none'` does not use `flow_scope='micro'`",
    ),
    "scope of a fixed lambda": (
        {"control_kwargs": {"static_lambda": 0.1}, "flow_scope": "running"},
        r"`control='opefo'` does not use `flow_scope='running'`",
    ),
    "bound of a fixed lambda": (
        {"control_kwargs": {"static_lambda": 0.1}, "flow_lambda_max": 0.05},
        r"does not use `flow_lambda_max=0\.05`: `static_lambda` is set",
    ),
    "bound beside a target": (
        {"flow_target": 0.3, "flow_lambda_max": 0.05},
        r"does not use `flow_lambda_max=0\.05`: `flow_target` is set",
    ),
    "checkpoint inside a window": (
        {"num_iterations": 2, **OFF, "save_strategy": "steps", "save_steps": 3},
        r"`save_steps=3` may place checkpoints inside a rollout of 2 optimizer steps.*Use a multiple of 2",
    ),
    "checkpoint at a share of the run": (
        {"num_iterations": 2, **OFF, "save_strategy": "steps", "save_steps": 0.1, "max_steps": 30},
        r"`save_steps=0\.1` may place",  # = every 3 steps
    ),
    "best checkpoint": (
        {
            "num_iterations": 2,
            **OFF,
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "metric_for_best_model": "reward",
        },
        r"`eval_steps=3` may place",
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_a_doubtful_setting_is_warned_about(case):
    overrides, message = WARNED[case]
    with pytest.warns(UserWarning, match=message):
        config(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"control": "none", "importance_sampling_level": "sequence"},
        {"control": "none", "entropy_coef": 0.01, "top_entropy_quantile": 0.2, "loss_type": "luspo"},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4, **OFF},
        {"num_iterations": 2, **OFF, "save_strategy": "steps", "save_steps": 4},
        {"flow_target": 0.3},
        {"flow_target": " 0.4x "},
        {"control_kwargs": {"static_lambda": 0.001}},
        {"control_kwargs": {"static_lambda": "1e-3"}},  # what YAML makes of 1e-3
        {"control_kwargs": None},
        {"flow_lambda_max": 1.0, "flow_estimator": "exact", "flow_scope": "running", "nonfinite": "skip"},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4, **OFF, "flow_scope": "running"},
        {"num_iterations": 2, **OFF, "save_strategy": "steps", "save_steps": 0.1, "max_steps": 40},
    ],
)
def test_a_right_setting_is_taken_in_silence(overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(**overrides).make_control()


def test_fields_reach_the_control():
    control = config(flow_lambda_max=0.25, control_kwargs={"sides": "increase"}).make_control()
    assert (control.sides, control.bound, control.target) == ("increase", 0.25, None)
    control = config(flow_target="0.4x").make_control()
    assert (control.target.number, control.target.relative, control.bound) == (0.4, True, 1.0)
    assert config(control_kwargs={"static_lambda": "1e-3"}).make_control().lam == 0.001


def test_the_command_line_and_yaml_reach_the_fields(tmp_path):
    parser = TrlParser(OPEFOConfig)
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (args,) = parser.parse_args_and_config(
        [*common, "--flow_target", "0.4x", "--control_kwargs", '{"sides": "increase"}', "--strict_on_policy", "false"]
    )
    assert (args.flow_target, args.control_kwargs, args.strict_on_policy) == ("0.4x", {"sides": "increase"}, False)

    (tmp_path / "run.yaml").write_text("flow_target: 0.3\ncontrol_kwargs:\n  sides: decrease\n")
    (args,) = parser.parse_args_and_config([*common, "--config", str(tmp_path / "run.yaml")])
    assert (float(args.flow_target), args.control_kwargs) == (0.3, {"sides": "decrease"})
    (args,) = parser.parse_args_and_config([*common, "--config", str(tmp_path / "run.yaml"), "--flow_target", "none"])
    assert args.flow_target is None


def test_every_field_is_documented_twice_in_the_same_words():
    from trl import GRPOConfig

    def words(text):
        return " ".join(text.replace("`", "").replace('"', "").replace("'", "").split())

    docstring = words(inspect.getdoc(OPEFOConfig))
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours = [field for field in dataclasses.fields(OPEFOConfig) if field.name not in inherited]
    assert len(ours) == 13
    for field in ours:
        assert words(field.metadata["help"]) in docstring, field.name
