"""The recorder without a trainer: a row is the mean of what was measured since the row before."""

import math
from collections import defaultdict

import pytest
from tiny import settings
from transformers import TrainerState

from opefo_trl import OPEFOConfig
from opefo_trl.files import CURVES_FILE
from opefo_trl.playground import MODEL
from opefo_trl.training.recorder import SKIPPED_STEPS, Recorder, run_settings


@pytest.fixture
def metrics():
    return defaultdict(list)


@pytest.fixture
def recorder(out, metrics):
    return Recorder(out, {"control": "opefo"}, lambda: metrics, tokenizer=None, active=True)


def end_step(recorder, step):
    recorder.on_step_end(None, TrainerState(global_step=step, epoch=0.5), None)
    return recorder.curves.frame.iloc[-1]


def test_rows_do_not_depend_on_when_trl_clears_its_lists(recorder, metrics):
    metrics["entropy"] += [1.0, 2.0]
    assert end_step(recorder, 1)["entropy"] == 1.5
    metrics["entropy"] += [4.0]
    assert end_step(recorder, 2)["entropy"] == 4.0
    metrics.clear()
    recorder.metrics_cleared()
    metrics["entropy"] += [8.0, math.nan]
    assert end_step(recorder, 3)["entropy"] == 8.0


def test_counts_are_not_averaged(recorder, metrics):
    for step, count in enumerate([3.0, 4.0], start=1):
        metrics[SKIPPED_STEPS] = metrics["num_tokens"] = [count]
        row = end_step(recorder, step)
    assert row[SKIPPED_STEPS] == row["num_tokens"] == 4.0


def test_step_numbers_and_evaluations_are_in_the_row(recorder):
    recorder.step_numbers = {"loss": 0.5}
    assert end_step(recorder, 1)["loss"] == 0.5
    recorder.on_evaluate(None, None, None, metrics={"eval_reward": 0.75, "eval_x": None, "epoch": 1.0})
    assert recorder.curves.frame.iloc[-1]["eval_reward"] == 0.75


def test_a_full_disk_costs_no_run(recorder, out, caplog):
    out.parent.mkdir(exist_ok=True)
    out.write_text("a file where the folder should be")
    end_step(recorder, 1)
    assert "could not be written" in caplog.text and len(recorder.curves.frame) == 1


def test_an_inactive_recorder_does_nothing(out, metrics):
    recorder = Recorder(out, {}, lambda: metrics, tokenizer=None, active=False)
    recorder.on_step_end(None, TrainerState(global_step=1), None)
    recorder.end()
    assert recorder.curves is None and not (out / CURVES_FILE).exists()


def test_settings_hold_no_path(out, tmp_path):
    args = OPEFOConfig(**settings(out))
    assert run_settings(args, str(MODEL))["model"] == "playground"
    assert run_settings(args, str(tmp_path))["model"] == tmp_path.name
    assert run_settings(args, "org/model") == {**run_settings(args, ""), "model": "org/model"}
