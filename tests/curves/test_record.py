"""The record of a run: every step once, whatever happens to the run."""

import json

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import build, digit_reward, tiny_dataset, tiny_model, train

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.progress import sentence_of
from opefo_trl.curves import CurveRecorder, EntropyCurves, write_report
from opefo_trl.curves.__main__ import main
from opefo_trl.curves.plot import draw
from opefo_trl.curves.token_samples import ROWS, sample_steps
from opefo_trl.files import CURVES_FILE, PICTURE_FILE, REPORT_FILE


def rows(steps, **columns):
    return [{"step": step, "entropy": 1 / step, **columns} for step in steps]


def recorded(folder, steps, **settings):
    recorder = CurveRecorder(folder, settings)
    for row in rows(steps):
        recorder.append(row)
    recorder.write()
    return recorder


# ---- what a trainer records


def test_every_step_is_a_row_with_what_was_logged(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=5, flow_target=3.0)
    frame = EntropyCurves.load(out).to_pandas()
    assert frame["step"].tolist() == [1, 2, 3, 4, 5]
    logs = [row for row in trainer.state.log_history if "reward" in row]
    for name in ("reward", "entropy", "flow/increase", "flow/lambda", "answers/distinct", "num_tokens"):
        assert frame[name].tolist() == pytest.approx([row[name] for row in logs]), name
    assert frame["loss"].tolist() == pytest.approx([row["loss"] for row in logs], abs=1e-6)
    assert frame["grad_norm"].tolist() == pytest.approx([row["grad_norm"] for row in logs], rel=1e-5)
    assert frame["learning_rate"].tolist() == pytest.approx([row["learning_rate"] for row in logs])


def test_rows_do_not_depend_on_how_often_is_logged(out):
    often = train(OPEFOTrainer, OPEFOConfig, out / "often", max_steps=5).curves.to_pandas()
    seldom = train(OPEFOTrainer, OPEFOConfig, out / "seldom", max_steps=5, logging_steps=4).curves.to_pandas()
    clock = ["time", "step_time"]
    pd.testing.assert_frame_equal(often.drop(columns=clock), seldom.drop(columns=clock))


def test_rows_are_of_optimizer_steps_however_many_micro_batches_make_one(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=3, gradient_accumulation_steps=2)
    assert trainer.curves.to_pandas()["step"].tolist() == [1, 2, 3]


def test_an_evaluation_stands_in_the_row_of_its_step(out):
    trainer = build(
        OPEFOTrainer, OPEFOConfig, out, max_steps=4, eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=8, extra={"eval_dataset": tiny_dataset(1)},
    )  # fmt: skip
    trainer.train()
    known = EntropyCurves.load(out).to_pandas()["eval_reward"].notna().tolist()
    assert known == [False, True, False, True]


def test_an_evaluation_that_knows_nothing_is_not_the_end(out):
    def judged(completions, **_):
        return [None] * len(completions)

    trainer = build(
        OPEFOTrainer, OPEFOConfig, out, max_steps=1, per_device_eval_batch_size=8,
        extra={"eval_dataset": tiny_dataset(1), "reward_funcs": [digit_reward, judged]},
    )  # fmt: skip
    trainer.train()
    scores = trainer.evaluate()
    assert scores["eval_rewards/judged/mean"] is None
    assert "eval_reward" in EntropyCurves.load(out).to_pandas()
    assert "reward 0." in sentence_of(scores) and "reward -" in sentence_of({"eval_reward": None})


def test_a_second_run_knows_nothing_of_the_first(out):
    trainer = build(OPEFOTrainer, OPEFOConfig, out, max_steps=3, logging_steps=1000)
    trainer._metrics["train"]["reward"] += [100.0, 100.0]  # as an interrupted run leaves them
    trainer.train()
    assert trainer.curves.to_pandas()["reward"].max() <= 1


def test_a_finished_run_that_is_resumed_takes_no_step(out):
    overrides = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(OPEFOTrainer, OPEFOConfig, out, **overrides)
    trainer = build(OPEFOTrainer, OPEFOConfig, out, model=tiny_model(seed=9), **overrides)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert trainer.state.global_step == 4
    assert EntropyCurves.load(out).to_pandas()["step"].tolist() == [1, 2, 3, 4]
    saved = load_file(out / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items() if name in saved)


def test_settings_say_what_the_run_was(out):
    train(OPEFOTrainer, OPEFOConfig, out, flow_target="0.4x")
    settings = EntropyCurves.load(out).settings
    assert settings["control"] == "opefo" and settings["flow_target"] == "0.4x" and settings["seed"] == 3
    assert "flow_lambda_max" not in settings  # a target is bounded by 1 only


def test_no_curves_where_none_are_wanted(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, entropy_curves=False, save_strategy="steps", save_steps=1)
    assert trainer.curves is None
    assert not {CURVES_FILE, PICTURE_FILE, REPORT_FILE} & {path.name for path in out.rglob("*")}


def test_a_save_draws_and_keeps_a_copy(out):
    train(OPEFOTrainer, OPEFOConfig, out, max_steps=3, save_strategy="steps", save_steps=2)
    assert EntropyCurves.load(out / "checkpoint-2").to_pandas()["step"].tolist() == [1, 2]
    assert (out / PICTURE_FILE).exists() and (out / REPORT_FILE).exists()
    assert f"]({PICTURE_FILE})" in (out / "README.md").read_text()


def test_what_was_measured_survives_an_error(out):
    def reward(completions, trainer_state, **_):
        if trainer_state.global_step == 3:
            raise RuntimeError
        return digit_reward(completions)

    trainer = build(OPEFOTrainer, OPEFOConfig, out, max_steps=9, extra={"reward_funcs": reward})
    with pytest.raises(RuntimeError):
        trainer.train()
    assert EntropyCurves.load(out).to_pandas()["step"].tolist() == [1, 2, 3]


def test_a_disk_that_is_full_costs_the_picture_and_not_the_run(out, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opefo_trl.curves.record.pq.write_table", full)
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2)
    assert trainer.state.global_step == 2
    assert "could not be written" in caplog.text


def test_counts_of_answers_reach_the_log(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2)
    for row in trainer.state.log_history[:2]:
        assert 0 <= row["answers/distinct"] <= 4 and 0 <= row["answers/solved"] <= 1


# ---- samples


def test_samples_are_of_the_first_step_the_last_and_some_between():
    assert sample_steps(300) == {1, 61, 121, 180, 240, 300}
    assert sample_steps(1) == {1}


def test_samples_are_the_extremes_of_all_micro_batches(out):
    trainer = train(
        OPEFOTrainer, OPEFOConfig, out, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=8
    )
    samples = [sample["advantage"] for sample in trainer.curves.samples]
    assert len(samples) == 2 * ROWS
    assert max(samples) == pytest.approx(max(trainer._logs["advantages"])) and samples == sorted(samples, reverse=True)
    assert min(samples) == pytest.approx(min(trainer._logs["advantages"]))


def test_a_sample_is_what_the_policy_wrote(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2)
    samples = trainer.curves.samples
    assert {sample["step"] for sample in samples} == {1, 2} and len(samples) == 16
    for sample in samples:
        text = "".join(sample["tokens"]).replace("<pad>", "").removesuffix("<eos>")
        assert sample["reward"] == pytest.approx(digit_reward([text])[0])
        assert len(sample["tokens"]) == len(sample["flow"]) == len(sample["entropy"]) == sample["length"]
        assert all(0 < probability <= 1 for probability in sample["probability"])
    net = sum(sum(sample["flow"]) for sample in samples[:8])
    tokens = sum(sample["length"] for sample in samples[:8])
    assert net / tokens == pytest.approx(trainer.curves.to_pandas()["flow/net"][0], rel=1e-3)


# ---- the file


def test_the_file_is_written_now_and_then_and_whole_at_the_end(tmp_path):
    recorder = CurveRecorder(tmp_path, {})
    for row in rows(range(1, 101)):
        recorder.append(row)
    assert 1 <= len(EntropyCurves.load(tmp_path).to_pandas()) < 100
    recorder.write()
    assert EntropyCurves.load(tmp_path).to_pandas()["step"].tolist() == list(range(1, 101))
    assert not list(tmp_path.glob("*.part"))


def test_a_torn_write_leaves_the_file_before_it(tmp_path, monkeypatch):
    recorder = recorded(tmp_path, [1, 2])

    def torn(table, path):
        path.write_bytes(b"PAR1 and no more")
        raise KeyboardInterrupt

    monkeypatch.setattr("opefo_trl.curves.record.pq.write_table", torn)
    recorder.rows += rows([3])
    with pytest.raises(KeyboardInterrupt):
        recorder.write()
    assert EntropyCurves.load(tmp_path).to_pandas()["step"].tolist() == [1, 2]


def test_a_resumed_record_goes_on_behind_its_checkpoint(tmp_path):
    first = recorded(tmp_path, range(1, 8))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    first.rows = first.rows[:4]
    first.save(tmp_path / "checkpoint-4")
    again = CurveRecorder(tmp_path, {})
    assert again.restore(tmp_path / "checkpoint-4", 4) is None
    for row in rows(range(5, 10)):
        again.append(row)
    again.write()
    assert EntropyCurves.load(tmp_path).to_pandas()["step"].tolist() == list(range(1, 10))


def test_a_checkpoint_without_curves_takes_those_of_the_folder(tmp_path):
    recorded(tmp_path, range(1, 8))
    (tmp_path / "checkpoint-4").mkdir()
    again = CurveRecorder(tmp_path, {})
    assert again.restore(tmp_path / "checkpoint-4", 4) is None
    assert [row["step"] for row in again.rows] == [1, 2, 3, 4]


def test_a_damaged_copy_does_not_stop_a_resume(tmp_path):
    recorded(tmp_path, range(1, 8))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / CURVES_FILE).write_bytes(b"PAR1 and no more")
    again = CurveRecorder(tmp_path, {})
    assert again.restore(tmp_path / "checkpoint-4", 4) is None and len(again.rows) == 4


def test_steps_that_are_gone_are_missed_aloud(tmp_path):
    assert "4 of the 4 steps" in CurveRecorder(tmp_path, {}).restore(tmp_path / "checkpoint-4", 4)


def test_a_metric_that_comes_late_is_unknown_before(tmp_path):
    recorder = recorded(tmp_path, [1, 2])
    recorder.append({"step": 3, "late": 7.0})
    recorder.write()
    late = EntropyCurves.load(tmp_path).to_pandas()["late"]
    assert late.isna().tolist() == [True, True, False] and late[2] == 7.0


# ---- reading


def test_load_takes_a_folder_or_a_file_and_names_the_run(tmp_path):
    recorded(tmp_path / "run-a", [1, 2], control="none")
    for path in (tmp_path / "run-a", str(tmp_path / "run-a" / CURVES_FILE)):
        curves = EntropyCurves.load(path)
        assert curves.name == "run-a" and curves.settings == {"control": "none"} and len(curves.to_pandas()) == 2


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no entropy curves at .*nowhere"):
        EntropyCurves.load(tmp_path / "nowhere")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        EntropyCurves.load(tmp_path / "text.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no `step` column"):
        EntropyCurves.load(tmp_path / "other.parquet")


def full_frame(steps=40, shift=0.0):
    step = np.arange(1, steps + 1)
    return pd.DataFrame(
        {"step": step, "entropy": np.exp(-step / 20) + shift, "reward": 1 - np.exp(-step / 10), "flow/increase": 0.1,
         "flow/decrease": 0.2, "flow/lambda": 0.1, "flow/lambda_star": 0.3}
    )  # fmt: skip


def test_a_picture_shows_four_panels_with_names_and_units(tmp_path):
    figure = EntropyCurves(full_frame()).plot(tmp_path / "new" / "curves.png")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Entropy of the policy", "Entropy flow", "Lambda", "Reward"]
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert matplotlib.image.imread(tmp_path / "new" / "curves.png").std() > 0.05  # not an empty page
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_smoothing_is_a_moving_mean():
    frame = full_frame()
    strong = EntropyCurves(frame).plot(smooth=5).axes[0].lines[-1].get_ydata()
    assert strong[10] == pytest.approx(frame["entropy"][8:13].mean())
    assert EntropyCurves(frame).plot(smooth=1).axes[0].lines[-1].get_ydata()[10] == frame["entropy"][10]


def test_several_runs_are_told_apart(tmp_path):
    runs = [EntropyCurves(full_frame(), "a"), EntropyCurves(full_frame(20, 1.0), "b")]
    figure = EntropyCurves.compare(runs, tmp_path / "both.png", labels=["GRPO", "OPEFO"])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["GRPO", "OPEFO"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    with pytest.raises(ValueError, match="1 labels for 2 runs"):
        EntropyCurves.compare(runs, labels=["one"])
    with pytest.raises(ValueError, match="no run"):
        draw([])
    with pytest.raises(ValueError, match="smooth=0"):
        runs[0].plot(smooth=0)


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    EntropyCurves(full_frame(1)).plot(tmp_path / "one.png")


# ---- the page


def test_the_page_holds_the_numbers_and_no_completion_can_break_it(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    sample = {"step": 1, "prompt": hostile, "reward": 1.0, "advantage": float("nan"), "length": 1,
              "tokens": [hostile], "flow": [0.1], "entropy": [0.2], "probability": [0.3]}  # fmt: skip
    write_report(tmp_path / "report.html", [EntropyCurves(full_frame(), "run", {"control": "none"}, [sample])])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 2
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["runs"][0]["columns"]["flow/lambda"] == [0.1] * 40
    assert data["samples"][0]["tokens"] == [hostile] and data["samples"][0]["advantage"] is None


def test_a_long_run_is_thinned(tmp_path):
    write_report(tmp_path / "report.html", [EntropyCurves(full_frame(9001))])
    data = json.loads((tmp_path / "report.html").read_text().split('id="data">')[1].split("</script>")[0])
    steps = data["runs"][0]["steps"]
    assert len(steps) == 1801 and steps[0] == 3  # means of 1 to 5, 6 to 10, ...


def test_the_command_draws_runs_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    recorded(tmp_path / "a", [1, 2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["curves", "a", "a", "--labels", "x", "y", "--html", "page.html"])
    main()
    assert "x" in (tmp_path / "page.html").read_text() and not (tmp_path / PICTURE_FILE).exists()
    monkeypatch.setattr("sys.argv", ["curves", "a"])
    main()
    assert (tmp_path / PICTURE_FILE).exists() and (tmp_path / REPORT_FILE).exists()
    monkeypatch.setattr("sys.argv", ["curves", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: There are no entropy curves at 'nowhere'" in capsys.readouterr().err
