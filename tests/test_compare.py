"""benchmarks/compare_controls.py: its settings and groups, and a small grid from end to end, killed and resumed."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparison.jobs import append_row, check_same, read_rows
from comparison.measures import weights_hash
from comparison.runs import discard_other_run
from comparison.settings import (
    MAIN_SEEDS,
    OTHER_SEEDS,
    PASS_RATES,
    fields_of,
    groups,
    parse_words,
    read_config,
    settings,
    several,
    words_of,
)
from scripts import ROOT, load_script, python

from opefo_trl import OPEFOConfig
from opefo_trl.controls import CONTROLS, make_control

compare = load_script("benchmarks/compare_controls.py")
SETTINGS = settings(0.4)
GROUPS = groups(SETTINGS, 0.4)
CONFIG = ROOT / "configs" / "quickstart.yaml"


def options(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, words)])
    return compare.parse()


def jobs(monkeypatch, *words):
    chosen = options(monkeypatch, *words)
    return compare.plan(SETTINGS, compare.seeds_of(SETTINGS, chosen), chosen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps -5", "`steps=-5`"),
        ("--jobs 0", "`jobs=0`"),
        ("--target nan", "`target=nan`"),
        ("--config quickstrat", "'quickstart'"),
        ("--results benchmarks", "is a folder"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        options(monkeypatch, *words.split())
    assert message in capsys.readouterr().err


def test_runs_away_from_the_main_points_are_drawn_too(monkeypatch, tmp_path):
    chosen = options(monkeypatch, "--target", 0.5, "--folder", tmp_path / "figures")
    results = shutil.copy(ROOT / "benchmarks" / "results" / "half_rate.jsonl", tmp_path)
    names = ("opefo, target at rate x0.5", "none at rate x0.5")
    compare.write({name: settings(0.5)[name] for name in names}, Path(results), chosen)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"half_rate.png", "half_rate_plane.png"}


# ---- settings


def test_every_control_is_compared():
    assert {setting.control for setting in SETTINGS.values()} == set(CONTROLS)
    for name, setting in SETTINGS.items():
        acts = CONTROLS[setting.control].acts_on_policy
        assert acts != (setting.updates > 1) or name in ("none, 4 updates", "opefo, target, 4 updates"), name
        plain = SETTINGS[setting.plain]
        assert plain.control == "none" and (plain.updates, plain.rate) == (setting.updates, setting.rate), name
    parts = [set(GROUPS[name]) for name in ("tracking", "controls", "signal")]
    assert set.union(*parts) == set(GROUPS["all"]) == set(SETTINGS)
    assert all(SETTINGS[name].plain in group for group in GROUPS.values() for name in group)


def test_what_holds_a_target_has_ten_seeds_at_the_main_point_and_three_elsewhere():
    for name, seeds in GROUPS["tracking"].items():
        assert seeds == (MAIN_SEEDS if SETTINGS[name].point == "" else OTHER_SEEDS), name
    for point in ("target 0.25", "target 0.6", "rate x0.5", "rate x2"):
        at = [one for name, one in SETTINGS.items() if name in GROUPS["tracking"] and one.point == point]
        assert {"opefo", "adaptive_entropy"} <= {one.control for one in at} and {one.target for one in at} - {None}
    moving = {one.fields.get("flow_schedule") for one in SETTINGS.values() if one.point == "moving"}
    assert {"increase_decrease", "decrease_increase_decrease", "oscillating"} <= moving


@pytest.mark.parametrize("name", SETTINGS)
def test_the_options_of_a_setting_are_right(name):
    setting = SETTINGS[name]
    make_control(setting.control, **setting.kwargs)
    assert (setting.point == "moving") == (setting.plain == "none, constant rate")


def test_every_setting_makes_a_configuration(out):
    assert (ROOT / PASS_RATES).is_file()
    for name in GROUPS["signal"]:
        fields = {**read_config(CONFIG), **fields_of(SETTINGS[name], 0, 3, CONFIG)}
        known = {field.name for field in dataclasses.fields(OPEFOConfig)}
        OPEFOConfig(str(out), **{field: value for field, value in fields.items() if field in known - {"output_dir"}})


def test_the_fields_of_a_setting():
    fields = fields_of(SETTINGS["opefo, target at rate x2"], 3, 300, CONFIG, ["--learning_rate", "3e-4"])
    assert fields["learning_rate"] == pytest.approx(6e-4) and (fields["flow_target"], fields["seed"]) == (0.4, 3)
    fields = fields_of(SETTINGS["none, 4 updates"], 0, 300, CONFIG)
    assert (fields["max_steps"], fields["per_device_train_batch_size"]) == (600, 64)
    assert fields["flow_target"] == "none" and not fields["strict_on_policy"]


def test_options_of_train_py_are_read_and_written():
    words = ["--learning_rate=3e-4", "--reward_funcs", "math", "format", "--run_name", "a", "--bf16", "false"]
    fields = parse_words(words)
    assert fields == {"learning_rate": 3e-4, "reward_funcs": ["math", "format"], "run_name": "a", "bf16": False}
    assert words_of(fields)[:2] == ["--learning_rate", "0.0003"]
    assert parse_words(words_of(fields | {"control_kwargs": {"step": 1}})) == fields | {"control_kwargs": {"step": 1}}
    with pytest.raises(SystemExit, match="'3' does not"):
        parse_words(["3"])


def test_several_updates_are_of_the_same_rollout():
    accumulated = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
    assert several(4, accumulated) == {"steps_per_generation": 8, "gradient_accumulation_steps": 2}
    whole = {"per_device_train_batch_size": 256}
    assert several(4, whole) == {"steps_per_generation": 4, "per_device_train_batch_size": 64}
    with pytest.raises(SystemExit, match=r"256 rows .*3 updates"):
        several(3, whole)


def test_a_split_run_has_the_same_rollouts():
    fields = fields_of(SETTINGS["none"], 0, 300, CONFIG, split=4)
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (64, 4)
    fields = fields_of(SETTINGS["none, 4 updates"], 0, 300, CONFIG, split=2)
    assert (fields["per_device_train_batch_size"], fields["steps_per_generation"]) == (32, 8)
    assert fields["gradient_accumulation_steps"] == 2  # four updates still
    with pytest.raises(SystemExit, match="256 rows .*--jitter"):
        fields_of(SETTINGS["none"], 0, 300, CONFIG, split=3)


# ---- the plan and the results file


def test_all_runs_are_planned_seed_by_seed_and_those_for_rounding_last(monkeypatch):
    planned = [job.key for job in jobs(monkeypatch, "--settings", "none", "aer", "--seeds", 4, 5, "--jitter", 2)]
    seeds = [("none", 4, 1), ("aer", 4, 1), ("none", 5, 1), ("aer", 5, 1)]
    assert planned == [*seeds, ("none", 4, 2), ("none", 4, 4)]
    assert len({job.out for job in jobs(monkeypatch, "--group", "tracking")}) == sum(GROUPS["tracking"].values())
    with pytest.raises(SystemExit, match="--jitter_settings"):
        jobs(monkeypatch, "--settings", "aer", "--jitter", 1)
    with pytest.raises(SystemExit, match=r"'opefo, goal'.*'none', 'opefo, target'"):
        jobs(monkeypatch, "--settings", "opefo, goal")


def test_a_run_with_changed_options_is_not_written_to_the_committed_file(monkeypatch):
    committed = ROOT / "benchmarks" / "results" / "tracking.jsonl"
    assert compare.results_file(options(monkeypatch, "--group", "tracking", "--seeds", 7)) == committed
    for changed in (["--steps", 5], ["--target", 0.3], ["--settings", "none"], ["--", "--beta", "0.1"]):
        path = compare.results_file(options(monkeypatch, "--folder", "elsewhere", *changed))
        assert str(path) == "elsewhere/runs.jsonl"


def test_runs_of_other_options_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "runs.jsonl"
    (job,) = jobs(monkeypatch, "--settings", "none", "--seeds", 0)
    append_row(path, {"setting": "none", "seed": 0, "split": 1, "fields": job.fields})
    assert "output_dir" not in job.fields and job.fields["held_out"] == "36 questions, 64 samples"
    check_same(path, read_rows(path), [job])
    (longer,) = jobs(monkeypatch, "--settings", "none", "--seeds", 0, "--steps", 400)
    with pytest.raises(SystemExit, match=r"none, seed 0 with max_steps=300 \(now 400\).*--results FILE"):
        check_same(path, read_rows(path), [longer])
    append_row(path, read_rows(path)[0])
    with pytest.raises(SystemExit, match="a run twice"):
        check_same(path, read_rows(path), [job])
    path.write_text('{"setting": "no')
    with pytest.raises(SystemExit, match="line 1, is not JSON"):
        read_rows(path)


def test_an_interrupted_run_of_other_code_begins_anew(monkeypatch, tmp_path, capsys):
    (job,) = jobs(monkeypatch, "--settings", "none", "--seeds", 0, "--folder", tmp_path)
    job.out.mkdir(parents=True)
    discard_other_run(job, {"commit": "a"})
    assert not job.out.exists() and "begins anew" in capsys.readouterr().out  # nothing said what it was
    job.out.mkdir()
    discard_other_run(job, {"commit": "a"})
    assert job.out.exists()
    discard_other_run(job, {"commit": "b"})
    assert not job.out.exists()


# ---- runs


SMALL = "--per_device_train_batch_size 16 --max_completion_length 6".split()  # noqa: SIM905


@pytest.mark.slow
def test_runs_in_one_worker_have_the_bits_of_train_py_and_are_done_once(tmp_path, monkeypatch, capsys):
    grid = ["--settings", "none", "opefo, target", "--seeds", 0, "--steps", 2, "--target", 3, "--jobs", 1]
    grid += ["--folder", tmp_path]  # and a target above the entropy, so that the control acts at once

    def run(*more):
        options(monkeypatch, *grid, "--", *SMALL, *more)
        compare.main()
        return capsys.readouterr().out

    said, path = run(), tmp_path / "runs.jsonl"
    assert "[  2/2] opefo, target, seed 0" in said and (tmp_path / "runs.md").read_text() in said
    none, opefo = read_rows(path)
    assert len(opefo["entropy"]) == 2 and opefo["target"] == 3 and "target" not in none
    assert 0 <= opefo["avg16"] <= opefo["pass16"] <= 1 and 0 <= opefo["distinct"] <= 64
    assert opefo["made"]["commit"] and "--seeds 0 --steps 2" in opefo["command"]
    assert {path.name for path in (tmp_path / "none").iterdir()} == {"0.log"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("runs.png", "runs_plane.png"))

    assert run().startswith("2 of 2 runs are in ")
    path.write_text(json.dumps(none) + "\n")
    run()  # the other one again, first in its worker
    assert read_rows(path)[1]["weights"] == opefo["weights"] != none["weights"]

    fresh = tmp_path / "fresh"
    words = words_of(fields_of(settings(3.0)["opefo, target"], 0, 2, CONFIG, SMALL))
    python(ROOT / "train.py", "--config", CONFIG, *words, "--output_dir", fresh, OMP_NUM_THREADS="1")
    assert weights_hash(fresh) == opefo["weights"]

    path.unlink()
    with pytest.raises(SystemExit, match="2 runs failed"):
        run("--num_generations", "3")
    assert "divisible by num_generations (3)" in (tmp_path / "none" / "0.log").read_text()


@pytest.mark.slow
def test_a_killed_comparison_ends_its_workers_and_is_continued(tmp_path):
    grid = ["--settings", "none", "--seeds", "0", "--steps", "9", "--jobs", "1", "--folder", str(tmp_path)]
    command = [ROOT / "benchmarks" / "compare_controls.py", *grid, "--", *SMALL, "--save_steps", "3"]
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    while not (tmp_path / "none" / "0" / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert "[  1/1] none, seed 0" in python(*command)
    assert "Resuming from " in (tmp_path / "none" / "0.log").read_text()
    assert len(read_rows(tmp_path / "runs.jsonl")[0]["entropy"]) == 9
