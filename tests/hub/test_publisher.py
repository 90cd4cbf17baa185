"""Pushing a run to a Hub that works, and to one that fails in every way that a Hub can fail. The client is the real one."""

import pytest

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.hub import NotPushedError, Publisher, Target
from opefo_trl.hub.outbox import files_to_publish

pytestmark = pytest.mark.slow


def publish(run, repo="model", strategy="all_checkpoints", **options):
    """Stage what a training stages: its checkpoints, and its end."""
    publisher = Publisher(run, Target(repo, strategy=strategy, **options))
    for checkpoint in checkpoints(run):
        publisher.stage([checkpoint], f"Training in progress, step {checkpoint.name.split('-')[1]}")
    publisher.stage(checkpoints(run), "End of training")
    return publisher


def check_everything(hub, run, repo="alice/model"):
    """Nothing is missing and nothing is too much: each file byte for byte, and an empty outbox."""
    pushed = hub.files(repo)
    expected = files_to_publish(run, checkpoints(run), "all_checkpoints")
    assert {"model.safetensors", "README.md", "checkpoint-2/optimizer.pt", "checkpoint-10/model.safetensors"} <= expected.keys()
    assert expected.keys() == pushed.keys() - {".gitattributes"}
    for path, file in expected.items():
        if path != "README.md":
            assert pushed[path] == file.read_bytes(), path
    assert not list((run / ".hub" / "waiting").iterdir())


def test_every_save_is_there(hub, run):
    publisher = publish(run)
    commit = publisher.finish()
    check_everything(hub, run)
    assert hub.commits("alice/model")[-1].oid == commit.oid
    print(publisher.report())


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
    publish(run).finish()
    check_everything(hub, run)
    messages = [commit.message for commit in hub.commits("alice/model")]
    assert len(messages) == len(set(messages))  # nothing twice
    assert all(fault.times == 0 for fault in hub.faults)
