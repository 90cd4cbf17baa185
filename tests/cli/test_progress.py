"""The bar and the summaries of a run."""

import math
from types import SimpleNamespace

import pandas as pd

from opefo_trl.cli.progress import EDGE, TABLE, EntropyProgress, sentence_of, table_of


def test_the_table_has_means_over_both_ends():
    frame = pd.DataFrame({"reward": [0.0] * EDGE + [9.0] + [1.0] * EDGE, "entropy": [2.0] * (2 * EDGE + 1)})
    lines = table_of(frame).splitlines()
    assert len(lines) == 3  # a column that a run has not is left out
    assert lines[1].startswith(TABLE["reward"]) and lines[1].split()[-3:] == ["0.000", "->", "1.000"]
    assert table_of(frame[:1]).splitlines()[1].split()[-3:] == ["0.000", "->", "0.000"]
    assert table_of(frame[EDGE - 1 : EDGE + 2]).splitlines()[1].split()[-3:] == ["0.000", "->", "1.000"]


def test_the_bar_shows_what_is_measured():
    bar = {}
    progress = EntropyProgress()
    progress.training_bar = SimpleNamespace(set_postfix=lambda values, refresh: bar.update(values))
    progress.on_log(None, None, None, {"reward": 0.25, "entropy": math.pi, "loss": 3.0})
    assert bar == {"reward": "0.250", "entropy": "3.142"}
    progress.on_log(None, None, None, {"batching/signal_share": 0.75})
    assert bar["with signal"] == "0.750"


def test_a_missing_score_is_a_dash():
    text = sentence_of({"eval_reward": 0.5, "eval_answers/distinct": 2.0, "eval_answers/solved": 0.25})
    assert "0.500" in text and "entropy -" in text and "2.0" in text and "25%" in text
