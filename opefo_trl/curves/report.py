"""`report.html`: curves that show their values under the pointer, and completions coloured by entropy flow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from opefo_trl.files import write_whole

if TYPE_CHECKING:
    from opefo_trl.curves.record import EntropyCurves

_TEMPLATE = Path(__file__).with_name("report.html")
_COLUMNS = (
    "reward",
    "entropy",
    "flow/target",
    "flow/increase",
    "flow/decrease",
    "flow/lambda",
    "flow/lambda_star",
    "flow/increase_share",
    "answers/distinct",
    "answers/solved",
)
_MAX_POINTS = 2000  # of a curve; longer ones are thinned by averaging


def write_report(path: str | Path, runs: Sequence[EntropyCurves]) -> None:
    """Write one self-contained page, which needs no server and no network."""
    data = {
        "runs": [{"name": run.name, "settings": run.settings, **_series(run.frame)} for run in runs],
        "samples": [{**sample, "run": index} for index, run in enumerate(runs) for sample in run.samples],
    }
    # `<` never appears in the page's data, so no completion can end the script element that holds it.
    text = json.dumps(_rounded(data), allow_nan=False).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_RUNS", text)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), lambda part: part.write_text(page, encoding="utf-8"))


def _series(frame: pd.DataFrame) -> dict[str, Any]:
    shown = frame[["step", *(column for column in _COLUMNS if column in frame)]]
    stride = math.ceil(len(shown) / _MAX_POINTS)
    if stride > 1:
        shown = shown.groupby([index // stride for index in range(len(shown))]).mean()
    return {
        "steps": shown["step"].tolist(),
        "columns": {name: shown[name].tolist() for name in shown.columns if name != "step"},
    }


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits; NaN and infinity become null, since JSON has neither."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
