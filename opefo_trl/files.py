"""The names of the files of a run, and a way to write files that are whole at any moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

# In a run's output folder
CARD_FILE = "README.md"  # the model card
RUN_FILE = "run.json"  # the settings that train.py was started with
CURVES_FILE = "entropy_curves.parquet"  # one row for each optimizer step; a copy is in every checkpoint
TOKEN_SAMPLES_FILE = "flow_samples.json"  # completions with the flow of their tokens; likewise
PICTURE_FILE = "entropy_curves.png"
REPORT_FILE = "report.html"
SCORES_FILE = "eval_scores.parquet"  # benchmark scores of the checkpoints, from eval.py --watch
SCORES_PICTURE_FILE = "eval_curves.png"
DECONTAMINATED_FILE = "decontaminated.json"  # problems left out because a benchmark has them
NONFINITE_FOLDER = "nonfinite"  # rows of a step that was NaN or infinite
EVAL_FOLDER = "eval"  # results of eval.py
HUB_FOLDER = ".hub"  # saves on their way to the Hub

# In a checkpoint
CHECKPOINT_PREFIX = "checkpoint-"
TRAINER_STATE_FILE = "trainer_state.json"  # the last file that transformers writes
CONTROL_STATE_FILE = "control_state.json"

# In a model's folder
ADAPTER_FILE = "adapter_config.json"  # makes it a LoRA adapter's folder

# In a folder of eval.py
RESULTS_FILE = "results.json"
RESULTS_TABLE_FILE = "results.md"
SAMPLING_FILE = "settings.json"  # settings that identify samples
SAMPLES_FOLDER = "samples"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it to `path`: a process that dies leaves no half file."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)
