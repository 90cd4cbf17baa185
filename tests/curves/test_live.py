from types import SimpleNamespace

import pandas as pd
import pytest

from opefo_trl.curves import EntropyCurves, LivePlot

FIRST, OTHER = SimpleNamespace(is_world_process_zero=True), SimpleNamespace(is_world_process_zero=False)


@pytest.fixture
def shown(monkeypatch):
    """Figures in the order in which a notebook showed them."""
    figures = []

    def display(figure, display_id):
        figures.append(figure)
        return SimpleNamespace(update=figures.append)

    monkeypatch.setattr("IPython.display.display", display)
    return figures


def test_one_picture_is_redrawn_by_the_first_rank(shown):
    run = SimpleNamespace(curves=EntropyCurves(pd.DataFrame({"step": [1, 2], "entropy": [1.0, 0.5]})))
    plot = LivePlot(run, seconds=3600)
    plot.on_step_end(None, OTHER, None)
    assert not shown
    plot.on_step_end(None, FIRST, None)
    plot.on_step_end(None, FIRST, None)  # too early
    assert len(shown) == 1
    plot.on_train_end(None, FIRST, None)
    assert len(shown) == 2 and shown[0] is not shown[1]


def test_a_run_without_curves_has_nothing_to_plot():
    with pytest.raises(ValueError, match="`entropy_curves=False`.*True"):
        LivePlot(SimpleNamespace(curves=None))
