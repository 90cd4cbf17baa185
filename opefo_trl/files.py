"""The names of the files of a run, and a way to write files that are whole at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]

# In a run's output folder
CARD_FILE = "README.md"  # the model card
RUN_FILE = "run.json"  # the settings that train.py was started with
CURVES_FILE = "entropy_curves.parquet"  # one row for each optimizer step; a copy is in every checkpoint
TOKEN_SAMPLES_FILE = "flow_samples.json"  # completions with the flow of their tokens; likewise
PICTURE_FILE = "entropy_curves.png"
REPORT_FILE = "report.html"
SCORES_FILE = "eval_scores.parquet"  # benchmark scores of the checkpoints, from `opefo-trl eval --watch`
SCORES_PICTURE_FILE = "eval_curves.png"
DECONTAMINATED_FILE = "decontaminated.json"  # problems left out because a benchmark has them
NONFINITE_FOLDER = "nonfinite"  # rows of a step that was NaN or infinite
EVAL_FOLDER = "eval"  # results of eval.py
HUB_FOLDER = ".hub"  # saves on their way to the Hub
LAST_CHECKPOINT_FOLDER = "last-checkpoint"  # on the Hub, and where it was downloaded from there
# Not for the run's repository, or published by eval.py
PRIVATE_FILES = (*("_*", ".*", "*.part", "checkpoint-*"), LAST_CHECKPOINT_FOLDER, NONFINITE_FOLDER, EVAL_FOLDER)
# Written once and never in place, so that a link is as good as a copy; other files are small and may still grow
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp")

# In a checkpoint
CHECKPOINT_PREFIX = "checkpoint-"
TRAINER_STATE_FILE = "trainer_state.json"  # the last file that transformers writes
CONTROL_STATE_FILE = "control_state.json"
# Not of the model: what resuming needs, and older copies of files of the output folder
TRAINING_STATE_FILES = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
    *(TRAINER_STATE_FILE, CONTROL_STATE_FILE, CURVES_FILE, TOKEN_SAMPLES_FILE, CARD_FILE, "*.part"),
)

# In a model's folder
ADAPTER_FILE = "adapter_config.json"  # makes it a LoRA adapter's folder

# In a folder of eval.py
RESULTS_FILE = "results.json"
RESULTS_TABLE_FILE = "results.md"
SAMPLING_FILE = "settings.json"  # settings that identify samples
SAMPLES_FOLDER = "samples"
PASS_RATES_FOLDER = "pass_rates"  # samples of training sets, and beside them a file of pass rates for each


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`: a process that dies leaves no half file."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def list_files(folder: Path, unwanted: Sequence[str] = ()) -> dict[str, Path]:
    """Return files by their paths in `folder`. Skip `unwanted` folders: their files may vanish meanwhile."""
    files = {}
    for parent, folders, found in os.walk(folder):
        for entries in (folders, found):
            entries[:] = [name for name in sorted(entries) if not any(fnmatch(name, glob) for glob in unwanted)]
        files.update({Path(parent, name).relative_to(folder).as_posix(): Path(parent, name) for name in found})
    return files
