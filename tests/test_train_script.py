"""train.py as a person runs it: trained, killed and gone on with, launched twice, given nonsense."""

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import load_script
from transformers.trainer_callback import TrainerState

from opefo_trl.cli.progress import table_of
from opefo_trl.cli.run_folder import newest_checkpoint
from opefo_trl.curves import EntropyCurves

ROOT = Path(__file__).parents[1]
SMALL = """
    --max_steps 12 --save_steps 3 --per_device_train_batch_size 32 --num_generations 4 --num_generations_eval 4
    --per_device_eval_batch_size 36 --disable_tqdm false
""".split()  # noqa: SIM905


def command(out, *more):
    return [sys.executable, str(ROOT / "train.py"), *SMALL, "--output_dir", str(out), *more]


def run(out, *more, **options):
    return subprocess.run(command(out, *more), capture_output=True, text=True, cwd=out.parent, check=True, **options)


def test_killed_at_any_step_the_same_command_goes_on(out):
    out.mkdir()
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=out)
    deadline = time.monotonic() + 120
    while newest_checkpoint(out) is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = newest_checkpoint(out)

    again = run(out)
    assert f"Resuming from {begun}" in again.stdout
    curves = EntropyCurves.load(out).to_pandas()
    assert curves["step"].tolist() == list(range(1, 13))
    assert re.search(r"start\s+end\n(.+ -> .+\n){4}", again.stdout)
    assert re.search(r"Held out, 4 samples for each of 18 prompts: reward \d", again.stdout)
    files = {"entropy_curves.parquet", "entropy_curves.png", "report.html", "README.md", "model.safetensors"}
    assert files <= {path.name for path in out.iterdir()}
    assert all(name in again.stdout for name in files)
    if begun.name != "checkpoint-12":
        assert re.search(r"12/12 .*reward=\d\.\d+, entropy=\d\.\d+, lambda=", again.stderr)

    done = run(out)  # once more: there is nothing left to do
    assert table_of(curves) in done.stdout
    held_out = [re.search(r"Held out.*", text)[0] for text in (again.stdout, done.stdout)]
    assert held_out[0] == held_out[1]  # of the same model, by the same samples
    assert EntropyCurves.load(out).to_pandas()["step"].tolist() == list(range(1, 13))


def test_accelerate_launches_two_processes(out):
    port = str(20000 + os.getpid() % 20000)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port]
    machine = ["--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml")]
    done = subprocess.run(
        [*launch, *machine, *command(out, "--per_device_train_batch_size", "16", "--max_steps", "3")[1:]],
        capture_output=True, text=True, cwd=out.parent, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.count("Held out") == 1  # said once
    curves = EntropyCurves.load(out).to_pandas()
    assert curves["step"].tolist() == [1, 2, 3]
    tokens = curves["completions/mean_length"] * 32  # of both
    assert curves["num_tokens"].diff()[1:].gt(tokens[1:]).all()


def test_an_adapter_is_trained_and_gone_on_with(out):
    lora = ["--use_peft", "true", "--lora_r", "4", "--max_steps", "2", "--save_steps", "2"]
    first, again = run(out, *lora), run(out, *lora)
    assert (out / "adapter_model.safetensors").exists()
    assert f"Resuming from {out / 'checkpoint-2'}" in again.stdout
    assert first.stdout.split("Held out")[0].strip() in again.stdout


def test_the_playground_needs_no_more_than_its_name(script, monkeypatch):
    words = ["--model_name_or_path", "playground", "--dataset_name", "playground"]
    parts = script.Parser((script.ScriptArguments, script.OPEFOConfig, script.ModelConfig)).parse(
        words, script.QUICKSTART
    )
    assert parts[0].reward_funcs == ["playground"] and parts[1].use_cpu and parts[1].flow_target == 0.5
    assert script.ScriptArguments(dataset_name="playground").reward_funcs == ["playground"]
    assert script.ScriptArguments(reward_funcs="math").reward_funcs == ["math"]


# ---- mistakes, in this process


@pytest.fixture(scope="module")
def script():
    return load_script("train.py")


MISTAKES = {
    "--config nowhere.yaml": "'nowhere.yaml'",
    "--config": "--config needs a file",
    "--config=typo.yaml": "'flow_traget' (in typo.yaml). Did you mean 'flow_target'?",
    "--config broken.yaml": "'broken.yaml'",
    "--config text.yaml": "'text.yaml'",
    "--flow_traget 0.4": "'flow_traget' (on the command line). Did you mean 'flow_target'?",
    "stray": "'stray'",
    "--max_steps many": "argument --max_steps/--max-steps: invalid int value: 'many'",
    "--control opfeo": "`control='opfeo'` is unknown. Did you mean 'opefo'?",
    "--steps_per_generation 2": "OPEFO is strictly on-policy",
    "--dataset_name nowhere.jsonl": "`dataset_name='nowhere.jsonl'`",
    "--dataset_name nobody/nothing": "data set 'nobody/nothing'",
    "--dataset_name questions.jsonl --eval_prompts 0": "column 'target'; the data has question, answer",
    "--dataset_name questions.jsonl --prompt_column text": "column 'text'; it has question, answer",
    "--dataset_name sentences.jsonl --reward_funcs math": "1 of 1 rows of the split 'train'",
    "--dataset_name questions.jsonl --reward_funcs math_answer_line --eval_prompts 0": "--prompt_template dapo",
    "--dataset_name questions.jsonl --decontaminate aime23": "`benchmark='aime23'`",
    "--dataset_train_split trian": "`split='trian'`",
    "--eval_prompts -1": "`eval_prompts=-1`",
    "--reward_funcs maths": "`reward_funcs='maths'`",
    "--reward_funcs math": "'math' needs a column 'answer'; the data has prompt, target",
    "--reward_funcs nowhere.exact": "'nowhere.exact'",
    "--prompt_template dots": "`prompt_template='dots'`",
    "--output_dir questions.jsonl/out": "`output_dir='questions.jsonl/out'`",
    "--per_device_eval_batch_size 7": "`per_device_eval_batch_size=7`",
    "--resume_from_checkpoint nowhere": "`resume_from_checkpoint='nowhere'`",
    "--model_name_or_path nobody/nothing --dataset_name playground --reward_funcs playground --use_cpu --bf16 false":
        "model 'nobody/nothing'",
    "--model_name_or_path ./model --use_cpu --bf16 false": "--dataset_name",
    "--model_name_or_path ./model --dataset_name playground --use_cpu --bf16 false": "'./model'",
    "--model_name_or_path ./model --dataset_name playground": "On the CPU: --use_cpu true --bf16 false",
    "--dataset_name holes.jsonl --eval_prompts 0": "1 of 2 rows are empty in column 'prompt'",
    "--dataset_name empty.jsonl": "'empty.jsonl'",
    "--model_name_or_path ./model --dataset_name questions.jsonl --use_cpu --bf16 false": "--reward_funcs",
    "--dataset_name questions.jsonl --reward_funcs math --eval_prompts 0":
        "There are 1 prompts to train on, but a rollout takes 32",
    "--reward_funcs broken.exact": "'broken.exact' cannot be imported: SyntaxError",
    "--resume_from_checkpoint done/checkpoint-2 --output_dir done": "older than checkpoint-4",
    "--resume_from_checkpoint false --output_dir done": "'done' holds checkpoint-4",
    "--use_vllm true": "needs vLLM's CPU build",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(mistake, script, tmp_path, monkeypatch, capsys):
    if "--use_vllm" in mistake and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is here")
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("control: opefo\nflow_traget: 0.4\n")
    Path("broken.yaml").write_text("control: [opefo\n")
    Path("text.yaml").write_text("just text\n")
    Path("holes.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": null}\n')
    Path("empty.jsonl").touch()
    Path("broken.py").write_text("def exact(:\n")
    for step in (2, 4):
        Path(f"done/checkpoint-{step}").mkdir(parents=True)
        TrainerState(global_step=step).save_to_json(f"done/checkpoint-{step}/trainer_state.json")
    Path("sentences.jsonl").write_text('{"question": "1+1=", "answer": "left to the reader, it is easy"}\n')
    Path("questions.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    monkeypatch.setattr(sys, "argv", ["train.py", *mistake.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and MISTAKES[mistake] in lines[0]


def test_a_traceback_can_be_asked_for(script, monkeypatch):
    monkeypatch.setenv("OPEFO_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--control", "opfeo"])
    with pytest.raises(ValueError, match="opfeo"):
        script.main()


def test_help_shows_our_fields_with_their_words():
    shown = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    text = " ".join(shown.split())
    for field in (
        "--control",
        "--flow_target",
        "--flow_estimator",
        "--nonfinite",
        "--entropy_curves",
        "--reward_funcs",
    ):
        assert field in text
    assert "Entropy to hold." in text and "How a token's entropy change is estimated" in text
