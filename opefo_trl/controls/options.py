"""Options of a control: those with a field in the configuration, and checks of those given in `control_kwargs`."""

from __future__ import annotations

from functools import partial

from opefo_trl.validation import check_bool, check_choice, check_number

# `OPEFOConfig` fields that a control may take as options; all its other options come from `control_kwargs`
CONTROL_FIELDS = ("flow_lambda_max", "flow_target", "flow_schedule", "flow_shape")
# Fields of TRL that a control may ask for
RUN_FIELDS = ("num_train_epochs", "max_steps", "epsilon", "epsilon_high")

_WHERE = " in `control_kwargs`"

number = partial(check_number, where=_WHERE)
choice = partial(check_choice, where=_WHERE)
boolean = partial(check_bool, where=_WHERE)
