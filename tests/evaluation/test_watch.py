"""Checkpoints of a run are evaluated as they come."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest
from eval_script import SMALL, refusal
from scripts import ROOT, python

from opefo_trl.curves import EntropyCurves
from opefo_trl.evaluation.results import read_results
from opefo_trl.evaluation.watch import _set_aside, collect, has_results, watch
from opefo_trl.playground import MODEL


def test_scores_of_checkpoints_are_collected_from_whatever_lies_there(whole, tmp_path):
    collect(tmp_path)  # nothing yet
    for name in ("checkpoint-5", "final", "greedy"):
        shutil.copytree(whole, tmp_path / "eval" / name)
    collect(tmp_path)  # without curves, nobody knows the step of the final model
    scores = pd.read_parquet(tmp_path / "eval_scores.parquet")
    assert scores["step"].tolist() == [5]
    assert list(scores) == ["step", "eval/playground", "eval/playground/low", "eval/playground/high"]
    final, settings = tmp_path / "eval" / "final", {"temperature": 1.0, "k": 4, "chat_template_kwargs": None}
    for same in (settings, {"k": None}):
        assert has_results(MODEL, final, ["playground"], same)
    assert not has_results(MODEL, final, ["playground", "aime24"], settings)
    for other in ({"temperature": 0.6}, {"k": 8}):
        assert not has_results(MODEL, final, ["playground"], {**settings, **other})
    trained = shutil.copytree(MODEL, tmp_path / "trained")
    assert has_results(trained, final, ["playground"], settings)  # a copy has the same weights
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (trained / "model.safetensors").write_bytes(content)
    assert not has_results(trained, final, ["playground"], settings)


def test_results_of_an_earlier_run_are_set_aside_and_not_drawn(whole, tmp_path):
    for name in ("checkpoint-5", "checkpoint-6", "final"):
        shutil.copytree(whole, tmp_path / "eval" / name)
    shutil.copytree(MODEL, tmp_path / "checkpoint-6")
    other = shutil.copytree(MODEL, tmp_path / "checkpoint-5")
    (other / "model.safetensors").write_bytes(b"other weights")
    collect(tmp_path)  # the end is an earlier one, as the run goes on
    assert pd.read_parquet(tmp_path / "eval_scores.parquet")["step"].tolist() == [6]
    for number in (1, 2):
        _set_aside(other, tmp_path / "eval" / "checkpoint-5")
        assert (tmp_path / "eval" / f"checkpoint-5-old-{number}" / "results.json").exists()
        shutil.copytree(whole, tmp_path / "eval" / "checkpoint-5")
    _set_aside(tmp_path / "checkpoint-6", tmp_path / "eval" / "checkpoint-6")
    assert (tmp_path / "eval" / "checkpoint-6").exists()


def test_watching_needs_a_folder_and_finds_models_by_itself(tmp_path, monkeypatch):
    assert "nowhere" in refusal(tmp_path / "out", "--watch", "nowhere")
    for option in ("--model", "--output_dir=x", "--output-dir"):
        with pytest.raises(ValueError, match=option.split("=")[0].replace("t-", "t_")):
            watch(str(tmp_path), ["playground"], {}, ROOT / "eval.py", ["--watch", str(tmp_path), option])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accelerate launch"):
        watch(str(tmp_path), ["playground"], {}, ROOT / "eval.py", [])


def test_a_failed_evaluation_ends_the_watch_unless_its_checkpoint_is_gone(tmp_path):
    (tmp_path / "run.json").write_text('{"ended": true}')
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    script = tmp_path / "failing.py"
    script.write_text(
        "import shutil, sys\nif 'checkpoint-' in sys.argv[2]:\n    shutil.rmtree(sys.argv[2])\nraise SystemExit(3)"
    )
    with pytest.raises(ChildProcessError, match=f"{tmp_path} .*3"):  # of the last model, after the checkpoint
        watch(str(tmp_path), ["playground"], {}, script, [])
    assert not checkpoint.exists()


@pytest.mark.slow
def test_a_watched_run_has_its_scores_beside_its_curves(tmp_path):
    out = tmp_path / "run"
    words = "--max_steps 4 --save_steps 2 --per_device_train_batch_size 32 --num_generations 4 --eval_prompts 0"
    out.mkdir()
    (tmp_path / "watch.yaml").write_text(f"watch: {out}\nbenchmarks: playground\n")
    watching = [sys.executable, str(ROOT / "eval.py"), "--config", "watch.yaml", *SMALL]
    watcher = subprocess.Popen(watching, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    python(ROOT / "train.py", *words.split(), "--output_dir", out, "--disable_tqdm", "true", cwd=tmp_path)
    output, _ = watcher.communicate(timeout=240)
    assert watcher.returncode == 0, output
    frame = EntropyCurves.load(out).to_pandas()
    scored = frame[frame["eval/playground"].notna()]
    assert frame["step"].tolist() == [1, 2, 3, 4] and scored["step"].tolist() == [2, 4]
    for step in (2, 4):
        scores = read_results(out / "eval" / f"checkpoint-{step}")["benchmarks"]["playground"]
        assert scored.set_index("step").loc[step, "eval/playground"] == scores["avg"]
    assert (out / "eval_curves.png").stat().st_size > 10_000
    assert "Playground" not in python(*watching[1:], cwd=tmp_path)  # nothing is done twice
