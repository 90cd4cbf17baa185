"""A plot in a notebook that is redrawn while the run goes on."""

from __future__ import annotations

import time
from typing import Any, Protocol

from accelerate import PartialState
from transformers import TrainerCallback

from opefo_trl.curves.record import EntropyCurves


class _HasCurves(Protocol):
    @property
    def curves(self) -> EntropyCurves | None: ...


class LivePlot(TrainerCallback):
    """
    Redraws the curves of a run every `seconds`, in the notebook cell that called `trainer.train()`.

        trainer.add_callback(LivePlot(trainer))
    """

    def __init__(self, trainer: _HasCurves, seconds: float = 10.0):
        if trainer.curves is None and PartialState().is_main_process:  # other ranks never have curves
            raise ValueError("There is nothing to plot with `entropy_curves=False`. Set it to True.")
        self._trainer, self._seconds = trainer, seconds
        self._handle: Any = None
        self._next_drawing = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() >= self._next_drawing:
            self._draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        assert self._trainer.curves is not None
        figure = self._trainer.curves.plot()
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        self._next_drawing = time.monotonic() + self._seconds
