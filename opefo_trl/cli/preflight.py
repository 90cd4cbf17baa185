"""What can be known to go wrong before the first step, said before the first step."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig
from trl import ModelConfig

from opefo_trl.config import OPEFOConfig
from opefo_trl.data.cleaning import DAPO_AFTER, text_of
from opefo_trl.playground import resolve_model
from opefo_trl.rewards import MathReward


def check_sizes(args: OPEFOConfig, rows: int, evaluates: bool) -> None:
    prompts = args.generation_batch_size // args.num_generations
    if rows < prompts:
        raise ValueError(
            f"There are {rows} prompts to train on, and a rollout takes {prompts} (`generation_batch_size="
            f"{args.generation_batch_size}` / `num_generations={args.num_generations}`). Give more data, set aside "
            "fewer `eval_prompts`, or lower `per_device_train_batch_size`."
        )
    samples, batch = args.num_generations_eval or args.num_generations, args.per_device_eval_batch_size
    if evaluates and batch * args.world_size % samples:
        raise ValueError(
            f"`per_device_eval_batch_size={batch}` on {args.world_size} processes does not divide into groups of "
            f"{samples} samples (`num_generations_eval`, else `num_generations`). Use a multiple, or `eval_prompts=0`."
        )


def check_model(model: ModelConfig, trust_remote_code: bool) -> None:
    name = model.model_name_or_path
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"The model {name!r} cannot be loaded: there is no such folder.")
    if (Path(name) / "adapter_config.json").exists():  # which names its base model
        return
    try:
        AutoConfig.from_pretrained(
            resolve_model(name), revision=model.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def check_answers(rewards: Sequence[Callable[..., Any]], rows: Dataset, split: str) -> None:
    """An answer that cannot be read would make a problem that is never right, or never graded."""
    for reward in rewards:
        if isinstance(reward, MathReward):
            unreadable = reward.grader.unreadable(rows["answer"])
            if unreadable:
                first, answer = unreadable[0], rows[unreadable[0]]["answer"]
                raise ValueError(
                    f"{len(unreadable)} of {len(rows)} rows of the split {split!r} have answers that cannot be read, "
                    f"first row {first}, counted from 0: {answer!r}. Mend or drop them, or name another column: "
                    "--answer_column NAME."
                )
            return


def check_prompts(names: Sequence[str], prompt: Any) -> None:
    text = text_of(prompt)
    if "math" in names and "boxed" not in text and not text.endswith(DAPO_AFTER):
        warnings.warn(
            "The reward 'math' reads a \\boxed{}, which the first prompt does not ask for: a model that does not "
            "write one by itself is never right. --prompt_template boxed asks.",
            stacklevel=2,
        )
    if "math" in names and text.endswith(DAPO_AFTER):
        raise ValueError(
            "The prompts ask for a line 'Answer:', and the reward 'math' reads a \\boxed{}. Set --prompt_template "
            "boxed, or --reward_funcs math_answer_line."
        )
    if "math_answer_line" in names and "Answer:" not in text:
        raise ValueError(
            "The reward 'math_answer_line' reads a line 'Answer:', which the prompts do not ask for. Set "
            "--prompt_template dapo, or --reward_funcs math."
        )


def check_writable(folder: str) -> None:
    probe = Path(folder) / f".writable-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"Nothing can be written to `output_dir={folder!r}`: {error.strerror}.") from error


def check_columns(names: Sequence[str], functions: Sequence[Callable[..., Any]], columns: Sequence[str]) -> None:
    for name, function in zip(names, functions, strict=True):
        for column in missing_columns(function, columns):
            raise ValueError(
                f"The reward {name!r} needs a column {column!r}; the data has {', '.join(columns)}."
                + (" Name the one with the answers: --answer_column NAME." if column == "answer" else "")
            )


def missing_columns(function: Callable, columns: Sequence[str]) -> list[str]:
    """Parameters of a reward function that nothing will fill."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
    passed = set(columns) - {"prompt", "completion", "completion_ids"}  # TRL keeps these to itself
    parameters = inspect.signature(function).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in given | passed
    ]
