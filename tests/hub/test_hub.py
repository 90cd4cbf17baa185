"""What comes back from the Hub, results that go there, and the outbox by itself."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import httpx
import pandas as pd
import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard

from opefo_trl import OPEFOConfig
from opefo_trl.config import Secret
from opefo_trl.curves import EntropyCurves
from opefo_trl.files import CURVES_FILE
from opefo_trl.hub import outbox
from opefo_trl.hub.outbox import Outcome, Target
from opefo_trl.hub.upload import explain

ROOT = Path(__file__).parents[2]
TARGET = Target("alice/model")


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def run(out):
    """A folder as a run leaves it."""
    for step in (2, 10):
        checkpoint = out / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        (checkpoint / "optimizer.pt").write_bytes(b"\0" * 10)
        (checkpoint / "model.safetensors").write_bytes(bytes([step]) * (2 << 20))
    (out / "README.md").write_text("card")
    (out / "nonfinite").mkdir()
    (out / "nonfinite" / "dump.pt").write_text("private")
    (out / "last-checkpoint").mkdir()
    (out / "last-checkpoint" / "optimizer.pt").write_text("of another run")
    (out / "completions").mkdir()
    (out / "completions" / "1.parquet").write_text("rows")
    return out


# ---- the outbox


def test_a_save_is_links_and_outlives_what_it_was_made_of(run):
    parts = outbox.parts_of(run, run / "checkpoint-2", "all_checkpoints")
    outbox.stage(run, parts, "step 2", TARGET)
    (save,) = outbox.saves_in(run, "waiting")
    weights = save.folder / "root" / "model.safetensors"
    assert weights.stat().st_ino == (run / "checkpoint-2" / "model.safetensors").stat().st_ino
    assert not (save.folder / "root" / "last-checkpoint").exists()  # of a run that this one went on from
    (run / "README.md").write_text("written over")
    shutil.rmtree(run / "checkpoint-2")
    files = outbox.contents([save])
    assert files["model.safetensors"].read_bytes()[:1] == b"\x02" and files["README.md"].read_text() == "card"
    assert files.keys() == {
        *("model.safetensors", "README.md", "completions/1.parquet"),
        *(f"checkpoint-2/{name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")),
    }


def test_without_links_files_are_copied(run, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    outbox.stage(run, outbox.parts_of(run, run / "checkpoint-2", "every_save"), "step 2", TARGET)
    weights = outbox.contents(outbox.saves_in(run, "waiting"))["model.safetensors"]
    assert weights.read_bytes() == (run / "checkpoint-2" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("every_save", ["step 10"]),
        ("checkpoint", ["step 10"]),
        ("all_checkpoints", ["step 2", "step 10"]),
    ],
)
def test_newer_saves_take_the_place_of_older_ones(run, strategy, kept):
    for step in (2, 10):
        outbox.stage(run, outbox.parts_of(run, run / f"checkpoint-{step}", strategy), f"step {step}", TARGET)
    outbox.stage(run, outbox.parts_of(run, None, strategy), "end", TARGET)
    left = [message for message in kept if strategy != "every_save"]
    assert outbox.missing(run) == [*left, "end"]
    files = outbox.contents(outbox.take(run, every=False)[0])
    assert ("last-checkpoint/optimizer.pt" in files) == (strategy == "checkpoint")
    assert {"checkpoint-2/optimizer.pt", "checkpoint-10/optimizer.pt"} <= files.keys() or strategy != "all_checkpoints"
    gone = [outcome.messages[0] for outcome in outbox.outcomes(run) if outcome.superseded]
    assert sorted([*gone, *outbox.missing(run)]) == ["end", "step 10", "step 2"]


def test_each_by_itself_and_what_is_being_sent_first(run):
    for step in (2, 10):
        parts = outbox.parts_of(run, run / f"checkpoint-{step}", "every_save")
        outbox.stage(run, parts, f"step {step}", replace(TARGET, every=True))
    ((first,),) = outbox.take(run, every=True)
    assert first.message == "step 2" and outbox.missing(run) == ["step 2", "step 10"]
    assert outbox.take(run, every=True) == [[first]]  # until it is there
    outbox.discard(run, first.folder)
    assert [save.message for save in outbox.take(run, every=True)[0]] == ["step 10"]


def test_saves_to_another_branch_go_there_and_nowhere_else(run):
    for revision in (None, "try", None):
        outbox.stage(run, outbox.parts_of(run, None, "end"), f"to {revision}", replace(TARGET, revision=revision))
    assert outbox.missing(run) == ["to try", "to None"]  # the first has a newer one
    (first,), (second,) = outbox.take(run, every=False)
    assert outbox.to(TARGET, first) == replace(TARGET, revision="try") and second.revision is None
    outbox.readdress(run, Target("alice/right"))
    assert {save.address for save in outbox.saves_in(run, "sending")} == {("alice/right", None)}


def test_what_one_process_moves_the_other_does_not_miss(run, monkeypatch):
    parts = outbox.parts_of(run, run / "checkpoint-2", "every_save")
    outbox.stage(run, parts, "first", TARGET)
    (save,) = outbox.saves_in(run, "waiting")
    listed = outbox.saves_in(run, "waiting")
    outbox.stage(run, parts, "second", TARGET)  # the first is superseded between listing and moving
    real = outbox.saves_in
    stale = lambda run, kind: (listed if kind == "waiting" else []) + real(run, kind)  # noqa: E731
    monkeypatch.setattr(outbox, "saves_in", stale)
    assert [taken.message for taken in outbox.take(run, every=False)[0]] == ["second"]
    monkeypatch.undo()
    assert not outbox.discard(run, save.folder) and save.parts() == [] and outbox.Save.read(save.folder) is None
    assert [outcome.messages for outcome in outbox.outcomes(run)] == [["first"]]


def test_a_save_without_room_leaves_nothing_behind(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        outbox.stage(run, outbox.parts_of(run, run / "checkpoint-2", "every_save"), "step 2", TARGET)
    assert outbox.missing(run) == [] and not any((run / ".hub" / "making").iterdir())


def test_the_state_of_a_run_is_its_newest_model(run):
    state = outbox.state_of(run, "checkpoint")
    assert state["root"]["model.safetensors"].parent.name == "checkpoint-10"  # of two digits
    assert state["last-checkpoint"]["optimizer.pt"].parent.name == "checkpoint-10"
    (run / "model.safetensors").write_bytes(b"final")
    assert outbox.state_of(run, "end")["root"]["model.safetensors"] == run / "model.safetensors"
    os.utime(run / "model.safetensors", (0, 0))  # of an earlier run, then
    assert outbox.state_of(run, "end")["root"]["model.safetensors"].parent.name == "checkpoint-10"


def test_targets_and_outcomes_outlive_the_process(tmp_path):
    assert Target.read(tmp_path) is None and outbox.outcomes(tmp_path) == [] and outbox.missing(tmp_path) == []
    target = Target("alice/x", True, "branch", "checkpoint", True)
    outbox.folder_of(tmp_path)
    target.write(tmp_path)
    assert Target.read(tmp_path) == target
    outcome = Outcome(["a"], "alice/x", error="no", wait=3.0)
    outbox.note(tmp_path, outcome)
    with (tmp_path / ".hub" / "outcomes.jsonl").open("a") as file:
        file.write('\n{"messages": ["cut o')  # by a kill
    outbox.note(tmp_path, outcome)
    assert outbox.outcomes(tmp_path) == [outcome] * 2 and Outcome.from_json(outcome.to_json()) == outcome


def test_the_hub_part_loads_no_torch():
    heavy = "('torch', 'transformers', 'trl', 'pandas')"
    code = f"import sys, opefo_trl.hub.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_went_wrong_in_a_line():
    outcome = explain(httpx.ConnectError("refused\nby all"), "alice/x")
    assert outcome.error == "the Hub cannot be reached (ConnectError: refused by all)" and not outcome.refused
    assert explain(ValueError("bad card"), "alice/x").refused
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = httpx.ReadTimeout("slow")
    assert "ReadTimeout" in explain(wrapped, "alice/x").error


def test_a_token_stays_out_of_files(tmp_path):
    args = OPEFOConfig(str(tmp_path / "x"), use_cpu=True, bf16=False, hub_token="hf_secret")
    assert args.hub_token == "hf_secret" and isinstance(args.hub_token, Secret)
    assert deepcopy(args).hub_token == "hf_secret" and pickle.loads(pickle.dumps(args)).hub_token is None
    assert b"hf_secret" not in pickle.dumps(args) and "hf_secret" not in f"{args}{args!r}{args.to_json_string()}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "nowhere"], "There is no folder 'nowhere'"),
        (["push", "{out}"], "was not trained with `push_to_hub`: say where to"),
        (["push", "{out}", "--hub_model_id", "a/b/c"], "is no name of a repository"),
        (["push", "{empty}", "--hub_model_id", "a/b"], "There is nothing in"),
    ],
)
def test_mistakes_on_the_command_line(run, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    words = [word.format(out=run, empty=tmp_path / "empty") for word in words]
    done = subprocess.run([sys.executable, "-m", "opefo_trl.hub", *words], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_run_that_was_never_meant_for_the_hub_can_be_pushed(hub, run, tmp_path):
    words = [str(run), "--hub_model_id", "alice/later", "--hub_private_repo", "--hub_strategy", "checkpoint"]
    (run / "README.md").write_text("# Mine\n")
    done = subprocess.run(
        [sys.executable, "-m", "opefo_trl.hub", "push", *words],
        capture_output=True, text=True, env={**os.environ, **hub.environment(home=tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.files("alice/later")
    assert hub.repos["alice/later"].private and files["last-checkpoint/optimizer.pt"] == b"\0" * 10
    assert files["model.safetensors"][:1] == b"\x0a" and "nonfinite/dump.pt" not in files
    assert b"# Mine" in files["README.md"]


# ---- curves from the Hub


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


# ---- results of eval.py


def evaluate(hub, home, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), "--benchmarks", "playground", "--temperature", "1",
         "--max_new_tokens", "12", "--push_to_hub", *words],
        capture_output=True, text=True, env={**os.environ, **hub.environment(home=home)},
    )  # fmt: skip


def test_results_go_to_the_card_with_their_samples(hub, tmp_path):
    out, home = tmp_path / "eval", tmp_path / "home"
    hub.make("alice/model")
    hub.write("alice/model", "README.md", "---\nlicense: mit\n---\n# By hand\n")
    words = ["--model", "playground", "--hub_model_id", "alice/model", "--output_dir", str(out)]
    done = evaluate(hub, home, *words, "--k", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "On the Hub: " in done.stdout
    files = hub.files("alice/model")
    assert files["eval/results.json"] == (out / "results.json").read_bytes()
    assert files["eval/samples/playground.parquet"] == (out / "samples" / "playground.parquet").read_bytes()
    card = ModelCard(files["README.md"].decode())
    results = json.loads(files["eval/results.json"])["benchmarks"]["playground"]
    first = card.data.eval_results[0]
    assert first.metric_name == "avg@2" and first.metric_value == round(100 * results["avg"], 2)
    assert first.metric_args["k"] == 2 and "math-verify" in first.metric_args["grader"]
    assert first.metric_args["interval_95"] == [round(100 * side, 2) for side in results["interval"]]
    assert "# By hand" in card.text and "## Evaluation" in card.text and card.data.license == "mit"

    hub.fault("preupload", status=403, times=float("inf"))  # later, without the right to write
    refused = evaluate(hub, home, *words, "--k", "2")
    assert refused.returncode == 1 and "NOT on the Hub: the results of" in refused.stderr
    assert "the same command pushes them without sampling again" in refused.stderr

    words = ["--model", "playground", "--hub_model_id", "bob/model", "--output_dir", str(tmp_path)]
    early = evaluate(hub, home, *words)  # before anything is sampled
    assert early.returncode == 2 and "could not be pushed to 'bob/model': the token may not write" in early.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "playground"], "It is not known where on the Hub 'playground' lies"),
        (["--model", "playground", "--hub_model_id", "a/b/c"], "is no name of a repository"),
        (["--model", "playground", "--hub_model_id", "a/b", "--watch", "x"], "leave out --push_to_hub"),
    ],
)
def test_mistakes_with_results(hub, tmp_path, words, said):
    done = evaluate(hub, tmp_path / "home", *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not hub.requests
