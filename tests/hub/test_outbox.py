"""Snapshots of a run: what is in them, that they outlive the run's files, and which newer one supersedes which."""

import os
import shutil

import pytest

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.files import list_files
from opefo_trl.hub.outbox import Outbox, Target, files_to_publish


def messages(outbox):
    return [save.message for save in outbox.waiting()]


def test_a_snapshot_is_links_and_outlives_what_it_was_made_of(run):
    outbox = Outbox(run)
    outbox.stage(files_to_publish(run, [run / "checkpoint-2"], "all_checkpoints"), "step 2")
    (save,) = outbox.waiting()
    weights = save.folder / "files" / "checkpoint-2" / "model.safetensors"
    assert weights.stat().st_ino == (run / "checkpoint-2" / "model.safetensors").stat().st_ino
    (run / "config.json").write_text("written over")
    shutil.rmtree(run / "checkpoint-2")
    files = list_files(save.folder / "files")
    assert files["checkpoint-2/model.safetensors"].read_bytes()[:1] == b"\x02"
    assert files["config.json"].read_text() == "{}"
    assert files.keys() == {
        *("model.safetensors", "config.json", "README.md", "report.html", "completions/1.parquet"),
        *(f"checkpoint-2/{name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")),
    }


def test_without_links_files_are_copied(run, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    outbox = Outbox(run)
    outbox.stage(files_to_publish(run, [], "end"), "end")
    (save,) = outbox.waiting()
    assert (save.folder / "files" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


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
    outbox.discard(outbox.waiting()[0].folder)
    assert outbox.take() is None and not list(outbox.folder.iterdir())


def test_snapshots_for_another_branch_do_not_supersede(run):
    outbox, files = Outbox(run), {"config.json": run / "config.json"}
    for revision in (None, "try", None):
        outbox.stage(files, f"to {revision}", revision)
    assert [(save.message, save.revision) for save in outbox.waiting()] == [("to try", "try"), ("to None", None)]


def test_another_process_may_delete_a_snapshot_at_any_moment(run):
    outbox, files = Outbox(run), {"config.json": run / "config.json"}
    outbox.stage(files, "first")
    (save,) = outbox.waiting()
    outbox.discard(save.folder)
    outbox.discard(save.folder)
    assert outbox.waiting() == [] and outbox.take() is None


def test_half_a_snapshot_is_none_and_is_swept(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    outbox = Outbox(run)
    outbox.stage({"config.json": run / "config.json"}, "whole")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space"):
            outbox.stage(files_to_publish(run, [], "end"), "half")
    assert messages(outbox) == ["whole"] and len(list(outbox.folder.iterdir())) == 2
    outbox.sweep()
    assert messages(outbox) == ["whole"] and len(list(outbox.folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-10"}),
    ],
)
def test_a_strategy_says_which_checkpoints_are_published(run, strategy, folders):
    files = files_to_publish(run, checkpoints(run), strategy)
    assert {path.split("/")[0] for path in files if "checkpoint" in path} == folders
    assert "nonfinite/dump.pt" not in files and "completions/1.parquet" in files
    if strategy == "checkpoint":
        assert files["last-checkpoint/optimizer.pt"].parent.name == "checkpoint-10"  # of two digits


def test_the_newest_model_is_published(run):
    assert files_to_publish(run, checkpoints(run), "end")["model.safetensors"] == run / "model.safetensors"
    os.utime(run / "model.safetensors", (0, 0))  # the output folder's is of an earlier run, then
    for strategy in ("end", "all_checkpoints"):
        model = files_to_publish(run, checkpoints(run), strategy)["model.safetensors"]
        assert model == run / "checkpoint-10" / "model.safetensors"
    assert "optimizer.pt" not in files_to_publish(run, checkpoints(run), "end")


def test_a_target_outlives_the_process(tmp_path):
    assert Target.read(tmp_path) is None
    target = Target("alice/x", True, "branch", "checkpoint", True)
    target.write(tmp_path)
    assert Target.read(tmp_path) == target
    (tmp_path / ".hub" / "target.json").write_text('{"repo": "cut o')
    assert Target.read(tmp_path) is None
