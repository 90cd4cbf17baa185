"""The embedded default: a tiny model, its tokenizer and a task with many right answers. No network, no GPU.

    OPEFOTrainer("playground", playground_reward, args, train_dataset=playground_dataset("train"))

The model has Qwen2's architecture and 0.4 million parameters. It writes arithmetic expressions and hits its target now
and then, so that a few minutes on a CPU show what RLVR does to a policy. Two more tasks, `words` and `sentences`, are
in English, for a small language model: smollm2.py makes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from opefo_trl.playground import sentences, task, words
from opefo_trl.playground.sentences import sentences_reward
from opefo_trl.playground.task import is_right, playground_reward, question
from opefo_trl.playground.words import words_reward

PLAYGROUND = "playground"
MODEL = Path(__file__).parent / "model"
TASKS = {PLAYGROUND: task.TASK, "words": words.TASK, "sentences": sentences.TASK}

__all__ = [
    "MODEL",
    "PLAYGROUND",
    "TASKS",
    "is_right",
    "playground_dataset",
    "playground_reward",
    "question",
    "resolve_model",
    "sentences_reward",
    "words_reward",
]


def playground_dataset(split: str = "train") -> Dataset:
    """Return conversational prompts, each with its `target`; the splits have no target in common."""
    return TASKS[PLAYGROUND].dataset(split)


def resolve_model(model: Any) -> Any:
    """Return the folder of the packaged model for `"playground"`, and everything else unchanged."""
    return str(MODEL) if isinstance(model, str) and model == PLAYGROUND else model
