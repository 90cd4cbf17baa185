"""Training sets: load them, name their columns, clean them, and set rows aside to evaluate on."""

from opefo_trl.data.loading import (
    TEMPLATES,
    bare_problems,
    chat,
    clean,
    hold_out,
    load_splits,
    pick_split,
    whole_batches,
    with_template,
)

__all__ = [
    "TEMPLATES",
    "bare_problems",
    "chat",
    "clean",
    "hold_out",
    "load_splits",
    "pick_split",
    "whole_batches",
    "with_template",
]
