"""The documents agree with the code."""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import pytest
from scripts import load_script
from tiny import train
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.commands import _COMMANDS
from opefo_trl.controls import CONTROLS, control_options, make_control
from opefo_trl.controls.options import RUN_FIELDS
from opefo_trl.data.benchmarks import BENCHMARKS
from opefo_trl.flow import ESTIMATORS
from opefo_trl.grading import POLICIES, Outcome
from opefo_trl.rewards import REWARDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
IN_HELP = {"benchmark_source", "seed", "revision", "trust_remote_code"}  # say it themselves
CONTROLS_PAGE = (ROOT / "docs" / "controls.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()


def first_column(text: str) -> set[str]:
    """Every `name` in the first cell of a table row."""
    return {name for row in re.findall(r"^\| (`[^|]*) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_is_explained_and_every_explained_metric_exists(out):
    theirs = train(GRPOTrainer, GRPOConfig, out).state.log_history
    ours = train(OPEFOTrainer, OPEFOConfig, out, flow_target=0.5, resample_rounds=1).state.log_history
    logged = {key for row in ours for key in row} - {key for row in theirs for key in row}
    text = (ROOT / "docs" / "metrics.md").read_text().split("TRL's metrics that matter here")[0]
    assert first_column(text) - {"control/..."} == logged


def test_every_field_is_listed_with_its_default():
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours = {field.name: field for field in dataclasses.fields(OPEFOConfig) if field.name not in inherited}
    table = (ROOT / "docs" / "python.md").read_text().split("| field | default |")[1].split("\n\n")[0]
    assert first_column(table) == set(ours)
    for name, field in ours.items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        written = f'"{default}"' if isinstance(default, str) else str(default)
        assert f"`{written}`" in next(row for row in table.splitlines() if f"`{name}`" in row.split("|")[1]), name


def control_row(name: str) -> str:
    return next(row for row in CONTROLS_PAGE.splitlines() if row.startswith(f"| `{name}` |"))


def test_every_control_option_and_estimator_is_documented():
    concepts = (ROOT / "docs" / "concepts.md").read_text()
    assert first_column(concepts.split("| `flow_estimator` | d_t |")[1]) == set(ESTIMATORS)
    assert first_column(CONTROLS_PAGE) == set(CONTROLS)
    for name in CONTROLS:
        for option in set(control_options(name)) - set(RUN_FIELDS):
            assert f"`{option}`" in control_row(name), (name, option)


@pytest.mark.parametrize("name", sorted(set(CONTROLS) - {"none", "opefo"}))
def test_the_table_of_controls_and_the_warnings_agree_on_what_is_verified(name):
    cell = control_row(name).split("|")[-2]
    variants = {"steer": {"map": "asymmetric"}, "repo": {"variant": "additive"}}  # with a note of their own
    notes = [CONTROLS[name].source, make_control(name, **variants.get(name, {})).source]
    for status in ("second-hand", "our choice"):
        assert (status in cell) == any(status in (note or "") for note in notes), status
    assert ("verified" in cell) or CONTROLS[name].source is not None


def test_measured_rows_are_those_of_the_comparison():
    table = (ROOT / "benchmarks" / "results" / "controls.md").read_text().split("\n## Differences")[0]
    known = {}
    for row in re.findall(r"^\| (?!\||-)(.+) \|$", table, re.M):
        name, entropy, _, _, reward, avg, _, distinct, calibration, *_ = row.split(" | ")
        known[name] = [entropy, reward, avg, distinct, calibration]
    shown = {}
    for table in CONTROLS_PAGE.split("| measured | end entropy |")[1:]:
        for row in table.split("\n\n")[0].splitlines()[2:]:
            name, *cells = row.strip("| ").split(" | ")
            shown[name] = cells
    assert shown == known


def test_what_pushing_costs_is_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "publishing.json").read_text())
    median = measured["slow"]["ratio"]
    assert f"the median was {median} (`benchmarks/results/publishing.json`)" in (ROOT / "docs" / "log.md").read_text()
    assert median < 1.05 and measured["pairs"] == 8


def test_every_option_of_the_evaluation_and_every_reward_is_documented():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    fields = {field.name for field in dataclasses.fields(load_script("eval.py").EvalArguments)}
    table = text.split("| option | default |")[1].split("\n\n")[0]
    assert {name.removeprefix("--") for name in first_column(table)} | IN_HELP == fields
    assert first_column(text.split("| name | reward |")[1].split("\n\n")[0]) == set(REWARDS)
    assert all(f"`{name}`" in text for name in (*BENCHMARKS, *POLICIES, *Outcome))


@pytest.mark.parametrize("page", ["README.md", "docs/controls.md", "docs/evaluation.md", "docs/python.md"])
def test_python_in_the_documents_compiles(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        compile(block, page, "exec")


def test_the_configuration_in_the_readme_is_right():
    call = re.search(r"args = (OPEFOConfig\(.*?\n\))", README, re.S)[1]
    args = eval(call.replace("OPEFOConfig(", "OPEFOConfig(use_cpu=True, bf16=False, report_to='none', "))
    assert args.control == "opefo" and args.updates_per_rollout == 1


def test_the_links_in_the_documents_resolve():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_have_one_spelling_and_name_what_exists():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    for page in pages:
        text = page.read_text()
        if page.name != "log.md":  # says what was typed then
            assert re.findall(r"python (?:-m opefo_trl|train\.py|eval\.py)", text) == [], page.name
        assert set(re.findall(r"opefo-trl ([a-z]+)", text)) <= set(_COMMANDS), page.name
        for command in re.findall(r"opefo-trl train .*", text):
            for option, folder in (("config", "configs"), ("accelerate_config", "configs/accelerate")):
                for name in re.findall(rf"--{option} ([a-z][\w.-]*)", command):
                    assert (ROOT / folder / f"{name}.yaml").exists(), f"{page.name}: {name}"


def test_the_numbers_of_the_training_phase_are_those_of_its_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = load_script("benchmarks/training_phase.py")
    results = json.loads((ROOT / "benchmarks" / "results" / "training_phase.json").read_text())["results"]
    assert len(results) == len(benchmark.PROFILES)
    for row, least in zip(results, (0.97, 1.7, 2.5, 3.9), strict=True):
        assert benchmark.line(row) in PERFORMANCE and row["ratio"] >= least
        theirs, ours = row["peak_mib"]
        assert ours <= 1.002 * theirs and row["gradient"] < 1e-5 and row["padded"][1] <= 1.1


def test_the_numbers_of_the_quickstart_are_those_of_its_benchmark():
    benchmark = load_script("benchmarks/quickstart.py")
    results = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.table(results) in README
    assert len(results["opefo"]) == 10
    ratios = []
    for seed, ours in results["opefo"].items():
        plain = results["none"][seed]
        ratios.append(ours["held_out_distinct"] / plain["held_out_distinct"])
        assert ours["entropy"] >= plain["entropy"] + 0.2
        assert min(ours["reward"], ours["held_out_reward"]) >= 0.8
        assert ours["at_bound"] <= 5 and ours["furthest"] <= 0.08
    assert f"some four times as many ({min(ratios):.1f} to {max(ratios):.1f} times over ten seeds)" in README
    assert 4 <= statistics.median(ratios) <= 5
    assert statistics.median(plain["entropy"] for plain in results["none"].values()) < 0.15
