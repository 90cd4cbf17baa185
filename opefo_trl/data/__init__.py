"""Training sets: load them, find their columns, clean them, put templates on, and hold rows out for evaluation."""

from opefo_trl.data.cleaning import clean
from opefo_trl.data.columns import bare_problems
from opefo_trl.data.held_out import hold_out, whole_batches
from opefo_trl.data.loading import load_splits, pick_split
from opefo_trl.data.templates import TEMPLATES, with_template

__all__ = [
    "TEMPLATES",
    "bare_problems",
    "clean",
    "hold_out",
    "load_splits",
    "pick_split",
    "whole_batches",
    "with_template",
]
