"""Checks of the options of a control, which a user gives in `control_kwargs`."""

from __future__ import annotations

from functools import partial

from opefo_trl.validation import check_bool, check_choice, check_number

WHERE = " in `control_kwargs`"

number = partial(check_number, where=WHERE)
choice = partial(check_choice, where=WHERE)
switch = partial(check_bool, where=WHERE)
