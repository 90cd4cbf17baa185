"""eval.py as a person runs it: killed and resumed, in two processes, on all six benchmarks, given nonsense."""

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


@pytest.mark.slow
def test_killed_the_same_command_resumes_to_the_same_results(whole, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("samples/playground/*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = len(list(out.glob("samples/playground/*.parquet")))
    assert 2 <= done < 9, "it was done before it could be killed"
    again = run(out)
    assert f"{144 - 16 * done}/{144 - 16 * done}" in again.stderr  # only what was left
    assert samples(out).equals(samples(whole))
    assert read_results(out)["benchmarks"] == read_results(whole)["benchmarks"]
    again = run(out)
    assert "sample" not in again.stderr and "Playground" in again.stdout  # nothing left to sample


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
    names = script.EvalArguments(benchmarks=["aime24,amc23", "math500", "aime24"]).benchmarks
    assert names == ["aime24", "amc23", "math500"]


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        ([], (0.6, 0.95)),
        (["--preset", "paper"], (1.0, 0.7)),
        (["--preset", "paper", "--temperature", "0.8"], (0.8, 0.7)),  # single options take precedence
        (["--top_p", "1.0"], (0.6, 1.0)),
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
    assert message in refusal(tmp_path / "out", *words.split())


def test_without_a_model(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit):
        load_script("eval.py").main()
    assert "--model" in capsys.readouterr().err


def test_other_settings_are_refused(whole):
    assert "temperature=1.0 (now 0.5)" in refusal(whole, "--temperature", "0.5")
    assert "limit=None (now 3)" in refusal(whole, "--limit", "3")
