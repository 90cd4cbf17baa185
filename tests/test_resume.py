import json
import shutil
from pathlib import Path

import pytest
import torch
from scripts import python
from tiny import build, metrics, tiny_dataset, train
from watched_runs import assert_same

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS, Control

SCRIPT = Path(__file__).parent / "runs" / "resume.py"
SCOPES = ["batch", "running", "micro"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """For each scope, train 8 steps; and again, killed in step 5 and resumed from step 4."""
    out = tmp_path_factory.mktemp("killed")
    for folder, mode in (("whole", "whole"), ("crashed", "crash"), ("crashed", "resume")):
        python(SCRIPT, out / folder, mode, *SCOPES)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_a_run_that_was_killed_resumes_bit_for_bit(scope, runs):
    assert not (runs / "crashed" / scope / "checkpoint-5").exists()
    whole = json.loads((runs / "whole" / scope / "whole.json").read_text())
    resumed = json.loads((runs / "crashed" / scope / "resume.json").read_text())
    assert resumed["parameters"] == whole["parameters"]
    assert resumed["metrics"][:8] == whole["metrics"][:8]  # steps 1 to 4 come from the checkpoint
    assert any(row["flow/lambda"] != 0 for row in whole["metrics"][4:8])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    train(OPEFOTrainer, OPEFOConfig, out, save_strategy="steps", save_steps=2, flow_target="0.9x")
    return out / "checkpoint-2"


@pytest.fixture
def checkpoint(saved, out) -> str:
    """Copy the checkpoint of step 2, so that a test may change it."""
    return str(shutil.copytree(saved, out / "checkpoint-2"))


def test_the_state_is_json_that_a_person_can_read(checkpoint):
    state = json.loads(Path(checkpoint, "control_state.json").read_text())
    assert state["control"] == "opefo" and state["state"]["anchor"] > 0
    assert len(state["totals"]) == 8 and (state["guard"]["skipped"], state["guard"]["taken"]["count"]) == (0, 2)


def resume(checkpoint, out, **overrides):
    trainer = build(OPEFOTrainer, OPEFOConfig, out, max_steps=3, **overrides)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_a_checkpoint_without_state_starts_afresh_and_says_so(checkpoint, out, caplog):
    (Path(checkpoint) / "control_state.json").unlink()
    trainer = resume(checkpoint, out, flow_target="0.9x")
    assert "checkpoint-2/control_state.json" in caplog.text
    assert metrics(trainer)[2]["flow/target"] != metrics(trainer)[1]["flow/target"]


def test_a_target_set_on_resume_is_anchored_at_the_first_step_of_the_run(out):
    train(OPEFOTrainer, OPEFOConfig, out, save_strategy="steps", save_steps=2)
    trainer = resume(str(out / "checkpoint-2"), out, flow_target="0.9x")
    first, last = metrics(trainer)[0], metrics(trainer)[2]
    assert last["flow/target"] == pytest.approx(0.9 * first["entropy"], rel=1e-4)


def test_a_run_by_epochs_resumes_bit_for_bit(out, tmp_path):
    epochs = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    epochs["extra"] = {"train_dataset": tiny_dataset(1)}
    whole = train(OPEFOTrainer, OPEFOConfig, out, **epochs)
    assert list(whole.curves.frame["step"]) == list(range(1, 9)) and whole.state.max_steps == 8
    for step in (2, 4, 6):  # in the first epoch, between the two, in the second
        resumed = build(OPEFOTrainer, OPEFOConfig, tmp_path / str(step), **epochs)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert list(resumed.curves.frame["step"]) == list(range(1, 9))
        assert_same(dict(whole.model.named_parameters()), dict(resumed.model.named_parameters()))


def test_state_that_is_no_json_leaves_no_checkpoint_behind(out, monkeypatch):
    class Heavy(Control):
        def state_dict(self):
            return {"weights": torch.ones(2)}

    monkeypatch.setitem(CONTROLS, "heavy", Heavy)
    with pytest.raises(TypeError, match=r"`state_dict\(\)` of `control='heavy'` .*JSON.*'weights'"):
        train(OPEFOTrainer, OPEFOConfig, out, control="heavy", save_strategy="steps", save_steps=1)
    assert not (out / "checkpoint-1").exists()
