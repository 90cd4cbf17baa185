"""What a run leaves for its readers: a row of curves at every step, completions now and then, pictures at saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import TrainerCallback
from trl.trainer.utils import get_config_model_id

from opefo_trl.controls import Tokens
from opefo_trl.curves import CurveRecorder, EntropyCurves, write_report
from opefo_trl.curves.token_samples import extremes, sample_rows, sample_steps
from opefo_trl.files import PICTURE_FILE, REPORT_FILE
from opefo_trl.playground import MODEL, PLAYGROUND

if TYPE_CHECKING:
    from opefo_trl.trainer import OPEFOTrainer

logger = get_logger(__name__)

COUNTERS = ("num_tokens", "guard/skipped_steps")  # metrics that are replaced at every step rather than added to


class Recording(TrainerCallback):
    """Lives beside an `OPEFOTrainer`; active on the first rank alone, and only with `entropy_curves=True`."""

    def __init__(self, trainer: OPEFOTrainer):
        self.trainer = trainer
        self.active = trainer.args.entropy_curves and trainer.is_world_process_zero()
        self.begin()

    def begin(self) -> None:
        self.recorder = CurveRecorder(Path(self.trainer.args.output_dir), _settings(self.trainer))
        self.facts: dict[str, float] = {}  # of the step under way, known before it ends
        self._candidates: list[dict[str, Any]] = []  # completions of the step under way, where they are to be shown
        self._counted: dict[str, int] = {}  # how many values of each of TRL's metrics are in a row by now

    @property
    def curves(self) -> EntropyCurves:
        return self.recorder.curves

    def sample(self, live: dict[str, Any], tokens: Tokens) -> None:
        """Keep completions of this micro-batch, if its step is one to be shown."""
        state = self.trainer.state
        if self.active and state.global_step + 1 in sample_steps(state.max_steps):
            step, tokenizer = state.global_step + 1, self.trainer._tokenizer
            self.keep(lambda: self._candidates.extend(sample_rows(step, live, tokens, tokenizer)))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One row: the means of what was measured since the row before."""
        if not self.active:
            return
        trainer = self.trainer
        row = {
            "step": trainer.state.global_step,
            "epoch": float(trainer.state.epoch or 0),
            "time": time.time(),
            **self.facts,
        }
        for name, values in trainer._metrics["train"].items():
            fresh = values if name in COUNTERS else values[self._counted.get(name, 0) :]
            known = [float(value) for value in fresh if value is not None and not math.isnan(value)]
            self._counted[name] = len(values)
            if known:
                row[name] = sum(known) / len(known)
        self.recorder.samples += extremes(self._candidates, [sample["advantage"] for sample in self._candidates])
        self._candidates = []
        self.keep(self.recorder.append, row)

    def logged(self) -> None:
        """TRL has emptied its lists of metrics."""
        self._counted.clear()

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        if self.active and self.recorder.rows:
            known = {name: value for name, value in metrics.items() if name.startswith("eval_") and value is not None}
            self.recorder.rows[-1].update({name: float(value) for name, value in known.items()})
            self.keep(self.recorder.write)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.draw()

    def draw(self) -> None:
        if self.active and self.recorder.rows:
            curves, folder = self.curves, self.recorder.folder
            self.keep(curves.plot, folder / PICTURE_FILE)
            self.keep(write_report, folder / REPORT_FILE, [curves])

    def save(self, checkpoint: Path) -> None:
        if self.active:
            self.draw()
            self.keep(self.recorder.save, checkpoint)

    def restore(self, checkpoint: Path) -> None:
        if self.active:
            problem = self.recorder.restore(checkpoint, self.trainer.state.global_step)
            if problem is not None:
                logger.warning(problem)

    def end(self) -> None:
        """However the run ended: nothing that was measured is lost."""
        if self.active and self.recorder.rows:
            self.keep(self.recorder.write)

    def keep(self, write: Callable[..., Any], *arguments: Any) -> None:
        """A full disk may cost a picture, never the run."""
        try:
            write(*arguments)
        except Exception as error:
            logger.warning(f"The entropy curves could not be written: {type(error).__name__}: {error}")


def _settings(trainer: OPEFOTrainer) -> dict[str, Any]:
    """What a legend or a page would like to know of a run."""
    args, model = trainer.args, get_config_model_id(trainer.model.config)
    names = ["control", "control_kwargs", *args.active_fields, "flow_estimator", "flow_scope"]
    names += ["learning_rate", "num_generations", "beta", "loss_type", "seed"]
    if Path(model).is_dir():
        model = PLAYGROUND if Path(model) == MODEL else Path(model).name
    return {
        "model": model,
        **{name: getattr(args, name) for name in names},
    }
