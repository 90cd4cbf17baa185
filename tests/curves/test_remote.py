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


LOAD = """
import json, sys
from opefo_trl.curves import EntropyCurves
try:
    curves = EntropyCurves.load(*sys.argv[1:2], **json.loads(sys.argv[2]))
    print(json.dumps([curves.name, curves.frame.to_dict("list"), curves.settings]))
except (FileNotFoundError, ValueError) as error:
    print("ERROR", error)
"""


def load(hub, home, repo, user="hf_alice", offline="0", **options):
    environment = {**os.environ, **hub.environment(user, home), "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, repo, json.dumps(options)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1  # an error is one line
    return done.stdout.strip()


@pytest.mark.slow
def test_curves_come_back_whole_and_alone(hub, tmp_path):
    run, home = tmp_path / "run", tmp_path / "home"
    run.mkdir()
    frame = pd.DataFrame({"step": [1, 2], "entropy": [1.5, 1.25]})
    frame.to_parquet(run / CURVES_FILE)
    hub.make("alice/private", private=True)
    hub.make("alice/bare")
    hub.write("alice/private", "model.safetensors", b"large")
    hub.write("alice/private", CURVES_FILE, (run / CURVES_FILE).read_bytes())
    old = hub.commits("alice/private")[-1].oid
    frame.assign(entropy=[3.0, 2.0]).to_parquet(run / CURVES_FILE)
    hub.write("alice/private", CURVES_FILE, (run / CURVES_FILE).read_bytes())

    name, columns, _ = json.loads(load(hub, home, "alice/private"))
    assert name == "alice/private" and columns == {"step": [1, 2], "entropy": [3.0, 2.0]}
    assert json.loads(load(hub, home, "alice/private", revision=old))[1]["entropy"] == [1.5, 1.25]
    assert {path.rsplit("/", 1)[-1] for kind, _, path in hub.requests if kind == "resolve"} == {CURVES_FILE}
    assert "is private and the token may not read it" in load(hub, tmp_path / "other", "alice/private", None)
    assert "is private and the token may not read it" in load(hub, tmp_path / "other", "alice/private", "hf_bob")
    assert json.loads(load(hub, tmp_path / "third", "alice/private", None, token="hf_alice"))[0] == "alice/private"
    assert "There is neither a folder 'alice/nothing' nor" in load(hub, home, "alice/nothing")
    assert f"'alice/bare' on the Hub has no {CURVES_FILE}" in load(hub, home, "alice/bare")
    assert "has no revision 'v9'" in load(hub, home, "alice/private", revision="v9")
    hub.down()
    assert json.loads(load(hub, home, "alice/private"))[1]["entropy"] == [3.0, 2.0]  # from the cache
    assert json.loads(load(hub, home, "alice/private", offline="1"))[1]["entropy"] == [3.0, 2.0]
    assert "on the Hub is not in the cache, and the Hub cannot be" in load(hub, home, "alice/other", offline="1")


@pytest.mark.slow
def test_two_runs_from_the_hub_in_one_picture(hub, tmp_path):
    for name, entropy in (("a", 1.0), ("b", 2.0)):
        frame = pd.DataFrame({"step": [1, 2], "entropy": [entropy, entropy]})
        frame.to_parquet(tmp_path / CURVES_FILE)
        hub.make(f"alice/{name}")
        hub.write(f"alice/{name}", CURVES_FILE, (tmp_path / CURVES_FILE).read_bytes())
    picture, page = tmp_path / "both.png", tmp_path / "both.html"
    words = ["alice/a", "alice/b", "--png", str(picture), "--html", str(page)]
    environment = {**os.environ, **hub.environment(home=tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-m", "opefo_trl.curves", *words], check=True, env=environment, capture_output=True
    )
    assert picture.stat().st_size > 10_000 and "alice/a" in page.read_text() and "alice/b" in page.read_text()


def test_a_folder_without_curves_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    for path in ("out/checkpoint-2", Path("out/checkpoint-4")):
        with pytest.raises(FileNotFoundError, match="There are no entropy curves at"):
            EntropyCurves.load(path)


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="is not on the Hub, so it has no `revision`"):
        EntropyCurves.load(tmp_path, revision="main")
