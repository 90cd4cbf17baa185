"""Snapshots of a run: what is in them, that they outlive the run's files, and which newer one supersedes which."""

import os
import shutil

import pytest

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.files import list_files
from opefo_trl.hub.outbox import Outbox, Target, files_to_publish


def messages(outbox):
    return [save.message for save in outbox.waiting()]


def refuse(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("links", [True, False])
def test_a_snapshot_is_links_or_copies_and_outlives_what_it_was_made_of(run, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    outbox = Outbox(run)
    outbox.stage(files_to_publish(run, [run / "checkpoint-2"], "all_checkpoints"), "step 2")
    (save,) = outbox.waiting()
    weights = save.folder / "files" / "checkpoint-2" / "model.safetensors"
    assert weights.samefile(run / "checkpoint-2" / "model.safetensors") == links
    (run / "config.json").write_text("written over")
    shutil.rmtree(run / "checkpoint-2")
    files = list_files(save.folder / "files")
    assert files["checkpoint-2/model.safetensors"].read_bytes()[:1] == b"\x02"
    assert files["config.json"].read_text() == "{}"
    assert files.keys() == {
        *("model.safetensors", "config.json", "README.md", "report.html", "completions/1.parquet"),
        *(f"checkpoint-2/{name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")),
    }


@pytest.mark.parametrize("every", [False, True])
def test_newer_snapshots_supersede_older_ones(run, every):
    outbox = Outbox(run, every)
    for message in ("step 2", "step 10", "end"):
        outbox.stage({"config.json": run / "config.json"}, message)
    assert messages(outbox) == (["step 2", "step 10", "end"] if every else ["end"])
    assert sorted([*messages(outbox), *outbox.superseded]) == ["end", "step 10", "step 2"]
    assert len(list(outbox.folder.iterdir())) == len(messages(outbox))


def test_a_snapshot_that_is_being_uploaded_is_left_alone(run):
    outbox, files = Outbox(run), {"config.json": run / "config.json"}
    outbox.stage(files, "first")
    first = outbox.take()
    for message in ("second", "third"):
        outbox.stage(files, message)
    assert first.message == "first" and messages(outbox) == ["first", "third"]
    assert outbox.take().message == "third"  # the first has failed, and has a newer one
    (third,) = outbox.waiting()
    for _ in range(2):  # another process may delete it at the same moment
        outbox.discard(third.folder)
    assert outbox.waiting() == [] and outbox.take() is None and not list(outbox.folder.iterdir())


def test_snapshots_for_another_branch_do_not_supersede(run):
    outbox, files = Outbox(run), {"config.json": run / "config.json"}
    for revision in (None, "try", None):
        outbox.stage(files, f"to {revision}", revision)
    assert [(save.message, save.revision) for save in outbox.waiting()] == [("to try", "try"), ("to None", None)]


def test_half_a_snapshot_is_none_and_is_swept(run, monkeypatch):
    outbox = Outbox(run)
    outbox.stage({"config.json": run / "config.json"}, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", refuse)
        with pytest.raises(OSError, match="No space"):
            outbox.stage(files_to_publish(run, [], "end"), "half")
    assert messages(outbox) == ["whole"] and len(list(outbox.folder.iterdir())) == 2
    outbox.sweep()
    assert messages(outbox) == ["whole"] and len(list(outbox.folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("end", []), ("checkpoint", ["last-checkpoint"]), ("all_checkpoints", ["checkpoint-10", "checkpoint-2"])],
)
def test_a_strategy_says_which_checkpoints_are_published(run, strategy, folders):
    files = files_to_publish(run, checkpoints(run), strategy)
    assert sorted({path.split("/")[0] for path in files if "checkpoint" in path}) == folders
    assert "nonfinite/dump.pt" not in files and "completions/1.parquet" in files
    if strategy == "checkpoint":
        assert files["last-checkpoint/optimizer.pt"].parent.name == "checkpoint-10"  # of two digits
    assert files["model.safetensors"] == run / "model.safetensors" and "optimizer.pt" not in files
    os.utime(run / "model.safetensors", (0, 0))  # the output folder's is of an earlier run, then
    files = files_to_publish(run, checkpoints(run), strategy)
    assert files["model.safetensors"] == run / "checkpoint-10" / "model.safetensors" and "optimizer.pt" not in files


def test_a_target_outlives_the_process(tmp_path):
    assert Target.read(tmp_path) is None
    target = Target("alice/x", True, "branch", "checkpoint", True)
    target.write(tmp_path)
    assert Target.read(tmp_path) == target
    (tmp_path / ".hub" / "target.json").write_text('{"repo": "cut o')
    assert Target.read(tmp_path) is None
