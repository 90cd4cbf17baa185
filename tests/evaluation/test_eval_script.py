"""eval.py as a person runs it: killed and resumed, in two processes, on all six benchmarks, given nonsense."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from eval_script import command, refusal, run, samples
from material import BENCH, MATERIAL
from scripts import load_script, python

from opefo_trl.cli.parser import Parser
from opefo_trl.data.benchmarks import BENCHMARKS, SIX
from opefo_trl.evaluation.results import read_results
from opefo_trl.playground import TASKS, is_right


def batches_until_killed(out: Path, batches: int, *more: str) -> int:
    """Kill the script once it has written two batches of `batches`, and return how many are there."""
    process = subprocess.Popen(command(out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("samples/*/*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = len(list(out.glob("samples/*/*.parquet")))
    assert 2 <= done < batches, "it was done before it could be killed"
    return done


@pytest.mark.slow
def test_killed_the_same_command_resumes_to_the_same_results(whole, tmp_path):
    out = tmp_path / "killed"
    done = batches_until_killed(out, 9)
    again = run(out)
    assert f"{144 - 16 * done}/{144 - 16 * done}" in again.stderr  # only what was left
    assert samples(out).equals(samples(whole))
    assert read_results(out)["benchmarks"] == read_results(whole)["benchmarks"]
    again = run(out)
    assert "sample" not in again.stderr and "Playground" in again.stdout  # nothing left to sample


TRAINING = ("--dataset_name", "playground", "--batch_size", "24")


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """The folder of the playground's pass rates: 54 training problems, 4 samples each, in 9 batches."""
    out = tmp_path_factory.mktemp("pass_rates") / "whole"
    return out, run(out, *TRAINING).stdout


def test_pass_rates_agree_with_a_direct_count(rated):
    out, printed = rated
    rows = list(map(json.loads, (out / "playground-train.jsonl").read_text().splitlines()))
    assert [row["problem"] for row in rows] == [f"Make {target}" for target in TASKS["playground"].splits["train"]]
    completions = samples(out, "playground-train").groupby("id", sort=False)["completion"].apply(list)
    counts = []
    for row, texts in zip(rows, completions, strict=True):
        counts.append(sum(is_right(text.strip(), int(row["problem"].split()[1])) for text in texts))
        assert row["right"] == counts[-1] and row["samples"] == len(texts) == 4
        assert row["pass_rate"] == counts[-1] / 4
    assert len(set(counts)) > 2
    assert f"{counts.count(0)} problems are never solved, {counts.count(4)} always" in printed
    assert f"--pass_rates {out / 'playground-train.jsonl'} --keep_pass_rates 0.1 0.9" in printed
    settings = json.loads((out / "settings.json").read_text())
    assert settings["reward_funcs"] == ["playground"] and settings["prompt_template"] == "none"


@pytest.mark.slow
def test_a_kill_costs_a_batch_of_the_pass_rates_at_most(rated, tmp_path):
    done = batches_until_killed(tmp_path, 9, *TRAINING)
    again = run(tmp_path, *TRAINING)
    assert f"{216 - 24 * done}/{216 - 24 * done}" in again.stderr  # only what was left
    whole, resumed = (folder / "playground-train.jsonl" for folder in (rated[0], tmp_path))
    assert resumed.read_text() == whole.read_text()


def test_a_training_set_is_graded_by_the_reward_of_its_training(long_context, tmp_path, monkeypatch):
    """A dotted path may be any reward; this one reads a column of its own, and calls every sample right but one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("lenient_reward.py").write_text(
        "def judge(completions, wanted, **_):\n    return [float(word != 'never') for word in wanted]\n"
    )
    lines = [{"question": f"{number}+1=", "wanted": "never" if number == 2 else "any"} for number in (1, 2, 2, 3)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--model", str(long_context), "--dataset_name", "train.jsonl", "--reward_funcs", "lenient_reward.judge"]
    run(tmp_path / "own", *words)
    rows = list(map(json.loads, (tmp_path / "own" / "train-train.jsonl").read_text().splitlines()))
    assert [(row["problem"], row["pass_rate"]) for row in rows] == [("1+1=", 1), ("2+1=", 0), ("3+1=", 1)]

    lines = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": "3"}]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run(tmp_path / "math", *words[:4], "--prompt_template", "boxed")
    assert samples(tmp_path / "math", "train-train")["outcome"].unique().tolist() == ["no_answer"]  # none has a box
    assert "2 problems are never solved" in done.stdout


@pytest.mark.slow
def test_two_processes_share_the_batches(whole, tmp_path):
    launch = (
        "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0"
    )
    printed = python("-m", *launch.split(), *command(tmp_path / "two")[1:], cwd=tmp_path)
    assert samples(tmp_path / "two").equals(samples(whole)) and printed.count("Playground") == 1


@pytest.mark.slow
def test_all_six_benchmarks_go_through(long_context, tmp_path):
    words = ["--model", str(long_context), "--benchmarks", *SIX, "--benchmark_source", str(BENCH)]
    done = run(tmp_path, *words, "--max_new_tokens", "6", "--k", "1", "--batch_size", "16")
    results = read_results(tmp_path)["benchmarks"]
    assert list(results) == list(SIX)
    for name, scores in results.items():
        assert scores["problems"] in BENCHMARKS[name].counts and scores["avg"] < 0.1
        assert sum(scores["outcomes"].values()) == scores["problems"] == len(samples(tmp_path, name))
    assert sum(scores["problems"] for scores in results.values()) == 1547
    assert (samples(tmp_path, "aime24")["tokens"] > 0).all()
    assert "OlympiadBench" in done.stdout and "mean" in done.stdout


def test_folders(tmp_path, monkeypatch):
    script = load_script("eval.py")
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    for model, folder in {
        "Qwen/Qwen2.5-0.5B": "out/eval/Qwen--Qwen2.5-0.5B",
        "run": "run/eval",
        "run/checkpoint-7": "run/eval/checkpoint-7",
    }.items():
        assert script.folder_of(script.EvalArguments(model=model)) == Path(folder)
    assert script.folder_of(script.EvalArguments(model="run", output_dir="there")) == Path("there")
    training = script.EvalArguments(model="run", dataset_name="words")
    assert script.folder_of(training) == Path("run/eval/pass_rates") and training.k == 8
    names = script.EvalArguments(benchmarks=["aime24,amc23", "math500", "aime24"]).benchmarks
    assert names == ["aime24", "amc23", "math500"]


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        ([], (0.6, 0.95)),
        (["--preset", "paper"], (1.0, 0.7)),
        (["--preset", "paper", "--temperature", "0.8"], (0.8, 0.7)),  # single options take precedence
        (["--top_p", "1.0"], (0.6, 1.0)),
        (["--dataset_name", "words"], (1.0, 1.0)),
        (["--dataset_name", "words", "--preset", "default"], (0.6, 0.95)),
    ],
)
def test_presets_of_the_sampling(words, sampling):
    script = load_script("eval.py")
    (options,) = Parser((script.EvalArguments,)).parse(["--model", "playground", *words])
    assert (options.temperature, options.top_p) == sampling
    decoding = script.decoding_of(options)
    assert (decoding.temperature, decoding.top_p) == sampling


@pytest.mark.parametrize(
    ("words", "message"), yaml.safe_load((MATERIAL / "mistakes.yaml").read_text())["eval.py"].items()
)
def test_mistakes_are_told_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(tmp_path / "out", *words.split())
    assert [word for word in message.split() if word not in line] == []


def test_without_a_model(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit):
        load_script("eval.py").main()
    assert "--model" in capsys.readouterr().err


def test_other_settings_are_refused(whole):
    assert "temperature=1.0 (now 0.5)" in refusal(whole, "--temperature", "0.5")
    assert "limit=None (now 3)" in refusal(whole, "--limit", "3")
