"""Recorder of a run's entropy curves: a row at every optimizer step, completions now and then, pictures at saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerState

from opefo_trl.controls import Tokens
from opefo_trl.curves import CurveRecorder, EntropyCurves, write_report
from opefo_trl.curves.token_samples import extremes, sample_rows, sample_steps
from opefo_trl.files import PICTURE_FILE, REPORT_FILE
from opefo_trl.playground import MODEL, PLAYGROUND
from opefo_trl.trl_compat import COUNTERS

if TYPE_CHECKING:
    from opefo_trl.config import OPEFOConfig

logger = get_logger(__name__)

SKIPPED_STEPS = "guard/skipped_steps"  # a count, replaced at every step as TRL's COUNTERS are


class Recorder(TrainerCallback):
    """
    Callback that writes the curves of a run.

    Args:
        folder (`Path`): the run's output folder.
        settings (`dict`): settings of the run that legends and the report show, see `run_settings`.
        metrics (`Callable`): returns TRL's lists of metrics, with the values since the last log.
        tokenizer: decodes completions for the report.
        active (`bool`): whether to record; on the first rank alone, and only with `entropy_curves=True`.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        metrics: Callable[[], Mapping[str, list[Any]]],
        tokenizer: Any,
        active: bool,
    ):
        self.folder, self.settings, self.metrics, self.tokenizer = folder, settings, metrics, tokenizer
        self.active = active
        self.begin()

    def begin(self) -> None:
        """Reset the rows for a new run."""
        self._writer = CurveRecorder(self.folder, self.settings)
        self.step_numbers: dict[str, float] = {}  # loss, learning rate, gradient norm of the step under way
        self._candidates: list[dict[str, Any]] = []  # completions of the step under way, if it is to be shown
        self._in_rows: dict[str, int] = {}  # metric -> number of its values that are in a row already

    @property
    def curves(self) -> EntropyCurves | None:
        return self._writer.curves if self.active else None

    def sample(self, batch: dict[str, Any], tokens: Tokens, state: TrainerState) -> None:
        """Keep completions of this micro-batch, if its step is one to be shown."""
        step = state.global_step + 1
        if self.active and step in sample_steps(state.max_steps):
            self._try(lambda: self._candidates.extend(sample_rows(step, batch, tokens, self.tokenizer)))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Append a row: the means of the values measured since the row before."""
        if not self.active:
            return
        row = {"step": state.global_step, "epoch": float(state.epoch or 0), "time": time.time(), **self.step_numbers}
        for name, values in self.metrics().items():
            replaced = name in COUNTERS or name == SKIPPED_STEPS
            fresh = values if replaced else values[self._in_rows.get(name, 0) :]
            numbers = [float(value) for value in fresh if value is not None and not math.isnan(value)]
            self._in_rows[name] = len(values)
            if numbers:
                row[name] = sum(numbers) / len(numbers)
        self._writer.samples += extremes(self._candidates, [sample["advantage"] for sample in self._candidates])
        self._candidates = []
        self._try(self._writer.append, row)

    def metrics_cleared(self) -> None:
        """Note that TRL has emptied its lists of metrics, as `GRPOTrainer.log` does."""
        self._in_rows.clear()

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if self.active and self._writer.rows:
            scores = {name: value for name, value in metrics.items() if name.startswith("eval_")}
            self._writer.rows[-1].update({name: float(value) for name, value in scores.items() if value is not None})
            self._try(self._writer.write)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._draw()

    def save(self, checkpoint: Path) -> None:
        """Draw the curves, and copy them into a checkpoint."""
        if self.active:
            self._draw()
            self._try(self._writer.save, checkpoint)

    def restore(self, checkpoint: Path, step: int) -> None:
        """Restore the rows of a checkpoint."""
        if self.active:
            problem = self._writer.restore(checkpoint, step)
            if problem is not None:
                logger.warning(problem)

    def end(self) -> None:
        """Write the rows, however the run ended."""
        if self.active and self._writer.rows:
            self._try(self._writer.write)

    def _draw(self) -> None:
        if self.active and self._writer.rows:
            curves = self._writer.curves
            self._try(curves.plot, self.folder / PICTURE_FILE)
            self._try(write_report, self.folder / REPORT_FILE, [curves])

    def _try(self, write: Callable[..., Any], *arguments: Any) -> None:
        """Write something; a full disk may cost a picture, never the run."""
        try:
            write(*arguments)
        except Exception as error:
            text = f"The entropy curves could not be written: {type(error).__name__}: {error}"
            logger.warning(text, exc_info=not isinstance(error, OSError))


def run_settings(args: OPEFOConfig, model: str) -> dict[str, Any]:
    """Return the settings that legends and the report show; `model` is a name on the Hub or a folder."""
    names = ["control", "control_kwargs", *args.active_fields, "flow_estimator", "flow_scope"]
    names += ["learning_rate", "num_generations", "beta", "loss_type", "seed"]
    if Path(model).is_dir():
        model = PLAYGROUND if Path(model) == MODEL else Path(model).name
    return {"model": model, **{name: getattr(args, name) for name in names}}
