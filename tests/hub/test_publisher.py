"""Pushing a run, with the real client, to a Hub that works and to one that fails in every way that a Hub can fail."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock
from huggingface_hub import constants

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.hub import NotPushedError, Publisher, Target, publisher, upload
from opefo_trl.hub.__main__ import main
from opefo_trl.hub.outbox import Outbox, files_to_publish

pytestmark = pytest.mark.slow
SAVES = ["Training in progress, step 2", "Training in progress, step 10", "End of training"]
ALWAYS = float("inf")


def publish(run, repo="model", strategy="all_checkpoints"):
    """Stage what a training stages: its checkpoints, and its end."""
    publisher = Publisher(run, Target(repo, strategy=strategy))
    for message, saved in zip(SAVES, ([run / "checkpoint-2"], [run / "checkpoint-10"], checkpoints(run)), strict=True):
        (run / "config.json").write_text(message)
        publisher.stage(saved, message)
    return publisher


def check_everything(hub, run):
    """Nothing is missing and nothing is too much: each file byte for byte, and an empty outbox."""
    pushed = hub.files("alice/model")
    expected = files_to_publish(run, checkpoints(run), "all_checkpoints")
    assert {"README.md", "checkpoint-2/optimizer.pt", "checkpoint-10/model.safetensors"} <= expected.keys()
    assert expected.keys() == pushed.keys() - {".gitattributes"}
    for path in expected.keys() - {"README.md"}:  # which the upload writes into
        assert pushed[path] == expected[path].read_bytes(), path
    assert not list((run / ".hub" / "waiting").iterdir())


def fails(publisher, *reasons):
    with pytest.raises(NotPushedError) as caught:
        publisher.finish()
    for text in (*reasons, f"opefo-trl hub push {publisher.run}"):
        assert text in str(caught.value)
    assert "hf_" not in str(caught.value)  # no token
    assert "End of training: NOT there" in publisher.report()


def by_hand(run, *options):
    """Run the command line; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["push", str(run), *options])
        raise SystemExit(0)
    return ended.value.code


# ---- every fault


def faults(kind, **options):
    return lambda hub, patch: hub.fault(kind, **options)


def token(value):
    return lambda hub, patch: patch.setenv("HF_TOKEN", value)


AFTER = {"Retry-After": "1"}
FAULTS = {  # how it is made; how often an upload may fail before it passes, None if it does not; words of the reason
    "none": (lambda hub, patch: None, 0, []),
    "429": (faults("commit", status=429, headers=AFTER), 1, ["429"]),
    "429 before": (faults("preupload", status=429, headers=AFTER), 1, []),
    "500 at first": (faults("create", status=500), 1, []),
    "500": (faults("commit", status=500, times=2), 2, []),
    "502": (faults("info", status=502), 1, []),
    "reset in a large file": (faults("lfs", reset_after=100_000, times=2), 1, []),
    "reset again and again": (faults("lfs", reset_after=100_000, times=7), 7, []),
    "reset of the commit": (faults("commit", reset_after=1000), 1, []),
    "the answer is lost": (faults("commit", lost=True), 1, []),
    "somebody else commits": (faults("commit", status=412), 1, ["412"]),
    "silence": (faults("commit", hang=2.0), 1, ["timed out"]),
    "down": (lambda hub, patch: hub.down(), None, ["cannot be reached", "in model: 'End of training' and 2 more"]),
    "wrong token": (token("hf_nobody"), None, ["401", "token", "hf auth login"]),
    "token to read": (token("hf_reader"), None, ["403", "write"]),
    "no token": (token(""), None, ["no token", "hf auth login"]),
    "too large": (faults("commit", status=413, times=ALWAYS), None, ["413", "no room"]),
    "not paid": (faults("commit", status=402, times=ALWAYS), None, ["402", "no room"]),
    "offline": (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), None, ["HF_HUB_OFFLINE"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(hub, run, fault, monkeypatch):
    make, failures, reasons = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(upload, "SILENCE", 0.3 if fault == "silence" else upload.SILENCE)
        make(hub, patch)
        publisher = publish(run)
        if failures is None:
            fails(publisher, *reasons)
            assert fault == "down" or publisher._failures <= 2 + len(SAVES)  # no retry by itself
            publisher.stop()
        else:
            commit = publisher.finish(attempts=9)
            assert publisher._failures <= failures and all(reason in str(publisher._error) for reason in reasons)
            assert all(made.times == 0 for made in hub.faults)
    if failures is None:
        hub.faults.clear()
        hub.up()
        publisher = Publisher(run, Target("model", strategy="all_checkpoints"))  # as the next run in the folder
        commit = publisher.finish()
    check_everything(hub, run)
    assert [save.message for save in hub.commits("alice/model")] == SAVES  # nothing twice
    assert hub.commits("alice/model")[-1].oid == commit.oid and commit.commit_url.endswith(commit.oid)
    report = publisher.report()
    assert all(text in report for text in (*SAVES, "alice/model", commit.oid[:7])) and "NOT" not in report


def test_a_slow_hub_holds_no_save_up_and_only_the_newest_is_sent(hub, run):
    hub.latency = 0.3
    publisher = publish(run, strategy="every_save")
    assert publisher.missing()[-1] == "End of training"  # staging did not wait for it
    hub.latency = 0.0
    publisher.finish()
    messages = [commit.message for commit in hub.commits("alice/model")]
    superseded = publisher.report().count("superseded")
    assert superseded and len(messages) + superseded == len(SAVES) and messages[-1] == "End of training"


def test_a_push_to_another_branch_takes_nothing_else_along(hub, run):
    hub.make("alice/model")
    hub.repos["alice/model"].branches["try"] = [hub.repos["alice/model"].commit("main")]
    publisher = publish(run)
    publisher.stage([], "Somewhere else", "try")
    publisher.finish()
    assert [commit.message for commit in hub.commits("alice/model", "try")] == ["Somewhere else"]
    assert "checkpoint-2/optimizer.pt" in hub.files("alice/model")
    assert "checkpoint-2/optimizer.pt" not in hub.files("alice/model", "try")


def test_two_wait_for_more_saves_than_attempts(hub, run):
    hub.down()
    publisher, saves = Publisher(run, Target("model", every=True)), [f"step {step}" for step in range(6)]
    for message in saves:
        publisher.stage([], message)
    with ThreadPoolExecutor(2) as pool:
        for waiting in [pool.submit(publisher.finish) for _ in range(2)]:
            assert isinstance(waiting.exception(), NotPushedError)
    hub.up()
    assert publisher.finish().oid == hub.commits("alice/model")[-1].oid
    assert hub.commits("alice/model")[0].message == saves[0] and publisher.missing() == []


def test_a_full_disk_costs_the_push_and_not_the_run(hub, run, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "stage", full)
        publisher = publish(run)
        assert "No space left on device" in caplog.text
        fails(publisher, "'End of training' and 2 more", "No space left on device")
    publisher.stage(checkpoints(run), "With room again")
    publisher.finish()
    check_everything(hub, run)


def test_another_process_that_pushes_is_waited_for(hub, run, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE", 0.2)
    (run / ".hub").mkdir()
    with FileLock(run / ".hub" / "lock"):
        publisher = publish(run)
        fails(publisher, "lock")
        assert not hub.requests
    publisher.finish()
    check_everything(hub, run)


# ---- a client that hangs, and processes that end


def test_waiting_for_a_client_that_hangs_ends(run, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(upload, "push", lambda *_: ended.wait())
    monkeypatch.setattr(publisher, "HANGS", 0.2)
    pushing = publish(run)
    fails(pushing, "hangs")
    assert pushing.stop() == SAVES
    ended.set()


ENDING = """
import sys, threading
from pathlib import Path
from opefo_trl.hub import Publisher, Target, publisher, upload
if sys.argv[2:] == ["hangs"]:
    publisher.HANGS = 0.2
    upload.push = lambda *_: threading.Event().wait()
Publisher(Path(sys.argv[1]), Target("model")).stage([], "The end")
"""


@pytest.mark.parametrize("hangs", [True, False])
def test_a_process_that_ends_pushes_what_waits_and_does_not_hang(hub, run, hangs):
    words = [sys.executable, "-c", ENDING, str(run), *(["hangs"] if hangs else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert ("NOT on the Hub" in done.stderr) == hangs and ("Pushed: http" in done.stderr) == (not hangs)
    assert hangs or "model.safetensors" in hub.files("alice/model")


# ---- the command line


def test_what_is_not_there_is_pushed_by_hand(hub, run, capsys):
    hub.down()
    publish(run).stop()
    assert by_hand(run) == 1 and "NOT on the Hub" in capsys.readouterr().err
    hub.up()
    assert by_hand(run) == 0 and "Push of model: " in capsys.readouterr().out
    check_everything(hub, run)
    commits, uploads = len(hub.commits("alice/model")), hub.count("lfs")
    assert by_hand(run) == 0  # all is there, and is not sent again
    assert (len(hub.commits("alice/model")), hub.count("lfs")) == (commits, uploads)


def test_a_wrong_repository_is_mended_by_the_next_run_or_by_hand(hub, run):
    publisher = publish(run, "bob/model")
    fails(publisher, "bob/model", "403")
    publisher.stop()
    Publisher(run, Target("alice/model", strategy="all_checkpoints")).finish()
    check_everything(hub, run)
    options = ["--hub_model_id", "alice/later", "--hub_private_repo", "--hub_strategy", "checkpoint"]
    assert by_hand(run, *options) == 0
    files = hub.files("alice/later")
    assert hub.repos["alice/later"].private and files["last-checkpoint/optimizer.pt"] == b"\x0a" * 10
    assert "nonfinite/dump.pt" not in files and b"# model" in files["README.md"]


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (["nowhere"], ["nothing in 'nowhere'", "output_dir"]),
        (["{run}"], ["push_to_hub", "--hub_model_id"]),
        (["{run}", "--hub_model_id", "a/b/c"], ["a/b/c", "hub_model_id"]),
        (["{run}/nonfinite", "--hub_model_id", "a/b"], ["nothing", "output_dir"]),
    ],
)
def test_mistakes_on_the_command_line(run, options, reasons, capsys):
    (run / "nonfinite" / "dump.pt").unlink()
    assert by_hand(*(option.format(run=run) for option in options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(reason in error for reason in reasons)
