"""train.py as a person runs it: killed and resumed, launched on two processes, given wrong options."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate import Accelerator
from material import BENCH, MATERIAL, read_lines
from scripts import ROOT, load_script, python
from transformers.trainer_callback import TrainerState

from opefo_trl.cli.progress import table_of
from opefo_trl.cli.run_folder import newest_checkpoint
from opefo_trl.curves import EntropyCurves

SMALL = """
    --max_steps 12 --save_steps 3 --per_device_train_batch_size 32 --num_generations 4 --num_generations_eval 4
    --per_device_eval_batch_size 36 --disable_tqdm false
""".split()  # noqa: SIM905


def command(out, *more):
    return [sys.executable, str(ROOT / "train.py"), *SMALL, "--output_dir", str(out), *more]


def run(out, *more):
    return subprocess.run(command(out, *more), capture_output=True, text=True, cwd=out.parent, check=True)


@pytest.mark.slow
def test_the_same_command_resumes_a_killed_run(out):
    out.mkdir()
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=out)
    while newest_checkpoint(out) is None:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # somewhere in a later step
    process.kill()
    process.wait()
    begun = newest_checkpoint(out)

    again = run(out)
    assert str(begun) in again.stdout
    curves = EntropyCurves.load(out).to_pandas()
    assert curves["step"].tolist() == list(range(1, 13))
    assert re.search(r"start\s+end\n(.+ -> .+\n){4}", again.stdout)
    assert re.search(r"Held out, 4 samples for each of 36 prompts: reward \d", again.stdout)
    files = {"entropy_curves.parquet", "entropy_curves.png", "report.html", "README.md", "model.safetensors"}
    assert files <= {path.name for path in out.iterdir()}
    assert all(name in again.stdout for name in files)
    if begun.name != "checkpoint-12":
        assert re.search(r"12/12 .*reward=\d\.\d+, entropy=\d\.\d+, lambda=", again.stderr)

    done = run(out)  # nothing is left to train
    assert table_of(curves) in done.stdout
    held_out = [re.search(r"Held out.*", text)[0] for text in (again.stdout, done.stdout)]
    assert held_out[0] == held_out[1]  # the same samples of the same model
    assert EntropyCurves.load(out).to_pandas()["step"].tolist() == list(range(1, 13))


@pytest.mark.slow
def test_accelerate_launches_two_processes(out):
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    machine = ["--config_file", ROOT / "configs" / "accelerate" / "cpu.yaml"]
    words = command(out, "--per_device_train_batch_size", "16", "--max_steps", "3")[1:]
    printed = python(*launch, *machine, *words, cwd=out.parent, OMP_NUM_THREADS="1")
    assert printed.count("Held out") == 1  # by the first rank alone
    curves = EntropyCurves.load(out).to_pandas()
    assert curves["step"].tolist() == [1, 2, 3]
    tokens = curves["completions/mean_length"] * 32  # rows of both ranks
    assert curves["num_tokens"].diff()[1:].gt(tokens[1:]).all()


@pytest.mark.slow
def test_an_adapter_is_trained_and_resumed(out):
    lora = ["--use_peft", "true", "--lora_r", "4", "--max_steps", "2", "--save_steps", "2"]
    first, again = run(out, *lora), run(out, *lora)
    assert (out / "adapter_model.safetensors").exists()
    assert str(out / "checkpoint-2") in again.stdout
    assert first.stdout.split("Held out")[0].strip() in again.stdout


@pytest.fixture(scope="module")
def script():
    return load_script("train.py")


def test_the_playground_needs_no_more_than_its_name(script):
    words = ["--model_name_or_path", "playground", "--dataset_name", "playground"]
    types = (script.ScriptArguments, script.OPEFOConfig, script.ModelConfig)
    arguments, config, _ = script.Parser(types).parse(words, script.QUICKSTART)
    assert arguments.reward_funcs == ["playground"] and config.use_cpu and config.flow_target == 0.5
    assert script.ScriptArguments(dataset_name="playground").reward_funcs == ["playground"]
    assert script.ScriptArguments(reward_funcs="math").reward_funcs == ["math"]


def test_problems_are_kept_by_their_pass_rates_and_the_held_out_ones_are_the_same(script, tmp_path, capsys):
    rows = [{"question": f"{number}+{number}?", "answer": str(2 * number)} for number in range(40)]
    Path(tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rates = {row["question"]: index % 9 / 8 for index, row in enumerate(rows)}
    lines = [{"problem": problem, "pass_rate": rate} for problem, rate in rates.items()]
    Path(tmp_path / "rates.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def load(**options):
        options |= {"dataset_name": str(tmp_path / "train.jsonl"), "prompt_template": "boxed"}
        arguments = script.ScriptArguments(reward_funcs=["math"], eval_prompts=4, **options)
        rewards = [script.find_reward("math", 9)]
        train, test = script.load_data(arguments, SimpleNamespace(process_index=0, seed=0), rewards)
        return [[row[0]["content"].split("\n")[0] for row in part["prompt"]] for part in (train, test)]

    train, test = load()
    kept, same_test = load(pass_rates=str(tmp_path / "rates.jsonl"), keep_pass_rates=[0.125, 0.875])
    assert kept == [problem for problem in train if 0 < rates[problem] < 1] and same_test == test
    assert f"{len(kept)} of 36 problems" in capsys.readouterr().out and 0 < len(kept) < 36
    assert load(pass_rates=str(tmp_path / "rates.jsonl"))[0] == kept  # 0.1 to 0.9 by default


def test_a_problem_of_a_benchmark_is_left_out_and_named(script, tmp_path):
    leaked = read_lines("bench/aime24.jsonl")[0]["problem"]
    rows = [{"question": f"{number}+{number}?", "answer": str(2 * number)} for number in range(9)]
    rows.append({"question": leaked, "answer": "204"})
    Path(tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"prompt_template": "boxed", "decontaminate": ["aime24"], "benchmark_source": str(BENCH)}
    arguments = script.ScriptArguments(str(tmp_path / "train.jsonl"), reward_funcs=["math"], eval_prompts=0, **options)
    args = SimpleNamespace(process_index=0, seed=0, output_dir=str(tmp_path))
    train, _ = script.load_data(arguments, args, [script.find_reward("math", 9)])
    assert len(train) == 9 and not any(leaked in row[0]["content"] for row in train["prompt"])
    assert leaked in json.loads((tmp_path / "decontaminated.json").read_text())["aime24"][0]


def test_processes_wait_for_each_other_before_they_leave(script, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: calls.append("wait"))
    monkeypatch.setattr(Accelerator, "end_training", lambda self: calls.append("end"))
    script.main(["--max_steps", "1", "--eval_prompts", "0", "--output_dir", str(tmp_path)])
    assert calls[-2:] == ["wait", "end"]


def test_a_run_that_is_stopped_by_hand_says_that_it_can_go_on(script, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        script.main(["--output_dir", str(tmp_path)])
    assert stop.value.code == 130 and "Stopped in step 1. The same command resumes." in capsys.readouterr().out


MISTAKES = yaml.safe_load((MATERIAL / "mistakes.yaml").read_text())["train.py"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(mistake, script, tmp_path, monkeypatch, capsys):
    if "--use_vllm" in mistake and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is here")
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("control: opefo\nflow_traget: 0.4\n")
    for step in (2, 4):
        Path(f"done/checkpoint-{step}").mkdir(parents=True)
        TrainerState(global_step=step).save_to_json(f"done/checkpoint-{step}/trainer_state.json")
    Path("sentences.jsonl").write_text('{"question": "1+1=", "answer": "left to the reader, it is easy"}\n')
    Path("questions.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    Path("rates.jsonl").write_text('{"problem": "Make 11", "pass_rate": 0.5}\n')
    monkeypatch.setattr(sys, "argv", ["train.py", *mistake.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("opefo-trl train: error: "))
    assert [word for word in MISTAKES[mistake].split() if word not in line] == []


def test_help_shows_our_fields_with_their_words(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    text = " ".join(capsys.readouterr().out.split())
    for field in ("control", "flow_target", "flow_estimator", "nonfinite", "entropy_curves", "reward_funcs"):
        assert f"--{field}" in text
    for field in fields(script.OPEFOConfig):
        if field.name.startswith("flow_"):
            assert " ".join(field.metadata["help"].split()) in text
