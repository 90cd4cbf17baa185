"""A picture in a notebook that grows while the run goes on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from opefo_trl.trainer import OPEFOTrainer


class LivePlot(TrainerCallback):
    """
    Redraws a run's curves in the notebook cell that trains, every `seconds`.

        trainer.add_callback(LivePlot(trainer))
    """

    def __init__(self, trainer: OPEFOTrainer, seconds: float = 10.0):
        if not trainer.args.entropy_curves:
            raise ValueError("There is nothing to plot with `entropy_curves=False`. Set it to True.")
        self.trainer, self.seconds = trainer, seconds
        self.handle: Any = None
        self.next_drawing = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() >= self.next_drawing:
            self.draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.draw()

    def draw(self) -> None:
        from IPython.display import display

        assert self.trainer.curves is not None
        figure = self.trainer.curves.plot()
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        self.next_drawing = time.monotonic() + self.seconds
