"""The table of docs/smollm2.md is that of its script."""

import pytest
from scripts import ROOT, load_script

RESULTS = ROOT / "benchmarks" / "results" / "gpu" / "words.jsonl"
ON_CPU = ROOT / "benchmarks" / "results" / "words_cpu.jsonl"
SHOWN = ["base", "none", "opefo, second law", "literal", "adaptive 0.005", "adaptive 0.05"]


@pytest.fixture
def tables():
    return load_script("benchmarks/smollm2_tables.py")


def test_the_page_shows_what_was_measured(tables):
    page = (ROOT / "docs" / "smollm2.md").read_text()
    runs = tables.read(RESULTS, SHOWN)
    assert tables.table(runs, 1.0) in page
    assert tables.table(tables.read(ON_CPU, ["base", "opefo"]), 1.0) in page
    for word in runs["none"][0]["held_out"]["written"]:
        assert word.split(": ")[1] in page


def test_a_picture_is_drawn(tables, tmp_path):
    tables.draw(tables.read(RESULTS, SHOWN), 1.0, tmp_path / "words.png")
    assert (tmp_path / "words.png").stat().st_size > 10_000
