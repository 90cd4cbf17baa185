"""Runs that push to a Hub, as long as it works and in every way in which it may not.

The client is the real one. Whatever the Hub does, the parameters at the end are those of a run that pushes nothing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainerCallback

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.files import CURVES_FILE, PICTURE_FILE, REPORT_FILE
from opefo_trl.hub import NotPushedError, outbox, publisher, upload
from opefo_trl.playground import MODEL, playground_dataset, playground_reward

ROOT = Path(__file__).parents[2]
STEPS, SAVES = 4, 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(part=256 << 10) as server:
        for name, value in server.environment(home=tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(publisher, "PAUSES", (0.1,))
        monkeypatch.setattr(upload, "PAUSES", (0.1, 0.1, 0.1))
        yield server


def config(out, **options):
    options = {"hub_strategy": "all_checkpoints", "save_steps": SAVES, "max_steps": STEPS, **options}
    options.setdefault("push_to_hub", True)
    return OPEFOConfig(
        str(out / "model"), per_device_train_batch_size=32, num_generations=4, max_completion_length=12,
        learning_rate=1e-3, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        **options,
    )  # fmt: skip


def trained(out, callback=None, **options):
    trainer = OPEFOTrainer("playground", playground_reward, config(out, **options), train_dataset=playground_dataset())
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    trainer = trained(tmp_path_factory.mktemp("plain"), push_to_hub=False)
    assert trainer.publisher is None
    return parameters(trainer)


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(trainer, plain):
    return all(torch.equal(value, plain[name]) for name, value in trainer.model.state_dict().items())


class AtStep(TrainerCallback):
    """What happens to the Hub at the end of a step."""

    def __init__(self, **steps):
        self.steps = {int(name[1:]): action for name, action in steps.items()}

    def on_step_end(self, args, state, control, **_):
        self.steps.get(state.global_step, lambda: None)()


def check_everything(hub, out, repo="alice/model"):
    """Nothing is missing: the model, what describes it, and each checkpoint, byte for byte."""
    there = hub.files(repo)
    run = out / "model"
    local = outbox.state_of(run, "all_checkpoints")
    expected = {**local.pop("root"), **{f"{part}/{p}": f for part, files in local.items() for p, f in files.items()}}
    assert {"model.safetensors", "config.json", "README.md", CURVES_FILE, PICTURE_FILE, REPORT_FILE} <= expected.keys()
    assert {f"checkpoint-{step}/optimizer.pt" for step in range(SAVES, STEPS + 1, SAVES)} <= expected.keys()
    assert expected.keys() == there.keys() - {".gitattributes"}
    for path, file in expected.items():
        if path != "README.md":  # which the upload tells its address
            assert there[path] == file.read_bytes(), path
    assert outbox.missing(run) == []
    assert not (run / ".hub" / "waiting").exists() or not any((run / ".hub" / "waiting").iterdir())


PATIENCE = "import runpy, sys; from opefo_trl.hub import upload; upload.PAUSES = (0.1, 0.1, 0.1); "


def fails(trainer, match):
    """The end of a training that says why nothing more is pushed."""
    with pytest.raises(NotPushedError, match=match):
        trainer.push_to_hub()
    trainer.publisher.stop()


def push_by_hand(out, *more):
    program = PATIENCE + "from opefo_trl.hub.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "push", str(out / "model"), *more]
    return subprocess.run(command, capture_output=True, text=True)


# ---- a Hub that works


def test_every_save_is_there_byte_for_byte(hub, out, plain):
    snapshots = {}

    class AfterSave(TrainerCallback):
        def on_save(self, args, state, control, **_):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            names = ("model.safetensors", "optimizer.pt", "trainer_state.json")
            snapshots[state.global_step] = {name: (folder / name).read_bytes() for name in names}
            snapshots[state.global_step][CURVES_FILE] = (Path(args.output_dir) / CURVES_FILE).read_bytes()

    trainer = trained(out, AfterSave(), hub_always_push=True, save_total_limit=1, hub_model_id="alice/model")
    made = trainer.push_to_hub()
    assert same(trainer, plain)
    commits = {one.message: one for one in hub.commits("alice/model")}
    for step in range(SAVES, STEPS + 1, SAVES):
        files = commits[f"Training in progress, step {step}"].files
        saved = snapshots[step]
        for name in ("model.safetensors", CURVES_FILE):
            assert files[name].content == saved[name], (step, name)
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            assert files[f"checkpoint-{step}/{name}"].content == saved[name], (step, name)
    assert hub.files("alice/model").keys() >= {"checkpoint-2/optimizer.pt", "checkpoint-4/optimizer.pt"}
    assert not (out / "model" / "checkpoint-2").exists()  # deleted by the run, and there all the same
    assert hub.commits("alice/model")[-1].oid == made.oid and made.commit_url.endswith(made.oid)
    assert "step 2: " in trainer.publisher.report() and "NOT" not in trainer.publisher.report()
    uploads = [kind for kind, *_ in hub.requests if kind in ("preupload", "commit")]
    assert uploads[:4] == ["preupload", "commit"] * 2  # one at a time
    with pytest.raises(ValueError, match="gives no name of a repository"):
        config(out, hub_model_id="a/b/c")


def test_the_card_reads_validates_and_shows_its_picture(hub, out):
    trainer = trained(out)
    trainer.push_to_hub()
    card = ModelCard(hub.files("alice/model")["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0" and {"opefo", "trl", "grpo"} <= set(card.data.tags)
    assert any(kind == "card" for kind, *_ in hub.requests)  # validated by the Hub before it was taken
    assert f"]({PICTURE_FILE})" in card.text and hub.files("alice/model")[PICTURE_FILE][:4] == b"\x89PNG"
    assert 'model="alice/model"' in card.text and 'EntropyCurves.load("alice/model")' in card.text
    words = card.text.split("### Reproduce it")[0].replace("`None`", "")
    assert "None" not in words and "{{" not in words and str(out) not in words
    assert trainer.hub_model_id == "alice/model"
    load = "EntropyCurves.load('alice/model').frame.to_json(double_precision=15)"
    code = f"from opefo_trl.curves import EntropyCurves; print({load})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(loaded) == json.loads(trainer.curves.frame.to_json(double_precision=15))


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_strategies(hub, out, strategy):
    trainer = trained(out, hub_strategy=strategy, hub_always_push=True)
    trainer.push_to_hub()
    messages = [one.message for one in hub.commits("alice/model")]
    steps = [f"Training in progress, step {step}" for step in (2, 4)]
    assert [message for message in messages if message in steps] == ([] if strategy == "end" else steps)
    folders = {path.split("/")[0] for path in hub.files("alice/model") if "/" in path}
    assert folders == ({"last-checkpoint"} if strategy == "checkpoint" else set())
    if strategy == "checkpoint":
        state = json.loads(hub.files("alice/model")["last-checkpoint/trainer_state.json"])
        assert state["global_step"] == STEPS


def test_private_stays_private_and_what_somebody_wrote_stays(hub, out):
    hub.make("alice/model", private=True)
    hub.write("alice/model", "README.md", "---\nlicense: mit\ntags: [mine]\n---\n\n# By hand\n\nKeep this.\n")
    trainer = trained(out, hub_strategy="every_save", callback=AtStep())
    trainer.push_to_hub()
    text = hub.files("alice/model")["README.md"].decode()
    hub.write(
        "alice/model", "README.md", text.replace("## Entropy", "## MINE").replace("Keep this.", "Keep this too.")
    )
    trainer.push_to_hub()
    card = ModelCard(hub.files("alice/model")["README.md"].decode())
    assert hub.repos["alice/model"].private
    trainer.push_to_hub()
    assert "Keep this too." in hub.files("alice/model")["README.md"].decode()
    assert "# By hand\n\nKeep this too." in card.text and "## MINE" not in card.text  # between marks it is ours
    assert card.text.count("## Training") == card.text.count("## Citation") == 1
    assert card.data.license == "mit" and {"mine", "opefo"} <= set(card.data.tags)


def test_a_new_repository_is_private_if_asked_for_and_a_branch_is_made(hub, out):
    trainer = trained(out, hub_private_repo=True, hub_revision="try", hub_strategy="end")
    trainer.push_to_hub()
    assert hub.repos["alice/model"].private and hub.commits("alice/model") == []
    assert "model.safetensors" in hub.files("alice/model", "try")


# ---- one that does not


def test_down_from_the_start_then_by_hand(hub, out, plain):
    hub.down()
    trainer = trained(out)
    assert same(trainer, plain)
    with pytest.raises(NotPushedError, match=r"in model: .End of training. and 2 more\. The reason: the Hub"):
        trainer.push_to_hub()
    assert "NOT there, after" in trainer.publisher.report()
    trainer.publisher.stop()
    failed = push_by_hand(out)  # which tries again, and again
    assert failed.returncode == 1 and "NOT on the Hub" in failed.stderr and failed.stderr.count("Trying again") == 3
    hub.up()
    pushed = push_by_hand(out)
    assert pushed.returncode == 0 and "On the Hub: Push of model, " in pushed.stdout
    check_everything(hub, out)


def test_down_from_the_start_and_back_at_the_end(hub, out, plain):
    hub.down()
    trainer = trained(out)
    hub.up()
    trainer.push_to_hub()
    assert same(trainer, plain)
    check_everything(hub, out)


def test_down_in_the_middle_and_back(hub, out, plain):
    trainer = trained(out, AtStep(_1=hub.down, _4=hub.up))
    trainer.push_to_hub()
    assert same(trainer, plain)
    check_everything(hub, out)


@pytest.mark.parametrize(
    "faults",
    {
        "429 with Retry-After": [("commit", {"status": 429, "headers": {"Retry-After": "1"}})],
        "429 before": [("preupload", {"status": 429, "headers": {"Retry-After": "1"}})],
        "500": [("create", {"status": 500}), ("commit", {"status": 500, "times": 2}), ("info", {"status": 502})],
        "reset in a large file": [("lfs", {"reset_after": 100_000, "times": 2})],
        "reset again and again": [("lfs", {"reset_after": 100_000, "times": 7})],
        "reset of the commit": [("commit", {"reset_after": 1000})],
        "the answer is lost": [("commit", {"reset_after": 0, "after": True})],
        "somebody else commits": [("commit", {"status": 412})],
    }.items(),
    ids=lambda case: case[0],
)
def test_faults_that_pass(hub, out, plain, faults):
    for where, what in faults[1]:
        hub.fault(where, **what)
    trainer = trained(out)
    trainer.push_to_hub()
    assert same(trainer, plain)
    check_everything(hub, out)
    messages = [one.message for one in hub.commits("alice/model")]
    assert len(messages) == len(set(messages))  # nothing twice
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize(
    ("token", "fault", "said"),
    [
        ("hf_nobody", None, r"does not accept the token \(401\)"),
        ("hf_reader", None, r"may not write to model \(403\)"),
        (None, None, "there is no token"),
        ("hf_alice", {"status": 413}, r"no room left for alice/model \(413\)"),
        ("hf_alice", {"status": 402}, r"no room left for alice/model \(402\)"),
    ],
)
def test_a_hub_that_refuses(hub, out, plain, token, fault, said, monkeypatch):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    if fault is not None:
        hub.fault("commit", times=float("inf"), **fault)
    trainer = trained(out)
    assert same(trainer, plain)
    began = time.monotonic()
    with pytest.raises(NotPushedError, match=said):
        trainer.push_to_hub()
    assert time.monotonic() - began < 20  # trying again would not help
    trainer.publisher.stop()
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert push_by_hand(out).returncode == 0
    check_everything(hub, out)


def test_a_slow_hub_does_not_slow_the_training(hub, out, plain, monkeypatch):
    """Each request takes longer than a step, and all of them longer than the training."""
    hub.latency, hub.bandwidth = 0.3, 2e6
    spent = []
    stage = outbox.stage
    monkeypatch.setattr(outbox, "stage", lambda *args: timed(spent, stage, *args))
    began = time.monotonic()
    trainer = trained(out)
    training = time.monotonic() - began
    assert outbox.missing(out / "model")  # it did not wait
    assert sum(spent) < 0.05 * training and len(spent) == 2
    assert same(trainer, plain)
    hub.latency, hub.bandwidth = 0.0, None
    trainer.push_to_hub()
    check_everything(hub, out)


def timed(spent, function, *arguments):
    began = time.monotonic()
    try:
        return function(*arguments)
    finally:
        spent.append(time.monotonic() - began)


def test_slower_than_the_saves_only_the_newest_is_sent_and_the_list_says_so(hub, out):
    hub.latency = 0.3
    trainer = trained(out, hub_strategy="every_save", save_steps=1)
    hub.latency = 0.0
    trainer.push_to_hub()
    messages = [one.message for one in hub.commits("alice/model")]
    left_out = trainer.publisher.report().count("left out, a newer one came")
    assert left_out >= 1 and len(messages) + left_out >= STEPS
    assert hub.files("alice/model")["model.safetensors"] == (out / "model" / "model.safetensors").read_bytes()


def test_a_hub_that_is_silent(hub, out, plain, monkeypatch):
    monkeypatch.setenv("OPEFO_HUB_TIMEOUT", "0.5")
    hub.fault("commit", hang=3.0)
    trainer = trained(out)
    trainer.push_to_hub()
    assert same(trainer, plain) and any(outcome.error for outcome in trainer.publisher.outcomes())
    check_everything(hub, out)


def test_an_upload_that_is_killed_is_done_again(hub, out, plain):
    hub.latency = 0.2
    trainer = trained(out)
    deadline = time.monotonic() + 60
    while not (process := trainer.publisher._process):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    hub.latency = 0.0
    trainer.push_to_hub()
    assert same(trainer, plain)
    check_everything(hub, out)


def test_a_disk_that_is_full_costs_the_push_and_not_the_run(hub, out, plain, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "stage", full)
        trainer = trained(out)
    assert same(trainer, plain) and "could not be kept for the Hub" in caplog.text
    trainer.push_to_hub()  # with room again: what the run still has
    check_everything(hub, out)
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "stage", full)
        with pytest.raises(NotPushedError, match=r"'End of training'.*no room to keep it"):
            trainer.push_to_hub()
    assert "End of training: NOT there" in trainer.publisher.report()
    trainer.publisher.stop()


def test_a_callback_that_saves_does_not_wait(hub, out, plain):
    class SavesToo(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                trainer.save_model()

    hub.latency = 0.2
    trainer = OPEFOTrainer("playground", playground_reward, config(out), train_dataset=playground_dataset())
    trainer.add_callback(SavesToo())
    trainer.train()
    assert same(trainer, plain) and outbox.missing(out / "model")
    hub.latency = 0.0
    trainer.push_to_hub()
    check_everything(hub, out)


def test_more_saves_than_attempts_are_all_pushed(hub, out):
    hub.down()
    trainer = trained(out, hub_always_push=True, save_steps=1, max_steps=5)
    hub.up()
    trainer.push_to_hub()
    steps = [f"Training in progress, step {step}" for step in range(1, 6)]
    assert [one.message for one in hub.commits("alice/model")][:5] == steps


def test_a_wrong_repository_is_mended_by_hand_or_by_the_next_run(hub, out, tmp_path):
    trainer = trained(out, hub_model_id="bob/model")
    fails(trainer, r"may not write to bob/model \(403\)")
    shutil.copytree(out, tmp_path / "copy")
    assert push_by_hand(out, "--hub_model_id", "alice/model").returncode == 0
    check_everything(hub, out)
    hub.repos.clear()
    again = trained(tmp_path / "copy", hub_model_id="alice/model")
    again.push_to_hub()
    check_everything(hub, tmp_path / "copy")


def test_two_who_wait_both_hear_that_it_failed(hub, out):
    trainer = trained(out, hub_strategy="end")
    hub.down()
    first, second = trainer.push_to_hub(blocking=False), trainer.push_to_hub(blocking=False)
    for waiting in (first, second):
        assert isinstance(waiting.exception(timeout=60), NotPushedError)
    hub.up()
    made = trainer.push_to_hub(blocking=False).result(timeout=60)
    assert made.oid == hub.commits("alice/model")[-1].oid


def test_a_push_to_another_branch_takes_nothing_else_along(hub, out):
    hub.make("alice/model")
    hub.repos["alice/model"].branches["try"] = [hub.repos["alice/model"].commit("main")]
    hub.down()
    trainer = trained(out)
    hub.up()
    trainer.push_to_hub(revision="try")
    assert {one.message for one in hub.commits("alice/model", "try")} == {"End of training"}
    assert "checkpoint-2/optimizer.pt" in hub.files("alice/model")
    assert "checkpoint-2/optimizer.pt" not in hub.files("alice/model", "try")


def test_a_card_that_cannot_be_read_keeps_no_weights_back(hub, out):
    hub.make("alice/model")
    hub.write("alice/model", "README.md", "---\nlicense: [\n---\n# By hand\n")
    trainer = trained(out, hub_strategy="end")
    fails(trainer, r"all is there but the card, README\.md")
    assert b"license: [" in hub.files("alice/model")["README.md"] and "model.safetensors" in hub.files("alice/model")


def test_an_adapter_of_a_local_model(hub, out):
    args = config(out, hub_strategy="every_save")
    trainer = OPEFOTrainer(
        "playground", playground_reward, args, train_dataset=playground_dataset(), peft_config=LoraConfig(r=2)
    )
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard(hub.files("alice/model")["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.license == "apache-2.0"
    assert card.data.get("base_model") is None
    assert "More Information Needed" not in card.text and str(MODEL) not in str(card)
    assert "adapter_model.safetensors" in hub.files("alice/model")


def test_offline_is_said_once_and_pushed_later(hub, out, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trainer = trained(out)
    fails(trainer, "HF_HUB_OFFLINE is set")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert push_by_hand(out).returncode == 0
    check_everything(hub, out)
    assert push_by_hand(out).returncode == 0  # once more: all is there
    assert len(hub.commits("alice/model")) == 1


def test_a_gitignore_that_leaves_files_out_is_told(hub, out):
    hub.make("alice/model")
    hub.write("alice/model", ".gitignore", "*.html\n")
    trainer = trained(out, hub_strategy="end")
    fails(trainer, r"has not report.html as they were sent .*gitignore")


# ---- whole scripts


def script(out, *more):
    options = f"""--max_steps 6 --save_steps 2 --per_device_train_batch_size 32 --num_generations 4 --eval_prompts 0
        --push_to_hub --hub_strategy all_checkpoints --output_dir {out / "model"}""".split()
    return [sys.executable, str(ROOT / "train.py"), *options, *more]


def test_a_run_that_is_killed_loses_no_save(hub, out, tmp_path):
    hub.latency = 0.2
    out.mkdir()
    process = subprocess.Popen(script(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=out)
    deadline = time.monotonic() + 120
    while not list(out.glob("model/.hub/sending/*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    uploads = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for process in uploads:
        process.kill()
    hub.latency = 0.0
    left = outbox.missing(out / "model")
    assert left
    done = subprocess.run(script(out), capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from" in done.stdout and "Pushed: http" in done.stdout
    files = hub.files("alice/model")
    assert {f"checkpoint-{step}/model.safetensors" for step in (2, 4, 6)} <= files.keys()
    for checkpoint in (out / "model").glob("checkpoint-*"):  # two of them are kept
        assert files[f"{checkpoint.name}/model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == (out / "model" / "model.safetensors").read_bytes()
    assert outbox.missing(out / "model") == []
    (tmp_path / "plain").mkdir()
    words = [word for word in script(tmp_path / "plain") if word != "--push_to_hub"]
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path / "plain")
    assert files["model.safetensors"] == (tmp_path / "plain" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("given", ["in the environment", "--hub-token"])
def test_a_script_tells_the_truth_and_no_secret(hub, out, given, monkeypatch):
    secret = "hf_alice"  # too short to be known by its form
    out.mkdir()
    hub.fault("commit", status=500, times=float("inf"))
    program = PATIENCE + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [given, secret] if given.startswith("--") else []
    with monkeypatch.context() as patch:
        if words:
            patch.delenv("HF_TOKEN")
        done = subprocess.run(
            [sys.executable, "-c", program, *script(out, *words)[1:]], capture_output=True, text=True, cwd=out
        )
    assert done.returncode == 1
    assert "NOT on the Hub, in alice/model: 'End of training'" in done.stdout and "Pushed:" not in done.stdout
    assert f"python -m opefo_trl.hub push {out / 'model'}" in done.stdout
    hub.faults.clear()
    by_hand = push_by_hand(out)
    assert by_hand.returncode == 0, by_hand.stderr
    said = [done.stdout, done.stderr, by_hand.stdout, by_hand.stderr]
    assert not any(secret in text for text in said)
    for file in filter(Path.is_file, out.rglob("*")):
        assert secret.encode() not in file.read_bytes(), file
    stored = [blob for one in hub.commits("alice/model") for blob in one.files.values()]
    assert stored and not any(secret.encode() in blob.content for blob in stored)
    assert not any(secret.encode() in body for body in hub.bodies)
    assert (f"{given} ***" in hub.files("alice/model")["README.md"].decode()) == bool(words)
    assert torch.load(out / "model" / "training_args.bin", weights_only=False).hub_token is None


def test_two_ranks_are_one_client(hub, out):
    out.mkdir()
    port = str(20000 + os.getpid() % 20000)
    machine = ["--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml"), "--main_process_port", port]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *machine]
    options = ["--per_device_train_batch_size", "16", "--max_steps", "2", "--hub_always_push"]
    done = subprocess.run([*launch, *script(out)[1:], *options], capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Pushed: ") == 1
    assert [one.message for one in hub.commits("alice/model")] == ["Training in progress, step 2", "End of training"]
    creates = sum(kind == "create" for kind, *_ in hub.requests)
    assert creates <= 3  # the greeting, the save, the end
    card = hub.files("alice/model")["README.md"].decode()
    assert "accelerate launch --num_processes 2" in card and "| processes | 2 |" in card
    for name in ("rng_state_0.pth", "rng_state_1.pth"):  # of each rank
        local = out / "model" / "checkpoint-2" / name
        assert hub.files("alice/model")[f"checkpoint-2/{name}"] == local.read_bytes()
