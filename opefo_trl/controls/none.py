"""Plain GRPO. The flows are measured and logged all the same, so that a collapse can be seen."""

from opefo_trl.controls.base import Control


class NoControl(Control):
    """Leaves every update as it is: bitwise `GRPOTrainer`."""
