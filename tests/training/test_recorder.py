"""The rows, samples and files that a trainer leaves: every step once, whatever happens to the run."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
from tiny import build, digit_reward, settings, tiny_dataset, train
from transformers import TrainerState

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.progress import sentence_of
from opefo_trl.curves import EntropyCurves
from opefo_trl.files import CARD_FILE, CURVES_FILE, PICTURE_FILE, REPORT_FILE
from opefo_trl.playground import MODEL
from opefo_trl.training.recorder import SKIPPED_STEPS, Recorder, run_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps towards a target, saved at the second and fourth."""
    out = tmp_path_factory.mktemp("run")
    return train(OPEFOTrainer, OPEFOConfig, out, max_steps=5, flow_target="0.4x", save_strategy="steps", save_steps=2)


def test_every_step_is_a_row_with_what_was_logged(run):
    frame = EntropyCurves.load(run.args.output_dir).to_pandas()
    assert frame["step"].tolist() == [1, 2, 3, 4, 5]
    logs = [row for row in run.state.log_history if "reward" in row]
    for name in ("reward", "entropy", "flow/increase", "flow/lambda", "answers/distinct", "num_tokens"):
        assert frame[name].tolist() == pytest.approx([row[name] for row in logs]), name
    assert frame["loss"].tolist() == pytest.approx([row["loss"] for row in logs], abs=1e-6)
    assert frame["grad_norm"].tolist() == pytest.approx([row["grad_norm"] for row in logs], rel=1e-5)
    assert frame["learning_rate"].tolist() == pytest.approx([row["learning_rate"] for row in logs])
    assert frame["answers/distinct"].between(0, 4).all() and frame["answers/solved"].between(0, 1).all()


def test_a_save_draws_and_keeps_a_copy_and_the_settings(run):
    out = Path(run.args.output_dir)
    assert EntropyCurves.load(out / "checkpoint-2").to_pandas()["step"].tolist() == [1, 2]
    assert (out / PICTURE_FILE).exists() and (out / REPORT_FILE).exists()
    assert f"]({PICTURE_FILE})" in (out / CARD_FILE).read_text()
    settings = run.curves.settings
    assert settings["control"] == "opefo" and settings["flow_target"] == "0.4x" and settings["seed"] == 3
    assert "flow_lambda_max" not in settings  # with a target lambda is bounded by 1


def test_a_sample_is_what_the_policy_wrote(run):
    samples = run.curves.samples
    assert {sample["step"] for sample in samples} == {1, 2, 3, 4, 5} and len(samples) == 40
    for sample in samples:
        text = "".join(sample["tokens"]).replace("<pad>", "").removesuffix("<eos>")
        assert sample["reward"] == pytest.approx(digit_reward([text])[0])
        assert len(sample["tokens"]) == len(sample["flow"]) == len(sample["entropy"]) == sample["length"]
        assert all(0 < probability <= 1 for probability in sample["probability"])
    net = sum(sum(sample["flow"]) for sample in samples[:8])
    tokens = sum(sample["length"] for sample in samples[:8])
    assert net / tokens == pytest.approx(run.curves.to_pandas()["flow/net"][0], rel=1e-3)


def test_samples_are_the_extremes_of_all_micro_batches(out):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=1, **sizes)
    assert trainer.curves.to_pandas()["step"].tolist() == [1]  # a row for the step, not for each micro-batch
    advantages = [sample["advantage"] for sample in trainer.curves.samples]
    assert len(advantages) == 8 and advantages == sorted(advantages, reverse=True)  # four from either end
    assert max(advantages) == pytest.approx(max(trainer._logs["advantages"]))
    assert min(advantages) == pytest.approx(min(trainer._logs["advantages"]))


@pytest.mark.slow
def test_an_evaluation_is_in_the_row_of_its_step_even_without_scores(out):
    def judged(completions, **_):
        return [None] * len(completions)

    trainer = build(
        OPEFOTrainer, OPEFOConfig, out, max_steps=4, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8,
        extra={"eval_dataset": tiny_dataset(1), "reward_funcs": [digit_reward, judged]},
    )  # fmt: skip
    trainer.train()
    assert EntropyCurves.load(out).to_pandas()["eval_reward"].notna().tolist() == [False, True, False, True]
    scores = trainer.evaluate()
    assert scores["eval_rewards/judged/mean"] is None
    assert "reward 0." in sentence_of(scores) and "reward -" in sentence_of({"eval_reward": None})


def test_a_second_run_has_no_rows_of_the_first(out):
    trainer = build(OPEFOTrainer, OPEFOConfig, out, max_steps=3, logging_steps=1000)
    trainer._metrics["train"]["reward"] += [100.0, 100.0]  # as an interrupted run leaves them
    trainer.train()
    assert trainer.curves.to_pandas()["reward"].max() <= 1


def test_there_are_no_curves_with_entropy_curves_false(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, entropy_curves=False, save_strategy="steps", save_steps=1)
    assert trainer.curves is None
    assert not {CURVES_FILE, PICTURE_FILE, REPORT_FILE} & {path.name for path in out.rglob("*")}


def test_measured_rows_survive_an_error(out):
    def reward(completions, trainer_state, **_):
        if trainer_state.global_step == 3:
            raise RuntimeError
        return digit_reward(completions)

    trainer = build(OPEFOTrainer, OPEFOConfig, out, max_steps=9, extra={"reward_funcs": reward})
    with pytest.raises(RuntimeError):
        trainer.train()
    assert EntropyCurves.load(out).to_pandas()["step"].tolist() == [1, 2, 3]


def test_a_full_disk_costs_the_picture_but_not_the_run(out, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opefo_trl.curves.record.pq.write_table", full)
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2)
    assert trainer.state.global_step == 2
    assert "No space left on device" in caplog.text


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


def test_settings_hold_no_path(out, tmp_path):
    args = OPEFOConfig(**settings(out))
    assert run_settings(args, str(MODEL))["model"] == "playground"
    assert run_settings(args, str(tmp_path))["model"] == tmp_path.name
    assert run_settings(args, "org/model")["model"] == "org/model"
