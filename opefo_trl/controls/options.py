"""Sources of a control's options (config fields or `control_kwargs`), and checks of the latter."""

from __future__ import annotations

from functools import partial

from opefo_trl.validation import check_bool, check_choice, check_number

__all__: list[str] = []  # of use inside this package only

# Options that are filled from fields of `OPEFOConfig`, and from fields of TRL; all others come from `control_kwargs`
CONTROL_FIELDS = ("flow_lambda_max", "flow_target", "flow_schedule", "flow_shape", "flow_rows", "flow_sides")
RUN_FIELDS = ("num_train_epochs", "max_steps", "epsilon", "epsilon_high")

_WHERE = " in `control_kwargs`"

number = partial(check_number, where=_WHERE)
choice = partial(check_choice, where=_WHERE)
boolean = partial(check_bool, where=_WHERE)
