"""The table of docs/smollm2.md is that of its script."""

import numpy as np
import pandas as pd
import pytest
from scripts import ROOT, load_script

RESULTS = ROOT / "benchmarks" / "results" / "gpu" / "words.jsonl"
ON_CPU = ROOT / "benchmarks" / "results" / "words_cpu.jsonl"
SHOWN = ["base", "none", "literal", "adaptive 0.005", "adaptive 0.05"]
RATES = ["none 1e-5", "none 4e-5", "opefo", "opefo 4e-5"]  # on the CPU only


@pytest.fixture
def tables():
    return load_script("benchmarks/smollm2_tables.py")


def test_the_page_shows_what_was_measured(tables):
    page = (ROOT / "docs" / "smollm2.md").read_text()
    runs = tables.read(ON_CPU, [*SHOWN[:2], *RATES, *SHOWN[2:]])
    assert tables.table(runs, 1.0) in page
    assert tables.table(tables.read(RESULTS, SHOWN), 1.0) in page
    for name in runs.keys() - {"base"}:
        written = [word.split(": ")[1] for word in runs[name][0]["held_out"]["written"]]
        assert f"| {name} | {' '.join(written)} |" in page


def test_how_a_run_was_held_is_told(tables):
    steps = pd.DataFrame({"entropy": [2.0, 1.0, *[0.5] * 5, *[1.1] * 12], "flow/lambda": 0.25, "grad_norm": 3.0})
    runs = {"base": {0: {"frame": pd.DataFrame()}}, "opefo": {3: {"frame": steps}}}
    assert tables.holds(runs, 1.0) == (
        "- opefo, seed 3: means of 10 steps +0.04 to +0.10, lambda 0.25 on average, norm of the gradient up to 3.0"
    )


def test_a_picture_is_drawn(tables, tmp_path):
    tables.draw(tables.read(RESULTS, SHOWN), 1.0, tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 10_000


def test_the_law_runs_again_on_the_log_of_a_run(capsys):
    gains = load_script("benchmarks/flow_gains.py")
    gains.main([str(ON_CPU), "--setting", "opefo"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # a line a seed
    for line in lines:
        assert float(line.split("log by ")[1].split()[0]) < 0.05  # nats, after a step whose lambda was cut


def test_the_fit_finds_gains():
    gains = load_script("benchmarks/flow_gains.py")
    generator = np.random.default_rng(0)
    flows = generator.normal(size=(40, 2))
    entropy = 1.5 + np.vstack([np.zeros(2), np.cumsum(flows[:-1], axis=0)]) @ [0.3, 0.7]
    found, errors = gains.fit(entropy + 0.01 * generator.normal(size=40), flows)
    assert (np.abs(found - [0.3, 0.7]) < 4 * errors).all() and (errors < 0.01).all()
