"""The embedded default: a tiny model, its tokenizer and a task with many right answers. No network, no GPU.

    OPEFOTrainer("playground", playground_reward, args, train_dataset=playground_dataset("train"))

The model has Qwen2's architecture and 0.4 million parameters. It writes arithmetic expressions and hits its target now
and then, so that a few minutes on a CPU show what RLVR does to a policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from opefo_trl.playground.task import HELD_OUT, TARGETS, is_right, playground_reward, question
from opefo_trl.validation import check_choice

PLAYGROUND = "playground"
MODEL = Path(__file__).parent / "model"
SPLITS = {"train": [target for target in TARGETS if target not in HELD_OUT], "test": list(HELD_OUT)}

__all__ = ["MODEL", "PLAYGROUND", "is_right", "playground_dataset", "playground_reward", "resolve_model"]


def playground_dataset(split: str = "train") -> Dataset:
    """Return conversational prompts, each with its `target`; the splits have no target in common."""
    check_choice("split", split, SPLITS, where=" of the playground")
    rows = [{"prompt": [{"role": "user", "content": question(target)}], "target": target} for target in SPLITS[split]]
    return Dataset.from_list(rows)


def resolve_model(model: Any) -> Any:
    """Return the folder of the packaged model for `"playground"`, and everything else unchanged."""
    return str(MODEL) if isinstance(model, str) and model == PLAYGROUND else model
