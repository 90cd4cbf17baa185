import copy
import dataclasses
import inspect
import pickle

from tiny import settings
from trl import GRPOConfig, TrlParser

from opefo_trl import OPEFOConfig
from opefo_trl.config import Secret


def config(**overrides):
    return OPEFOConfig(**settings("out", **overrides))


def test_fields_reach_the_control():
    control = config(flow_lambda_max=0.25, control_kwargs={"sides": "increase"}).make_control()
    assert (control.sides, control.bound, control.target) == ("increase", 0.25, None)
    control = config(flow_target="0.4x").make_control()
    assert (control.target.number, control.target.relative, control.shape) == (0.4, True, "additive")
    assert config(control_kwargs={"static_lambda": "1e-3"}).make_control().lam == 0.001  # YAML reads 1e-3 as text


def test_the_command_line_and_yaml_reach_the_fields(tmp_path):
    def parse(*words):
        common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
        return TrlParser(OPEFOConfig).parse_args_and_config([*common, *words])[0]

    args = parse("--flow_target", "0.4x", "--control_kwargs", '{"sides": "increase"}', "--strict_on_policy", "false")
    assert (args.flow_target, args.control_kwargs, args.strict_on_policy) == ("0.4x", {"sides": "increase"}, False)
    (tmp_path / "run.yaml").write_text("flow_target: 0.3\ncontrol_kwargs:\n  sides: decrease\n")
    file = ("--config", str(tmp_path / "run.yaml"))
    args, cleared = parse(*file), parse(*file, "--flow_target", "none", "--sampling_drift_max", "none")
    assert (float(args.flow_target), args.control_kwargs) == (0.3, {"sides": "decrease"})
    assert cleared.flow_target is None and cleared.sampling_drift_max is None
    (tmp_path / "run.yaml").write_text("flow_shape: sign\n")
    assert parse(*file).flow_shape == "sign" and parse(*file, "--flow_shape", "none").flow_shape is None


def test_the_flow_is_measured_by_a_scoring_pass_only_where_it_must_be():
    def measuring(**overrides):
        args = config(**overrides)
        return args.measuring(args.make_control())

    assert measuring() == "live"  # the one micro-batch is the whole batch
    assert measuring(gradient_accumulation_steps=2) == "ahead"
    assert measuring(num_iterations=2, strict_on_policy=False) == "ahead"
    assert measuring(flow_scope="running") == measuring(control="none") == "never"
    assert measuring(flow_scope="running", flow_estimator="exact") == "ahead"


def test_a_token_is_neither_shown_nor_pickled_nor_lost_in_a_copy():
    token = config(hub_token="hf_x").hub_token
    assert token == "hf_x" and isinstance(token, Secret) and "hf_x" not in repr(token)
    assert copy.deepcopy(token) == "hf_x" and pickle.loads(pickle.dumps(token)) is None
    for options in ({"token": "hf_x", "revision": "main"}, '{"token": "hf_x", "revision": "main"}'):
        loading = config(model_init_kwargs=options).model_init_kwargs
        assert loading == {"token": "hf_x", "revision": "main"}
        assert pickle.loads(pickle.dumps(loading)) == {"token": None, "revision": "main"}


def test_every_field_is_documented_twice_in_the_same_words():
    def words(text):
        return " ".join(text.replace("`", "").replace('"', "").replace("'", "").split())

    docstring = words(inspect.getdoc(OPEFOConfig))
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours = [field for field in dataclasses.fields(OPEFOConfig) if field.name not in inherited]
    assert len(ours) == 18
    for field in ours:
        assert words(field.metadata["help"]) in docstring, field.name
