"""Command-line parts of train.py and eval.py: parser, preflight checks, progress bar, run folder."""
