"""opefo-trl curves RUN [RUN ...] [--png FILE] [--html FILE]: draw one run, or several overlaid."""

from __future__ import annotations

import argparse
from pathlib import Path

from opefo_trl.curves.plot import draw
from opefo_trl.curves.record import load_runs
from opefo_trl.curves.report import write_report
from opefo_trl.files import PICTURE_FILE, REPORT_FILE


def main(arguments: list[str] | None = None) -> None:
    description, page = "Draw the entropy curves of runs.", "Page: docs/metrics.md"
    parser = argparse.ArgumentParser(prog="opefo-trl curves", description=description, epilog=page)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, checkpoints, parquet files, or user/model")
    parser.add_argument("--labels", nargs="+", help="a name for each run (default: the name of its folder)")
    parser.add_argument("--png", type=Path, help=f"picture to write (default: {PICTURE_FILE})")
    parser.add_argument("--html", type=Path, help=f"page to write (default: {REPORT_FILE})")
    parser.add_argument("--smooth", type=int, help="steps of the moving mean (default: a thirtieth of the run)")
    options = parser.parse_args(arguments)
    png, html = options.png, options.html
    if png is None and html is None:
        png, html = Path(PICTURE_FILE), Path(REPORT_FILE)
    try:
        runs = load_runs(options.runs, options.labels)
        if png is not None:
            draw(runs, png, options.smooth)
            print(f"Wrote {png}")
        if html is not None:
            write_report(html, runs)
            print(f"Wrote {html}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
