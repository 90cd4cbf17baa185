"""The record of a run: one row per optimizer step, in a parquet file that is whole at any moment."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opefo_trl.curves.remote import fetch
from opefo_trl.files import CURVES_FILE, SCORES_FILE, TOKEN_SAMPLES_FILE, write_whole
from opefo_trl.repositories import is_repository

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS_KEY = b"opefo_trl"
_PAUSE = 1.0  # least time between two writes, in seconds; or fifty times what the last one took


class EntropyCurves:
    """
    The curves of one run.

    Args:
        frame (`pandas.DataFrame`): a row per optimizer step, with a `step` column and one for each metric.
        name (`str`): the name of the run in legends.
        settings (`dict`): the fields of the run's configuration that shape its entropy.
        samples (`list[dict]`): completions with the flow of each token, from a few steps of the run.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        name: str = "run",
        settings: dict[str, Any] | None = None,
        samples: list[dict[str, Any]] | None = None,
    ):
        self.frame, self.name, self.settings, self.samples = frame, name, settings or {}, samples or []

    @classmethod
    def load(
        cls, path: str | Path, name: str | None = None, *, revision: str | None = None, token: str | bool | None = None
    ) -> EntropyCurves:
        """
        Load the curves from a run's output folder, one of its checkpoints, the parquet file itself, or a repository on
        the Hub (`"user/model"`), of which only that file is downloaded; without a network the cached file is used.
        """
        file = Path(path) / CURVES_FILE if Path(path).is_dir() else Path(path)
        if isinstance(path, str) and is_repository(path):
            file, name = fetch(path, CURVES_FILE, revision, token), name or path
        elif revision is not None or token is not None:
            raise ValueError(f"{str(path)!r} is not on the Hub, so it has no `revision` and needs no `token`.")
        if not file.is_file():
            raise FileNotFoundError(
                f"There are no entropy curves at {str(path)!r}. Give a run's output folder, a checkpoint in it, the "
                f"{CURVES_FILE}, or a repository on the Hub; runs with `entropy_curves=False` have none."
            )
        try:
            table = pq.read_table(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a parquet file: {error}") from None
        frame = table.to_pandas()
        if "step" not in frame:
            raise ValueError(f"{file} has no `step` column, so it is not a file of entropy curves.")
        scores = file.with_name(SCORES_FILE)
        if scores.is_file():
            frame = frame.merge(pd.read_parquet(scores), on="step", how="left")
        settings = json.loads((table.schema.metadata or {}).get(_SETTINGS_KEY, b"{}"))
        samples = file.with_name(TOKEN_SAMPLES_FILE)
        return cls(
            frame,
            name or file.resolve().parent.name,
            settings,
            json.loads(samples.read_text()) if samples.is_file() else [],
        )

    def __repr__(self) -> str:
        return f"EntropyCurves({self.name!r}, {len(self.frame)} steps, {len(self.frame.columns)} columns)"

    def to_pandas(self) -> pd.DataFrame:
        return self.frame.copy()

    def plot(self, path: str | Path | None = None, *, smooth: int | None = None) -> Figure:
        """Draw entropy, flows, lambda and reward, and write them to `path` if given. `smooth` is a number of steps."""
        from opefo_trl.curves.plot import draw

        return draw([self], path, smooth)

    @classmethod
    def compare(
        cls,
        runs: Sequence[str | Path | EntropyCurves],
        path: str | Path | None = None,
        *,
        labels: Sequence[str] | None = None,
        smooth: int | None = None,
    ) -> Figure:
        """Draw the same picture with several runs overlaid."""
        from opefo_trl.curves.plot import draw

        return draw(load_runs(runs, labels), path, smooth)


def load_runs(runs: Sequence[str | Path | EntropyCurves], labels: Sequence[str] | None = None) -> list[EntropyCurves]:
    """Load those of the runs that are given as paths, and rename all of them if `labels` are given."""
    if labels is not None and len(labels) != len(runs):
        raise ValueError(f"{len(labels)} labels for {len(runs)} runs; give one for each.")
    loaded = [run if isinstance(run, EntropyCurves) else EntropyCurves.load(run) for run in runs]
    names = labels or [run.name for run in loaded]
    if labels is None and len(set(names)) < len(names):  # a/out and b/out
        names = [name if isinstance(run, EntropyCurves) else str(run) for run, name in zip(runs, names, strict=True)]
    return [EntropyCurves(run.frame, name, run.settings, run.samples) for run, name in zip(loaded, names, strict=True)]


class CurveRecorder:
    """
    Writes the rows of a run. The file is replaced as a whole, so it is valid whenever the run dies. Each checkpoint
    holds a copy, so a resumed run continues after exactly the rows of its checkpoint.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.rows: list[dict[str, float]] = []
        self.samples: list[dict[str, Any]] = []
        self._next_write = 0.0

    @property
    def curves(self) -> EntropyCurves:
        return EntropyCurves(self._frame(), self.folder.name, self.settings, self.samples)

    def append(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if len(self.rows) == 1:  # scores in the folder are of the run before
            (self.folder / SCORES_FILE).unlink(missing_ok=True)
        if time.monotonic() >= self._next_write:
            self.write()

    def write(self) -> None:
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pandas(self._frame(), preserve_index=False)
        table = table.replace_schema_metadata({**table.schema.metadata, _SETTINGS_KEY: json.dumps(self.settings)})
        write_whole(self.folder / CURVES_FILE, lambda part: pq.write_table(table, part))
        write_whole(self.folder / TOKEN_SAMPLES_FILE, lambda part: part.write_text(json.dumps(self.samples)))
        ended = time.monotonic()
        self._next_write = ended + max(_PAUSE, 50 * (ended - began))

    def save(self, checkpoint: Path) -> None:
        """Write the files, and copy them into a checkpoint."""
        self.write()
        for name in (CURVES_FILE, TOKEN_SAMPLES_FILE):
            write_whole(checkpoint / name, partial(shutil.copyfile, self.folder / name))

    def restore(self, checkpoint: Path, step: int) -> str | None:
        """Restore the rows up to `step` from the checkpoint, or else from the run's folder; return what is missing."""
        for source in (checkpoint, self.folder):
            try:
                curves = EntropyCurves.load(source)
            except (OSError, ValueError):  # missing or damaged
                continue
            frame = curves.frame[curves.frame["step"] <= step]
            frame = frame[[name for name in frame if not name.startswith("eval/")]]
            self.rows = [
                {name: value for name, value in row.items() if value == value}  # less the NaN of what was not measured
                for row in frame.to_dict(orient="records")
            ]
            self.samples = [sample for sample in curves.samples if sample["step"] <= step]
            break
        missing = step - len(self.rows)
        if missing:
            return f"The entropy curves of {missing} of the {step} steps before {checkpoint} are lost."
        return None

    def _frame(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.rows)
        return frame.astype({"step": "int64"}) if self.rows else pd.DataFrame({"step": pd.Series(dtype="int64")})
