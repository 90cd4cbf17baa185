"""Plain GRPO. The flows are still measured and logged, so that a collapse is visible."""

from opefo_trl.controls.base import Control


class NoControl(Control):
    """Change nothing: the run is bitwise that of `GRPOTrainer`."""
