"""Scores of samples, results on disk, and comparisons."""

import json

import pandas as pd
import pytest
from eval_script import refusal, run, samples

from opefo_trl.evaluation.results import compare, pass_ks, read_results, report, score


def test_scores_are_those_of_the_samples(whole):
    results = read_results(whole)
    scores, frame = results["benchmarks"]["playground"], samples(whole)
    right = frame.assign(right=frame["outcome"] == "correct").groupby("id", sort=False)["right"].mean()
    assert scores["avg"] == pytest.approx(right.mean()) and scores["by_problem"] == pytest.approx(right.to_dict())
    assert scores["k"] == 4 and list(scores["pass"]) == ["1", "2", "4"]
    assert scores["pass"]["4"] == pytest.approx((right > 0).mean()) and scores["pass"]["1"] == scores["avg"]
    assert [pass_ks(k) for k in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]
    assert scores["interval"][0] < scores["avg"] < scores["interval"][1]
    assert scores["entropy"] == pytest.approx(-frame["logp"].sum() / frame["tokens"].sum())
    assert sum(scores["outcomes"].values()) == 144 and 0 < scores["calibration"] < 1
    settings = results["settings"]
    assert settings["engine"].startswith("transformers ") and settings["grader"] is None
    assert not {"policy", "prompt_template"} & set(settings)  # the task has a prompt and a judge of its own
    header, rule, row = (whole / "results.md").read_text().splitlines()[:3]
    assert row.startswith("| Playground | 36 | 4 |") and rule == "|" + "---|" * (header.count("|") - 1)


def frame_of(outcomes):
    """Two problems of as many samples, all of one token."""
    size = len(outcomes) // 2
    return pd.DataFrame(
        {"id": ["a"] * size + ["b"] * size, "outcome": outcomes, "answer": "1 2", "truncated": False, "tokens": 1}
    ).assign(logp=-0.5)


def test_what_is_not_correct_counts_as_not_right():
    scores = score(frame_of(["correct", "timeout", "error", "no_answer"]), "x")
    assert scores["avg"] == 0.25 and scores["by_problem"] == {"a": 0.5, "b": 0.0}
    assert scores["outcomes"] == {"correct": 1, "wrong": 0, "no_answer": 1, "timeout": 1, "error": 1}
    empty = score(frame_of(["wrong"] * 2).assign(tokens=0), "x")
    assert empty["entropy"] is None and empty["calibration"] is None


def result(values, **settings):
    benchmark = score(frame_of(["correct"] * 2), "AMC 2023") | {"by_problem": values}
    return {"model": "m", "settings": settings, "benchmarks": {"amc23": benchmark}}


def test_a_comparison_is_of_the_problems_that_both_have_and_names_other_settings():
    before = result({"a": 0.0, "b": 0.5, "c": 1.0}, seed=0, tasks={"amc23": {"k": 1}}, model="x")
    after = result({"b": 1.0, "c": 1.0, "d": 0.0}, seed=1, tasks={"amc23": {"k": 2}}, model="y")
    (row,), differences = compare(before, after)
    assert row[:5] == ["AMC 2023", "2", "75.0%", "100.0%", "+25.0"]
    assert differences == ["amc23 k: 1 before, 2 after", "seed: 0 before, 1 after"]
    (row,), differences = compare(before, before)
    assert row[4:] == ["+0.0", "+0.0 to +0.0", "1.000"] and differences == []


def test_a_report_keeps_other_benchmarks_and_has_the_comparison(tmp_path, capsys):
    first, second = result({"a": 0.0}), result({"a": 1.0})
    report(tmp_path, {"model": "m"}, {"math500": first["benchmarks"]["amc23"]}, None)
    report(tmp_path, {"model": "m"}, second["benchmarks"], first)
    assert list(read_results(tmp_path)["benchmarks"]) == ["math500", "amc23"]
    table = (tmp_path / "results.md").read_text()
    assert "| mean |" in table and "+100.0" in table and "+100.0" in capsys.readouterr().out


def test_a_comparison_with_the_script(whole, tmp_path):
    done = run(tmp_path / "other", "--seed", "1", "--compare", str(whole))
    assert "compared with playground" in done.stdout and "seed: 0 before, 1 after" in done.stdout
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"benchmarks": {"aime24": {"by_problem": {"a": 1.0}}}}))
    message = refusal(tmp_path / "out", "--compare", str(other))  # before anything is sampled
    assert "aime24" in message and "playground" in message and not (tmp_path / "out").exists()


def test_a_file_that_holds_no_results_is_named(tmp_path):
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[]")
    for name in ("nowhere.json", "text.json", "list.json"):
        with pytest.raises(ValueError, match=name):
            read_results(tmp_path / name)
