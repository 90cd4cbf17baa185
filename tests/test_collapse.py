"""`python train.py` keeps the promise of the quickstart: collapse without a control, diversity with one."""

import json

import pytest
from scripts import ROOT, python

from opefo_trl.cli.progress import EDGE
from opefo_trl.curves import EntropyCurves
from opefo_trl.playground import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def train(folder, *more):
    words = ["--output_dir", folder, "--save_strategy", "no", *more]
    python(ROOT / "train.py", *words, cwd=folder.parent, OMP_NUM_THREADS="1")
    scores = json.loads((folder / "eval_results.json").read_text())
    return EntropyCurves.load(folder).to_pandas(), scores


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Score the model as it is shipped: the learning rate is 0."""
    out = tmp_path_factory.mktemp("start") / "out"
    return train(out, "--control", "none", "--max_steps", "1", "--learning_rate", "0")[1]


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return train(tmp_path_factory.mktemp("grpo") / "out", "--control", "none")


@pytest.fixture(scope="module")
def opefo(tmp_path_factory):
    return train(tmp_path_factory.mktemp("opefo") / "out")


def test_plain_grpo_collapses(start, grpo):
    curves, scores = grpo
    assert len(curves) == 300 and (MODEL / "model.safetensors").exists()
    assert curves["entropy"].tail(EDGE).mean() < 0.15
    assert curves["reward"].tail(EDGE).mean() > 0.9
    assert scores["eval_answers/distinct"] <= start["eval_answers/distinct"] / 3


def test_the_quickstart_keeps_what_grpo_loses(grpo, opefo):
    (plain, plain_scores), (ours, scores) = grpo, opefo
    assert scores["eval_answers/distinct"] >= 3 * plain_scores["eval_answers/distinct"]
    assert ours["entropy"].tail(EDGE).mean() >= plain["entropy"].tail(EDGE).mean() + 0.2
    assert ours["reward"].tail(EDGE).mean() >= 0.8 and scores["eval_reward"] >= 0.75
    assert ours["entropy"].tail(50).sub(0.5).abs().max() < 0.12  # the target is held
