import pandas as pd
import pytest

from opefo_trl.curves import CurveRecorder, EntropyCurves
from opefo_trl.curves.record import load_runs
from opefo_trl.files import CURVES_FILE, SCORES_FILE


def rows(steps):
    return [{"step": step, "entropy": 1 / step} for step in steps]


def recorded(folder, steps, **settings):
    recorder = CurveRecorder(folder, settings)
    for row in rows(steps):
        recorder.append(row)
    recorder.write()
    return recorder


def steps_of(path):
    return EntropyCurves.load(path).to_pandas()["step"].tolist()


# ---- writing


def test_the_file_is_written_now_and_then_and_whole_at_the_end(tmp_path):
    recorder = CurveRecorder(tmp_path, {})
    for row in rows(range(1, 101)):
        recorder.append(row)
    assert 1 <= len(steps_of(tmp_path)) < 100
    recorder.write()
    assert steps_of(tmp_path) == list(range(1, 101))
    assert not list(tmp_path.glob("*.part"))


def test_a_torn_write_leaves_the_previous_file(tmp_path, monkeypatch):
    recorder = recorded(tmp_path, [1, 2])

    def torn(table, path):
        path.write_bytes(b"PAR1 and no more")
        raise KeyboardInterrupt

    monkeypatch.setattr("opefo_trl.curves.record.pq.write_table", torn)
    recorder.rows += rows([3])
    with pytest.raises(KeyboardInterrupt):
        recorder.write()
    assert steps_of(tmp_path) == [1, 2]


def test_a_resumed_record_continues_after_its_checkpoint(tmp_path):
    first = recorded(tmp_path, range(1, 8))
    (tmp_path / "checkpoint-4").mkdir()
    first.rows = first.rows[:4]
    first.save(tmp_path / "checkpoint-4")
    resumed = CurveRecorder(tmp_path, {})
    assert "1 of the 5 steps" in resumed.restore(tmp_path / "checkpoint-4", 5)  # lost
    assert resumed.restore(tmp_path / "checkpoint-4", 4) is None
    for row in rows(range(5, 10)):
        resumed.append(row)
    resumed.write()
    assert steps_of(tmp_path) == list(range(1, 10))


@pytest.mark.parametrize("content", [None, b"PAR1 and no more"])
def test_without_a_readable_copy_in_the_checkpoint_the_folder_is_read(tmp_path, content):
    recorded(tmp_path, range(1, 8))
    (tmp_path / "checkpoint-4").mkdir()
    if content is not None:
        (tmp_path / "checkpoint-4" / CURVES_FILE).write_bytes(content)
    resumed = CurveRecorder(tmp_path, {})
    assert resumed.restore(tmp_path / "checkpoint-4", 4) is None
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4]


def test_scores_of_the_run_before_are_no_scores_of_a_new_one(tmp_path):
    recorded(tmp_path, [1, 2])
    scores = pd.DataFrame({"step": [2], "eval/words": [0.5]})
    scores.to_parquet(tmp_path / SCORES_FILE)
    assert EntropyCurves.load(tmp_path).frame["eval/words"][1] == 0.5
    resumed = CurveRecorder(tmp_path, {})
    resumed.restore(tmp_path / "checkpoint-2", 2)
    resumed.append({"step": 3})
    assert (tmp_path / SCORES_FILE).exists()  # a resumed run keeps them
    recorded(tmp_path, [1, 2])
    assert "eval/words" not in EntropyCurves.load(tmp_path).frame


def test_a_metric_that_comes_late_is_empty_until_then(tmp_path):
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
    assert [run.name for run in load_runs([tmp_path / "run-a", curves], ["x", "y"])] == ["x", "y"]
    for name in ("run-a", "run-b"):
        recorded(tmp_path / name / "out", [1, 2])
    pair = [str(tmp_path / name / "out") for name in ("run-a", "run-b")]
    assert [run.name for run in load_runs(pair)] == pair  # both are called "out"
    with pytest.raises(ValueError, match="1 labels for 2 runs"):
        load_runs([curves, curves], ["one"])


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*`entropy_curves=False`"):
        EntropyCurves.load(tmp_path / "nowhere")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"text\.parquet is not a parquet file"):
        EntropyCurves.load(tmp_path / "text.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet .*`step`"):
        EntropyCurves.load(tmp_path / "other.parquet")
