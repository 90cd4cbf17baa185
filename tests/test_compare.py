"""benchmarks/compare_controls.py: a small grid from end to end, resumed, and its numbers by hand."""

import math
import sys

import pandas as pd
import pytest
from scripts import load_script

from opefo_trl.controls import CONTROLS

compare = load_script("benchmarks/compare_controls.py")


def test_every_control_is_compared():
    settings = compare.settings(0.4)
    assert {setting.control for setting in settings.values()} == set(CONTROLS)
    for name, setting in settings.items():
        acts = CONTROLS[setting.control].acts_on_policy
        assert acts != (setting.updates > 1) or name in ("none, 4 updates", "opefo, target, 4 updates"), name
    groups = compare.groups(settings)
    assert set(groups["tracking"]) | set(groups["controls"]) == set(groups["all"]) == set(settings)
    assert set(compare.COMPARED) <= set(groups["controls"]) and set(groups["reduced"]) <= set(settings)


@pytest.mark.slow
def test_a_small_grid_is_run_once_and_written_out(tmp_path, monkeypatch, capsys):
    names = ["none", "opefo, target", "dcpo, 4 updates", "none, 4 updates"]
    grid = ["--settings", *names, "--seeds", "0", "--steps", "2"]
    small = ["--", "--per_device_train_batch_size", "16", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["compare", *grid, "--jobs", "1", "--folder", str(tmp_path / "out"), *small])
    for outcome in (": done;", ": was done;"):
        compare.main()
        said = capsys.readouterr().out
        assert said.count(outcome) == 4 and "[  4/4] none, 4 updates, seed 0" in said
    table = (tmp_path / "out" / "controls.md").read_text()
    assert table in said and "| dcpo, 4 updates | " in table and "--seeds 0 --steps 2" in table
    rows = pd.read_parquet(tmp_path / "out" / "controls.parquet").set_index("setting")
    assert rows.loc["none", "step"] == rows.loc["none, 4 updates", "step"] == 1
    assert rows[["avg16", "pass16", "distinct", "calibration", "entropy"]].notna().all(axis=None)
    assert (rows["pass16"] >= rows["avg16"]).all() and rows["distinct"].between(0, 64).all()
    curves = pd.read_parquet(tmp_path / "out" / "curves.parquet")
    assert curves.groupby("setting")["step"].max()[names].tolist() == [2, 2, 4, 4]
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("curves.png", "plane.png"))


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    compare.check_same(tmp_path / "none" / "0", ["--max_steps", "3"])
    compare.check_same(tmp_path / "none" / "0", ["--max_steps", "3"])
    with pytest.raises(SystemExit, match=r"other settings .*--folder"):
        compare.check_same(tmp_path / "none" / "0", ["--max_steps", "4"])


def test_several_updates_are_of_the_same_rollout(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", "--", "--gradient_accumulation_steps", "8"])
    options = compare.parse()
    assert options.more == ["--gradient_accumulation_steps", "8"]
    assert compare.several(4, options) == {"steps_per_generation": 8, "gradient_accumulation_steps": 2}
    options.more = []  # 256 rows in one micro-batch
    assert compare.several(4, options) == {"steps_per_generation": 4, "per_device_train_batch_size": 64}
    with pytest.raises(SystemExit, match=r"256 rows .*3 updates"):
        compare.several(3, options)


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", "--settings", "opefo, goal"])
    with pytest.raises(SystemExit, match=r"'opefo, goal'.*'none', 'opefo'"):
        compare.main()


def test_the_distance_to_a_target_counts_from_where_it_is_reached():
    settings, frame = compare.settings(0.4), pd.DataFrame({"entropy": [1.0, 0.6, 0.4, 0.5, 0.3]})
    expected = math.sqrt((0 + 0.01 + 0.01) / 3)
    assert compare.off_target(frame, settings["stare"], 0.4) == pytest.approx(expected)
    assert math.isnan(compare.off_target(frame, settings["none"], 0.4))
    frame["flow/target"] = 0.6
    assert compare.off_target(frame, settings["opefo, target"], 0.4) == pytest.approx(
        math.sqrt((0.04 + 0.01 + 0.09) / 4)
    )
    assert math.isnan(compare.off_target(frame.head(1), settings["opefo, target"], 0.4))
