"""The entropy curves of a run: a record with one row per optimizer step, a picture and an HTML report of it.

    from opefo_trl.curves import EntropyCurves

    curves = EntropyCurves.load("out")              # a run's folder, a checkpoint, the parquet file, or "user/model"
    curves.to_pandas()                              # columns: see docs/metrics.md
    curves.plot("curves.png")
    EntropyCurves.compare(["out-grpo", "out-opefo"], "both.png")

From a shell: opefo-trl curves out-grpo out-opefo --png both.png --html both.html
"""

from typing import Any

from opefo_trl.curves.record import CurveRecorder, EntropyCurves
from opefo_trl.curves.report import write_report

__all__ = ["CurveRecorder", "EntropyCurves", "LivePlot", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "LivePlot":  # it needs transformers; reading curves does not
        from opefo_trl.curves.live import LivePlot

        return LivePlot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
