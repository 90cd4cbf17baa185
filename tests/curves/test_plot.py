import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from opefo_trl.curves import EntropyCurves
from opefo_trl.curves.__main__ import main
from opefo_trl.curves.plot import draw
from opefo_trl.files import CURVES_FILE, PICTURE_FILE, REPORT_FILE


def curves(steps=40, name="run", shift=0.0):
    step = np.arange(1, steps + 1)
    columns = {"entropy": np.exp(-step / 20) + shift, "reward": 1 - np.exp(-step / 10), "flow/increase": 0.1}
    columns |= {"flow/decrease": 0.2, "flow/lambda": 0.1, "flow/lambda_star": 0.3}
    return EntropyCurves(pd.DataFrame({"step": step, **columns}), name)


def test_a_picture_shows_four_panels_with_names_and_units(tmp_path):
    figure = curves().plot(tmp_path / "new" / "curves.png")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Entropy of the policy", "Entropy flow", "Lambda", "Reward"]
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert matplotlib.image.imread(tmp_path / "new" / "curves.png").std() > 0.05  # not an empty page
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert curves(1).plot()._repr_png_()  # one step is enough


def test_benchmark_scores_get_a_panel_of_their_own():
    run = curves()
    run.frame["eval/aime24"] = run.frame["step"].map({10: 0.2, 30: 0.4})
    run.frame["eval/aime24/low"], run.frame["eval/aime24/high"] = run.frame["eval/aime24"] - 0.1, 0.5
    panel = draw([run]).axes[-1]
    assert panel.get_title(loc="left") == "Benchmarks" and panel.lines[0].get_xdata().tolist() == [10, 30]


def test_smoothing_is_a_moving_mean():
    run = curves()
    strong = run.plot(smooth=5).axes[0].lines[-1].get_ydata()
    assert strong[10] == pytest.approx(run.frame["entropy"][8:13].mean())
    assert run.plot(smooth=1).axes[0].lines[-1].get_ydata()[10] == run.frame["entropy"][10]
    with pytest.raises(ValueError, match="`smooth=0`"):
        run.plot(smooth=0)


def test_several_runs_are_told_apart(tmp_path):
    runs = [curves(), curves(20, shift=1.0)]
    figure = EntropyCurves.compare(runs, tmp_path / "both.png", labels=["GRPO", "OPEFO"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GRPO", "OPEFO"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    with pytest.raises(ValueError, match="no run"):
        draw([])


def test_the_command_draws_runs_and_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    curves(2).frame.to_parquet(tmp_path / "a" / CURVES_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["curves", "a", "a", "--labels", "x", "y", "--html", "page.html"])
    main()
    assert '"x"' in (tmp_path / "page.html").read_text() and not (tmp_path / PICTURE_FILE).exists()
    monkeypatch.setattr("sys.argv", ["curves", "a"])
    main()
    assert (tmp_path / PICTURE_FILE).exists() and (tmp_path / REPORT_FILE).exists()
    monkeypatch.setattr("sys.argv", ["curves", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: " in (error := capsys.readouterr().err) and "'nowhere'" in error and error.count("\n") == 1
