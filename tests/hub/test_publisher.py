"""Pushing a run, with the real client, to a Hub that works and to one that fails in every way that a Hub can fail."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.hub import NotPushedError, Publisher, Target, publisher, upload
from opefo_trl.hub.__main__ import main
from opefo_trl.hub.outbox import Outbox, files_to_publish

pytestmark = pytest.mark.slow
SAVES = ["Training in progress, step 2", "Training in progress, step 10", "End of training"]


def publish(run, repo="model", strategy="all_checkpoints", **options):
    """Stage what a training stages: its checkpoints, and its end."""
    publisher = Publisher(run, Target(repo, strategy=strategy, **options))
    for message, saved in zip(SAVES, ([run / "checkpoint-2"], [run / "checkpoint-10"], checkpoints(run)), strict=True):
        (run / "config.json").write_text(message)
        publisher.stage(saved, message)
    return publisher


def check_everything(hub, run, repo="alice/model"):
    """Nothing is missing and nothing is too much: each file byte for byte, and an empty outbox."""
    pushed = hub.files(repo)
    expected = files_to_publish(run, checkpoints(run), "all_checkpoints")
    assert {"README.md", "checkpoint-2/optimizer.pt", "checkpoint-10/model.safetensors"} <= expected.keys()
    assert expected.keys() == pushed.keys() - {".gitattributes"}
    for path, file in expected.items():
        if path != "README.md":  # which the upload writes into
            assert pushed[path] == file.read_bytes(), path
    assert not list((run / ".hub" / "waiting").iterdir())


def fails(publisher, *reasons):
    with pytest.raises(NotPushedError) as caught:
        publisher.finish()
    assert all(reason in str(caught.value) for reason in reasons), caught.value
    assert f"python -m opefo_trl.hub push {publisher.run}" in str(caught.value)
    publisher.stop()


def by_hand(run, *options):
    """Run the command line; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["push", str(run), *options])
        raise SystemExit(0)
    return ended.value.code


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- a Hub that works


def test_every_save_is_there_and_reported(hub, run):
    publisher = publish(run)
    commit = publisher.finish()
    check_everything(hub, run)
    assert hub.commits("alice/model")[-1].oid == commit.oid and commit.commit_url.endswith(commit.oid)
    assert [save.message for save in hub.commits("alice/model")] == SAVES
    report = publisher.report()
    assert "alice/model" in report and commit.oid[:7] in report and "NOT" not in report
    assert all(message in report for message in SAVES)


def test_a_slow_hub_holds_no_save_up_and_only_the_newest_is_sent(hub, run):
    hub.latency = 0.3
    publisher = publish(run, strategy="every_save")
    assert publisher.missing()[-1] == "End of training"  # staging did not wait for it
    hub.latency = 0.0
    publisher.finish()
    messages = [commit.message for commit in hub.commits("alice/model")]
    superseded = [line for line in publisher.report().splitlines() if "superseded" in line]
    assert superseded and len(messages) + len(superseded) == len(SAVES) and messages[-1] == "End of training"


def test_a_push_to_another_branch_takes_nothing_else_along(hub, run):
    hub.make("alice/model")
    hub.repos["alice/model"].branches["try"] = [hub.repos["alice/model"].commit("main")]
    hub.down()
    publisher = publish(run)
    publisher.stage([], "Somewhere else", "try")
    hub.up()
    publisher.finish()
    assert [commit.message for commit in hub.commits("alice/model", "try")] == ["Somewhere else"]
    assert "checkpoint-2/optimizer.pt" in hub.files("alice/model")
    assert "checkpoint-2/optimizer.pt" not in hub.files("alice/model", "try")


# ---- faults that pass

FAULTS = {
    "429 with Retry-After": [("commit", {"status": 429, "headers": {"Retry-After": "1"}})],
    "429 before": [("preupload", {"status": 429, "headers": {"Retry-After": "1"}})],
    "500": [("create", {"status": 500}), ("commit", {"status": 500, "times": 2}), ("info", {"status": 502})],
    "reset in a large file": [("lfs", {"reset_after": 100_000, "times": 2})],
    "reset again and again": [("lfs", {"reset_after": 100_000, "times": 7})],
    "reset of the commit": [("commit", {"reset_after": 1000})],
    "the answer is lost": [("commit", {"reset_after": 0, "after": True})],
    "somebody else commits": [("commit", {"status": 412})],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_that_pass(hub, run, faults):
    for where, fault in faults:
        hub.fault(where, **fault)
    publish(run).finish(attempts=9)
    check_everything(hub, run)
    messages = [commit.message for commit in hub.commits("alice/model")]
    assert len(messages) == len(set(messages))  # nothing twice
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_silent_hub(hub, run, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE", 0.3)
    hub.fault("commit", hang=2.0)
    publisher = publish(run)
    publisher.finish()
    assert "timed out" in str(publisher._error)
    check_everything(hub, run)


def test_more_saves_than_attempts_are_all_pushed(hub, run):
    hub.down()
    publisher = Publisher(run, Target("model", every=True))
    for step in range(6):
        publisher.stage([], f"step {step}")
    wait_for(lambda: publisher._failures >= 5)
    hub.up()
    publisher.finish()
    assert [commit.message for commit in hub.commits("alice/model")][:1] == ["step 0"]
    assert publisher.missing() == []


# ---- faults that do not pass


def test_down_from_the_start_then_by_hand(hub, run, capsys):
    hub.down()
    publisher = publish(run)
    fails(publisher, "in model", "'End of training' and 2 more", "cannot be reached")
    assert "End of training: NOT there" in publisher.report()
    assert by_hand(run) == 1 and "NOT on the Hub" in capsys.readouterr().err
    hub.up()
    assert by_hand(run) == 0 and "Push of model: " in capsys.readouterr().out
    check_everything(hub, run)
    before = len(hub.commits("alice/model")), sum(kind == "lfs" for kind, *_ in hub.requests)
    assert by_hand(run) == 0  # all is there, and is not sent again
    assert before == (len(hub.commits("alice/model")), sum(kind == "lfs" for kind, *_ in hub.requests))


def test_a_refusal_is_not_retried(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    publisher = publish(run)
    fails(publisher, "403", "write")
    assert publisher._failures <= 1 + len(SAVES) + 1  # at the start, and when something new was staged or waited for
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert by_hand(run) == 0
    check_everything(hub, run)


def test_a_full_disk_costs_the_push_and_not_the_run(hub, run, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "stage", full)
        publisher = publish(run)
        assert "No space left on device" in caplog.text
        with pytest.raises(NotPushedError, match=r"'End of training' and 2 more.*No space left on device"):
            publisher.finish()
        assert "End of training: NOT there" in publisher.report()
    publisher.stage(checkpoints(run), "With room again")
    publisher.finish()
    check_everything(hub, run)


def test_a_wrong_repository_is_mended_by_hand_or_by_the_next_run(hub, run, tmp_path):
    fails(publish(run, "bob/model"), "bob/model", "403")
    copy = shutil.copytree(run, tmp_path / "copy")
    assert by_hand(run, "--hub_model_id", "alice/model") == 0
    check_everything(hub, run)
    hub.repos.clear()
    publish(copy, "alice/model").finish()
    check_everything(hub, copy)


def test_two_who_wait_both_hear_that_it_failed(hub, run):
    hub.down()
    publisher = publish(run)
    with ThreadPoolExecutor(2) as pool:
        for waiting in [pool.submit(publisher.finish) for _ in range(2)]:
            assert isinstance(waiting.exception(), NotPushedError)
    hub.up()
    assert publisher.finish().oid == hub.commits("alice/model")[-1].oid


def test_another_process_that_pushes_is_waited_for(hub, run, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE", 0.2)
    (run / ".hub").mkdir()
    with FileLock(run / ".hub" / "lock"):
        publisher = publish(run)
        with pytest.raises(NotPushedError, match="lock"):
            publisher.finish()
        assert not hub.requests
    publisher.finish()
    check_everything(hub, run)


# ---- a client that hangs, and processes that end


def test_waiting_for_a_client_that_hangs_ends(run, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(upload, "push", lambda *_: ended.wait())
    monkeypatch.setattr(publisher, "HANGS", 0.2)
    pushing = publish(run)
    with pytest.raises(NotPushedError, match="hangs"):
        pushing.finish()
    assert pushing.stop() == SAVES
    ended.set()


HANGING = """
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
    words = [sys.executable, "-c", HANGING, str(run), *(["hangs"] if hangs else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert ("NOT on the Hub" in done.stderr) == hangs and ("Pushed: http" in done.stderr) == (not hangs)
    assert "model.safetensors" in hub.files("alice/model") if not hangs else True


def test_a_process_killed_in_the_middle_of_an_upload_loses_no_save(hub, run):
    hub.latency = 0.3
    process = subprocess.Popen([sys.executable, "-c", HANGING, str(run)], stderr=subprocess.DEVNULL)
    wait_for(lambda: any(kind == "lfs" for kind, *_ in hub.requests))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.latency = 0.0
    assert [save.message for save in Outbox(run).waiting()] == ["The end"]
    Publisher(run, Target("model")).finish()  # as the next run in the folder
    assert [commit.message for commit in hub.commits("alice/model")] == ["The end"]
    assert hub.files("alice/model")["model.safetensors"] == (run / "model.safetensors").read_bytes()


# ---- the command line


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (["nowhere"], ["nowhere", "--hub_model_id"]),
        (["{run}"], ["push_to_hub", "--hub_model_id"]),
        (["{run}", "--hub_model_id", "a/b/c"], ["a/b/c", "hub_model_id"]),
        (["{empty}", "--hub_model_id", "a/b"], ["nothing", "output_dir"]),
    ],
)
def test_mistakes_on_the_command_line(run, tmp_path, options, reasons, capsys):
    (tmp_path / "empty").mkdir()
    assert by_hand(*(option.format(run=run, empty=tmp_path / "empty") for option in options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(reason in error for reason in reasons)


def test_a_run_that_was_never_meant_for_the_hub_can_be_pushed(hub, run):
    options = ["--hub_model_id", "alice/later", "--hub_private_repo", "--hub_strategy", "checkpoint"]
    assert by_hand(run, *options) == 0
    files = hub.files("alice/later")
    assert hub.repos["alice/later"].private and files["last-checkpoint/optimizer.pt"] == b"\x0a" * 10
    assert "nonfinite/dump.pt" not in files and b"# model" in files["README.md"]
