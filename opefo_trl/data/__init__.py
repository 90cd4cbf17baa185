"""Training sets: load them, find their columns, clean them, put templates on, select and hold out rows."""

from opefo_trl.data.cleaning import clean
from opefo_trl.data.columns import bare_problems
from opefo_trl.data.held_out import hold_out, whole_batches
from opefo_trl.data.loading import load_splits, pick_split
from opefo_trl.data.pass_rates import check_range, keep_by_pass_rate
from opefo_trl.data.templates import TEMPLATES, with_template

__all__ = [
    "TEMPLATES",
    "bare_problems",
    "check_range",
    "clean",
    "hold_out",
    "keep_by_pass_rate",
    "load_splits",
    "pick_split",
    "whole_batches",
    "with_template",
]
