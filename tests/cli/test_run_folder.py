"""The checkpoint that a run resumes from, and the settings that must be the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from material import MATERIAL
from scripts import load_script
from transformers.trainer_callback import TrainerState

from opefo_trl.cli.parser import Parser
from opefo_trl.cli.run_folder import (
    check_newest,
    check_same_run,
    has_ended,
    newest_checkpoint,
    saved_setting,
    settings_of,
    write_settings,
)

# Settings that run.json had before it had all of them
OLD_FIELDS = set((MATERIAL / "run_settings_before.txt").read_text().split())


def checkpoint(folder, step, state=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is None:
        TrainerState(global_step=step).save_to_json(str(path / "trainer_state.json"))
    elif state is not False:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_whole_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "nowhere") is None
    checkpoint(tmp_path, 50)
    good = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 150, '{"global_step": 1')  # killed while it was written
    checkpoint(tmp_path, 200, "")
    checkpoint(tmp_path, 250, False)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == good


def test_going_back_needs_the_newer_ones_gone(tmp_path):
    early, late = checkpoint(tmp_path / "a", 50), checkpoint(tmp_path / "a", 100)
    check_newest(late, tmp_path / "a")
    check_newest(early, tmp_path / "b")  # into another folder: nothing to mistake there
    with pytest.raises(ValueError, match="checkpoint-50.*checkpoint-100.*--output_dir"):
        check_newest(early, tmp_path / "a")


# ---- the same run?


@dataclass
class Part:
    control: str = "opefo"
    flow_target: object = 0.4
    max_steps: int = 10
    output_dir: str = "out"
    hub_token: str | None = "hf_secret"
    model_init_kwargs: dict = field(default_factory=lambda: {"token": "hf_secret", "low_cpu_mem_usage": True})
    nobody_knows_this: int = 1
    derived: int = field(init=False, default=3)


def test_run_json_has_all_settings_but_those_that_may_differ_and_no_token(tmp_path):
    write_settings(tmp_path, settings_of(Part()))
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "control": "opefo",
        "flow_target": 0.4,
        "model_init_kwargs": {"low_cpu_mem_usage": True},
        "nobody_knows_this": 1,
    }
    assert not has_ended(tmp_path) and not has_ended(tmp_path / "nowhere")
    write_settings(tmp_path, settings_of(Part()), ended=True)
    assert has_ended(tmp_path)


def test_another_run_is_not_resumed(tmp_path):
    write_settings(tmp_path, settings_of(Part()))
    check_same_run(tmp_path, settings_of(Part(max_steps=20, output_dir="b", hub_token="other")))
    for change in ({"control": "none"}, {"nobody_knows_this": 2}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=rf"{name}=.* \(now {value}\).*--output_dir.*--resume_from_checkpoint"):
            check_same_run(tmp_path, settings_of(Part(**change)))
    check_same_run(tmp_path / "nowhere", settings_of(Part()))


@pytest.mark.parametrize(
    ("saved", "now"),
    [(0.4, "0.4"), (20, 20.0), ([1, 0.1], [1.0, "0.1"]), ({"a": 1}, {"a": "1"}), (None, None), (True, True)],
)
def test_a_value_is_the_same_in_a_config_file_and_on_the_command_line(tmp_path, saved, now):
    write_settings(tmp_path, settings_of(Part(flow_target=saved)))
    check_same_run(tmp_path, settings_of(Part(flow_target=now)))
    with pytest.raises(ValueError, match="flow_target="):
        check_same_run(tmp_path, settings_of(Part(flow_target="0.4x")))


def test_a_run_from_before_resumes_with_the_fields_that_it_has(tmp_path):
    (tmp_path / "run.json").write_text('{"control": "opefo", "long_gone": 1, "ended": true}')
    check_same_run(tmp_path, settings_of(Part(nobody_knows_this=5)))
    with pytest.raises(ValueError, match="control=opefo"):
        check_same_run(tmp_path, settings_of(Part(control="none")))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json"):
        check_same_run(tmp_path, settings_of(Part()))


@pytest.fixture(scope="module")
def script():
    return load_script("train.py")


def settings(script, *words):
    parser = Parser((script.ScriptArguments, script.OPEFOConfig, script.ModelConfig))
    return settings_of(*parser.parse(words, script.QUICKSTART))


def test_a_setting_of_the_run_that_trained_a_model(tmp_path):
    write_settings(tmp_path, {"chat_template_kwargs": {"enable_thinking": False}})
    checkpoint = tmp_path / "checkpoint-3"
    for model in (tmp_path, checkpoint):
        assert saved_setting(str(model), "chat_template_kwargs") == {"enable_thinking": False}
        assert saved_setting(str(model), "other") is None
    assert saved_setting(str(tmp_path / "eval"), "chat_template_kwargs") is None


def test_two_starts_of_one_command_have_the_same_settings(script, tmp_path, monkeypatch):
    words = ["--hub_token", "hf_secret", "--push_to_hub", "true", "--flow_target", "0.4", "--optim", "adamw_torch"]
    words += ["--control_kwargs", '{"sides": "both"}', "--warmup_steps", "20", "--reward_weights", "1"]
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--decontaminate", "aime24"]
    first = settings(script, *words, "--output_dir", str(tmp_path / "a"))
    monkeypatch.chdir(tmp_path)
    assert first == settings(script, *words, "--output_dir", "b", "--max_steps", "3", "--save_steps", "1")
    assert first.keys() >= OLD_FIELDS and "hf_secret" not in json.dumps(first)

    config = tmp_path / "config.yaml"
    config.write_text(
        Path(script.QUICKSTART).read_text().replace("flow_target: 0.5", "flow_target: 0.4")
        + "optim: adamw_torch\ncontrol_kwargs: {sides: both}\nreward_weights: [1]\nhub_token: hf_secret\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\ndecontaminate: aime24\n"
    )
    write_settings(tmp_path, first)
    check_same_run(tmp_path, settings(script, "--config", str(config), "--output_dir", "c"))
    with pytest.raises(ValueError, match=r"learning_rate=0\.0004 \(now 0\.01\)"):
        check_same_run(tmp_path, settings(script, "--config", str(config), "--learning_rate", "0.01"))


def test_the_settings_of_another_machine_may_differ(script, tmp_path, monkeypatch):
    write_settings(tmp_path, settings(script))
    more = "--gradient_checkpointing true --dataloader_num_workers 2 --report_to none --vllm_mode server --run_name a"
    check_same_run(tmp_path, settings(script, *more.split()))
    with pytest.raises(ValueError, match="per_device_train_batch_size=256"):
        check_same_run(tmp_path, settings(script, "--per_device_train_batch_size", "128"))
