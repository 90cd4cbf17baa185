"""The command `opefo-trl`, and parts of train.py and eval.py: parser, preflight checks, progress bar, run folder."""
