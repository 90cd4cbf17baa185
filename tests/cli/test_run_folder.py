"""Which checkpoint a run goes on from, and whether it is the same run."""

import json
from dataclasses import dataclass

import pytest
from tiny import train
from transformers.trainer_callback import TrainerState

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.run_folder import (
    check_newest,
    check_same_run,
    facts_of,
    is_complete,
    newest_checkpoint,
    write_facts,
)


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


def test_what_the_trainer_writes_is_whole(out):
    train(OPEFOTrainer, OPEFOConfig, out, save_strategy="steps", save_steps=2)
    assert newest_checkpoint(out) == out / "checkpoint-2"
    assert is_complete(out / "checkpoint-2")


def test_going_back_needs_the_later_ones_gone(tmp_path):
    early, late = checkpoint(tmp_path / "a", 50), checkpoint(tmp_path / "a", 100)
    check_newest(late, tmp_path / "a")
    check_newest(early, tmp_path / "b")  # into another folder: nothing to mistake there
    with pytest.raises(ValueError, match="checkpoint-100 would be taken for one of this run"):
        check_newest(early, tmp_path / "a")


@dataclass
class Part:
    control: str = "opefo"
    flow_target: object = 0.4
    max_steps: int = 10
    output_dir: str = "out"


def test_another_run_is_not_gone_on_with(tmp_path):
    write_facts(tmp_path / "out", facts_of(Part()))
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {"control": "opefo", "flow_target": 0.4}
    check_same_run(tmp_path / "out", facts_of(Part(max_steps=20)))  # longer is the same run
    with pytest.raises(ValueError, match=r"control=opefo \(now none\).*--output_dir"):
        check_same_run(tmp_path / "out", facts_of(Part(control="none")))
    check_same_run(tmp_path / "out", facts_of(Part(flow_target="0.4")))  # as a command line has it
    check_same_run(tmp_path / "nowhere", facts_of(Part()))
