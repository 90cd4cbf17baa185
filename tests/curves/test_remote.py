"""Curves of a run, from the Hub or from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hub_server import HubServer

from opefo_trl.curves import EntropyCurves
from opefo_trl.files import CURVES_FILE


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def write_curves(hub, folder, repo, *entropy):
    path = folder / CURVES_FILE
    pd.DataFrame({"step": [1, 2], "entropy": entropy}).to_parquet(path)
    hub.write(repo, CURVES_FILE, path.read_bytes())


LOAD = """
import json, sys
from opefo_trl.curves import EntropyCurves
try:
    curves = EntropyCurves.load(*sys.argv[1:2], **json.loads(sys.argv[2]))
    print(json.dumps([curves.name, curves.frame.to_dict("list")]))
except (FileNotFoundError, ValueError) as error:
    print("ERROR", error)
"""


def load(hub, home, repo, user="hf_alice", offline="0", **options):
    """Load curves in a process of its own; return what it prints, of which an error is one line."""
    environment = {**os.environ, **hub.environment(user, home), "HF_HUB_OFFLINE": offline}
    words = [sys.executable, "-c", LOAD, repo, json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_curves_come_back_whole_and_alone(hub, tmp_path):
    home = tmp_path / "home"
    hub.make("alice/private", private=True)
    hub.make("alice/bare")
    hub.write("alice/private", "model.safetensors", b"large")
    write_curves(hub, tmp_path, "alice/private", 1.5, 1.25)
    old = hub.commits("alice/private")[-1].oid
    write_curves(hub, tmp_path, "alice/private", 3.0, 2.0)
    newest = ["alice/private", {"step": [1, 2], "entropy": [3.0, 2.0]}]

    assert json.loads(load(hub, home, "alice/private")) == newest
    assert json.loads(load(hub, home, "alice/private", revision=old))[1]["entropy"] == [1.5, 1.25]
    read = {request.path.rsplit("/", 1)[-1] for request in hub.requests if request.kind == "resolve"}
    assert read == {CURVES_FILE}
    assert json.loads(load(hub, tmp_path / "third", "alice/private", None, token="hf_alice")) == newest
    for user in (None, "hf_bob"):
        assert "is private and the token may not read it" in load(hub, tmp_path / "other", "alice/private", user)
    assert "There is neither a folder 'alice/nothing' nor" in load(hub, home, "alice/nothing")
    assert f"'alice/bare' on the Hub has no {CURVES_FILE}" in load(hub, home, "alice/bare")
    assert "has no revision 'v9'" in load(hub, home, "alice/private", revision="v9")
    hub.down()
    for offline in ("0", "1"):  # from the cache
        assert json.loads(load(hub, home, "alice/private", offline=offline)) == newest
    assert "on the Hub is not in the cache, and the Hub cannot be" in load(hub, home, "alice/other", offline="1")


@pytest.mark.slow
def test_two_runs_from_the_hub_in_one_picture(hub, tmp_path):
    write_curves(hub, tmp_path, "alice/a", 1.0, 1.0)
    write_curves(hub, tmp_path, "alice/b", 2.0, 2.0)
    picture, page = tmp_path / "both.png", tmp_path / "both.html"
    words = ["-m", "opefo_trl.curves", "alice/a", "alice/b", "--png", str(picture), "--html", str(page)]
    environment = {**os.environ, **hub.environment(home=tmp_path / "home")}
    subprocess.run([sys.executable, *words], check=True, env=environment, capture_output=True)
    assert picture.stat().st_size > 10_000 and "alice/a" in page.read_text() and "alice/b" in page.read_text()


def test_a_folder_is_no_repository_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    for path in ("out/checkpoint-2", Path("out/checkpoint-4")):
        with pytest.raises(FileNotFoundError, match="There are no entropy curves at"):
            EntropyCurves.load(path)
    with pytest.raises(ValueError, match="is not on the Hub, so it has no `revision`"):
        EntropyCurves.load(tmp_path, revision="main")
