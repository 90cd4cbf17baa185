"""Curves of a run, from the Hub or from the cache."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import constants

from opefo_trl.curves import EntropyCurves
from opefo_trl.files import CURVES_FILE


def write_curves(hub, folder, repo, *entropy):
    path = folder / CURVES_FILE
    pd.DataFrame({"step": [1, 2], "entropy": entropy}).to_parquet(path)
    hub.write(repo, CURVES_FILE, path.read_bytes())


@pytest.mark.slow
def test_curves_come_back_whole_and_alone(hub, tmp_path, monkeypatch):
    def load(repo="alice/private", **options):
        curves = EntropyCurves.load(repo, **options)
        assert curves.name == repo and list(curves.frame["step"]) == [1, 2]
        return list(curves.frame["entropy"])

    hub.make("alice/private", private=True)
    hub.make("alice/bare")
    hub.write("alice/private", "model.safetensors", b"large")
    write_curves(hub, tmp_path, "alice/private", 1.5, 1.25)
    old = hub.commits("alice/private")[-1].oid
    write_curves(hub, tmp_path, "alice/private", 3.0, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        for token in ("", "hf_bob"):
            patch.setenv("HF_TOKEN", token)
            with pytest.raises(FileNotFoundError, match="is private and the token may not read it"):
                load()
        assert load(token="hf_alice") == [3.0, 2.0]
    assert load() == [3.0, 2.0] and load(revision=old) == [1.5, 1.25]
    read = {request.path.rsplit("/", 1)[-1] for request in hub.requests if request.kind == "resolve"}
    assert read == {CURVES_FILE}
    for repo, revision, reason in (
        ("alice/nothing", None, "There is neither a folder 'alice/nothing' nor"),
        ("alice/bare", None, f"'alice/bare' on the Hub has no {CURVES_FILE}"),
        ("alice/private", "v9", "has no revision 'v9'"),
    ):
        with pytest.raises(FileNotFoundError, match=reason):
            load(repo, revision=revision)
    hub.down()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert load() == [3.0, 2.0]  # from the cache
        with pytest.raises(FileNotFoundError, match="on the Hub is not in the cache, and the Hub cannot be"):
            load("alice/other")


@pytest.mark.slow
def test_two_runs_from_the_hub_in_one_picture(hub, tmp_path):
    write_curves(hub, tmp_path, "alice/a", 1.0, 1.0)
    write_curves(hub, tmp_path, "alice/b", 2.0, 2.0)
    picture, page = tmp_path / "both.png", tmp_path / "both.html"
    words = ["-m", "opefo_trl.curves", "alice/a", "alice/b", "--png", str(picture), "--html", str(page)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    assert picture.stat().st_size > 10_000 and "alice/a" in page.read_text() and "alice/b" in page.read_text()


def test_a_folder_is_no_repository_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    for path in ("out/checkpoint-2", Path("out/checkpoint-4")):
        with pytest.raises(FileNotFoundError, match="There are no entropy curves at"):
            EntropyCurves.load(path)
    with pytest.raises(ValueError, match="is not on the Hub, so it has no `revision`"):
        EntropyCurves.load(tmp_path, revision="main")
