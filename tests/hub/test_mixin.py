"""Trainings that push. Whatever the Hub does, the parameters at the end are those of a run that pushes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.curves import EntropyCurves
from opefo_trl.files import CURVES_FILE, PICTURE_FILE, REPORT_FILE
from opefo_trl.hub import NotPushedError
from opefo_trl.hub.__main__ import main
from opefo_trl.hub.outbox import Outbox, files_to_publish
from opefo_trl.playground import MODEL, playground_dataset, playground_reward

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def build(out, peft_config=None, **options):
    options = {"hub_strategy": "all_checkpoints", "save_steps": 2, "max_steps": 4, "push_to_hub": True, **options}
    args = OPEFOConfig(
        str(out / "model"), per_device_train_batch_size=32, num_generations=4, max_completion_length=12,
        learning_rate=1e-3, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    data = playground_dataset()
    return OPEFOTrainer("playground", playground_reward, args, train_dataset=data, peft_config=peft_config)


def trained(*arguments, **options):
    trainer = build(*arguments, **options)
    trainer.train()
    return trainer


def calling(event, function):
    """Return a callback that gives the step of an event to a function."""
    callback = TrainerCallback()
    setattr(callback, event, lambda args, state, control, **_: function(state.global_step))
    return callback


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    trainer = trained(tmp_path_factory.mktemp("plain"), push_to_hub=False)
    assert trainer.publisher is None
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(trainer, plain):
    return all(torch.equal(value, plain[name]) for name, value in trainer.model.state_dict().items())


def check_everything(hub, out, strategy="all_checkpoints"):
    pushed = hub.files("alice/model")
    expected = files_to_publish(out / "model", checkpoints(out / "model"), strategy)
    assert {"model.safetensors", "config.json", "README.md", CURVES_FILE, PICTURE_FILE, REPORT_FILE} <= expected.keys()
    for path in expected.keys() - {"README.md"}:  # which the upload writes into
        assert pushed[path] == expected[path].read_bytes(), path
    assert Outbox(out / "model").waiting() == []


def test_a_run_is_on_the_hub_with_the_checkpoints_that_it_deleted(hub, out, plain):
    saved = {}

    def after_save(step):
        folder = f"checkpoint-{step}"
        paths = (f"{folder}/model.safetensors", f"{folder}/optimizer.pt", CURVES_FILE)
        saved[step] = {path: (out / "model" / path).read_bytes() for path in paths}
        saved[step]["model.safetensors"] = saved[step][f"{folder}/model.safetensors"]

    trainer = build(out, save_total_limit=1)
    trainer.add_callback(calling("on_save", after_save))
    trainer.train()
    commit = trainer.push_to_hub()
    assert same(trainer, plain)
    commits = {commit.message: commit.files for commit in hub.commits("alice/model")}
    for step in (2, 4):
        pushed = commits[f"Training in progress, step {step}"]
        assert saved[step] == {path: pushed[path] for path in saved[step]}
    assert not (out / "model" / "checkpoint-2").exists()
    check_everything(hub, out)
    assert "checkpoint-2/optimizer.pt" in hub.files("alice/model")
    assert hub.commits("alice/model")[-1].oid == commit.oid and "NOT" not in trainer.publisher.report()

    card = ModelCard(hub.files("alice/model")["README.md"].decode())
    assert {"opefo", "trl", "grpo"} <= set(card.data.tags) and 'model="alice/model"' in card.text
    assert f"]({PICTURE_FILE})" in card.text and str(out) not in card.text.split("### Reproduce it")[0]
    trainer.create_model_card()
    assert trainer.hub_model_id == "alice/model"
    loaded = EntropyCurves.load("alice/model").frame.to_json(double_precision=15)
    assert json.loads(loaded) == json.loads(trainer.curves.frame.to_json(double_precision=15))


def test_a_hub_that_is_down_and_then_slow_holds_no_run_up(hub, out, plain):
    hub.latency = 0.2
    hub.down()
    trainer, pushed = build(out), []
    steps = {1: trainer.save_model, 3: lambda: pushed.append(trainer.push_to_hub()) or hub.up()}
    trainer.add_callback(calling("on_step_end", lambda step: steps.get(step, lambda: None)()))
    trainer.train()
    assert same(trainer, plain) and trainer.publisher.missing() and pushed == [None]
    hub.down()
    with pytest.raises(NotPushedError, match="End of training"):
        trainer.push_to_hub()
    hub.latency = 0.0
    hub.up()
    assert trainer.push_to_hub(blocking=False).result().oid == hub.commits("alice/model")[-1].oid
    check_everything(hub, out)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_strategies(hub, out, strategy):
    trained(out, hub_strategy=strategy, hub_always_push=True, hub_private_repo=True).push_to_hub()
    messages = [commit.message for commit in hub.commits("alice/model")]
    steps = [] if strategy == "end" else [f"Training in progress, step {step}" for step in (2, 4)]
    assert messages[:2] == (steps or ["End of training"]) and hub.repos["alice/model"].private
    check_everything(hub, out, strategy)
    assert ("last-checkpoint/optimizer.pt" in hub.files("alice/model")) == (strategy == "checkpoint")


def test_an_adapter_keeps_its_card_and_a_broken_one_costs_no_run(out, caplog):
    trainer = trained(out, LoraConfig(r=2), push_to_hub=False, max_steps=2)
    trainer.create_model_card()
    trainer.save_model()  # PEFT writes a card of its own
    card = ModelCard.load(out / "model" / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "apache-2.0" and card.data.base_model is None
    assert card.text.count("## Training") == 1
    assert "More Information Needed" not in card.text and str(MODEL) not in str(card)
    assert AutoModelForCausalLM.from_pretrained(out / "model") is not None  # as the card says, with peft
    (out / "model" / "README.md").write_text("---\n- not a map\n---\n")
    trainer.create_model_card()
    assert "The model card could not be written" in caplog.text and "metadata" in caplog.text


def test_a_name_that_is_none_of_a_repository_is_told_at_once(out):
    with pytest.raises(ValueError, match="hub_model_id.*a/b/c"):
        build(out, hub_model_id="a/b/c")


# ---- whole scripts


def script(out, *more):
    options = f"""--max_steps 6 --save_steps 2 --per_device_train_batch_size 32 --num_generations 4 --eval_prompts 0
        --push_to_hub --hub_strategy all_checkpoints --output_dir {out / "model"}""".split()
    return [sys.executable, str(ROOT / "train.py"), *options, *more]


def test_a_run_that_is_killed_loses_no_save(hub, out, tmp_path):
    fault = hub.fault("lfs", hang=200)
    out.mkdir()
    process = subprocess.Popen(script(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=out)
    assert fault.begun.wait(timeout=200)
    process.kill()
    process.wait()
    assert Outbox(out / "model").waiting()
    done = subprocess.run(script(out), capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resuming from" in done.stdout and "Pushed: http" in done.stdout
    files = hub.files("alice/model")
    assert {f"checkpoint-{step}/model.safetensors" for step in (2, 4, 6)} <= files.keys()
    for checkpoint in checkpoints(out / "model"):  # two of them are kept
        assert files[f"{checkpoint.name}/model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == (out / "model" / "model.safetensors").read_bytes()
    assert Outbox(out / "model").waiting() == []
    (tmp_path / "plain").mkdir()
    words = [word for word in script(tmp_path / "plain") if word != "--push_to_hub"]
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path / "plain")
    assert files["model.safetensors"] == (tmp_path / "plain" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("option", [None, "--hub-token"])
def test_a_script_tells_the_truth_and_no_secret(hub, out, option, monkeypatch, capsys):
    secret = "hf_alice"  # too short to be known by its form
    out.mkdir()
    hub.fault("commit", status=501, times=float("inf"))  # which huggingface_hub itself does not retry
    patience = "import runpy, sys; from opefo_trl.hub import publisher; publisher.PAUSES = (0.1,); "
    program = patience + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [*script(out)[1:], *([option, secret] if option else [])]
    with monkeypatch.context() as patch:
        if option:
            patch.delenv("HF_TOKEN")
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=out)
    assert done.returncode == 1 and "Pushed:" not in done.stdout
    assert "NOT on the Hub, in alice/model: 'End of training'" in done.stdout
    assert f"opefo-trl hub push {out / 'model'}" in done.stdout
    hub.faults.clear()
    main(["push", str(out / "model")])
    assert not any(secret in text for text in (done.stdout, done.stderr, *capsys.readouterr()))
    for file in filter(Path.is_file, out.rglob("*")):
        assert secret.encode() not in file.read_bytes(), file
    stored = [content for commit in hub.commits("alice/model") for content in commit.files.values()]
    assert stored and not any(secret.encode() in content for content in stored)
    assert not any(secret.encode() in request.body for request in hub.requests)
    assert torch.load(out / "model" / "training_args.bin", weights_only=False).hub_token is None


def test_two_ranks_are_one_client(hub, out):
    out.mkdir()
    machine = ["--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml"), "--main_process_port", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *machine]
    options = ["--per_device_train_batch_size", "16", "--max_steps", "2", "--hub_always_push"]
    done = subprocess.run([*launch, *script(out)[1:], *options], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Pushed: ") == 1
    messages = [commit.message for commit in hub.commits("alice/model")]
    assert messages == ["Training in progress, step 2", "End of training"]
    assert hub.count("create") <= 3  # the start, the save, the end
    assert "| processes | 2 |" in hub.files("alice/model")["README.md"].decode()
    for name in ("rng_state_0.pth", "rng_state_1.pth"):  # of each rank
        local = out / "model" / "checkpoint-2" / name
        assert hub.files("alice/model")[f"checkpoint-2/{name}"] == local.read_bytes()
