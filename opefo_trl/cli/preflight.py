"""Preflight checks: mistakes that can be found before the first step."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import AutoConfig
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig

from opefo_trl.config import OPEFOConfig
from opefo_trl.data.templates import DAPO_SUFFIX, text_of
from opefo_trl.plan.memory import GIB, predict
from opefo_trl.plan.recipe import Machine, read_recipe
from opefo_trl.plan.shapes import load_shape
from opefo_trl.playground import resolve_model
from opefo_trl.rewards import MathReward

__all__: list[str] = []  # of use inside this package only

# Arguments that TRL passes to every reward function, besides the columns of the data
_TRL_ARGUMENTS = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}
_KEPT_BY_TRL = {"prompt", "completion", "completion_ids"}  # columns that `_calculate_rewards` does not pass on


def check_sizes(args: OPEFOConfig, rows: int, evaluates: bool) -> None:
    """Check that the data fill a rollout, and that evaluation batches hold whole groups of samples."""
    prompts = args.generation_batch_size // args.num_generations
    if rows < prompts:
        raise ValueError(
            f"There are {rows} prompts to train on, but a rollout takes {prompts} (`generation_batch_size="
            f"{args.generation_batch_size}` / `num_generations={args.num_generations}`). Give more data, hold out "
            f"fewer `eval_prompts`, or lower `per_device_train_batch_size={args.per_device_train_batch_size}`, which "
            f"counts for each of the {args.world_size} processes."
        )
    samples, batch = args.num_generations_eval or args.num_generations, args.per_device_eval_batch_size
    if evaluates and batch * args.world_size % samples:
        raise ValueError(
            f"`per_device_eval_batch_size={batch}` on {args.world_size} processes does not divide into groups of "
            f"{samples} samples (`num_generations_eval`, else `num_generations`). Use a multiple, or `eval_prompts=0`."
        )


def check_model(model: ModelConfig, trust_remote_code: bool) -> None:
    """Check that the model's configuration can be loaded. (An adapter has none.)"""
    name = model.model_name_or_path
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"The model {name!r} cannot be loaded: there is no such folder.")
    path = resolve_model(name)
    if find_adapter_config_file(path, revision=model.model_revision):
        return
    try:
        AutoConfig.from_pretrained(path, revision=model.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def warn_about_memory(args: OPEFOConfig, model: ModelConfig, prompts: Sequence[Any]) -> None:
    """Warn if this run cannot fit into the memory of its device, as far as its model is one that the plan knows."""
    longest = max(len(text_of(prompt)) for prompt in prompts)
    tokens = longest // 3 + 32  # roughly: three characters each, and a chat template
    try:
        shape = load_shape(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
        )
        recipe = read_recipe(vars(model) | vars(args), tokens)
        problems = predict(shape, recipe, machine_of(args)).problems
    except ValueError:  # LoRA on layers that the plan does not count, say
        return
    if problems and args.process_index == 0:
        warnings.warn(
            f"This run will probably run out of memory: {'; '.join(problems)}. Lower `per_device_train_batch_size` "
            "(and raise `gradient_accumulation_steps`), set `gradient_checkpointing=True`, use more GPUs or LoRA; "
            "`opefo-trl plan --config FILE` shows what takes the memory.",
            stacklevel=2,
        )


def machine_of(args: OPEFOConfig) -> Machine:
    """Describe what this run has, for the plan."""
    on_gpu, processes = args.device.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    total = torch.cuda.get_device_properties(args.device).total_memory if on_gpu else psutil.virtual_memory().total
    return Machine(args.world_size, total / GIB / (1 if on_gpu else processes), sharding_of(args), on_gpu)


def sharding_of(args: OPEFOConfig) -> str:
    """Return what `accelerate launch` spreads over the processes, by the name that the plan has for it."""
    if args.deepspeed_plugin is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}" if args.deepspeed_plugin.zero_stage else "ddp"
    if args.world_size == 1:
        return "none"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"  # no Accelerator has read it yet


def check_answers(rewards: Sequence[Callable[..., Any]], rows: Dataset, split: str) -> None:
    """Check that math-verify reads every answer: a problem without a readable one is never right, or never graded."""
    reward = next((reward for reward in rewards if isinstance(reward, MathReward)), None)
    unreadable = reward.grader.unreadable(rows["answer"]) if reward is not None else []
    if unreadable:
        first = unreadable[0]
        raise ValueError(
            f"{len(unreadable)} of {len(rows)} rows of the split {split!r} have answers that cannot be read; the "
            f"first is row {first}, counted from 0: {rows[first]['answer']!r}. Correct or remove them, or name "
            "another column: --answer_column NAME."
        )


def check_prompts(names: Sequence[str], prompt: Any) -> None:
    """Check that the prompts ask for the form of answer that the rewards read."""
    text = text_of(prompt)
    asks_for_line = text.endswith(DAPO_SUFFIX)
    if "math" in names and "boxed" not in text and not asks_for_line:
        warnings.warn(
            "The reward 'math' reads a \\boxed{}, which the first prompt does not ask for: a model that does not "
            "write one by itself is never right. Set --prompt_template boxed to ask for it.",
            stacklevel=2,
        )
    if "math" in names and asks_for_line:
        raise ValueError(
            "The prompts ask for a line 'Answer:', but the reward 'math' reads a \\boxed{}. Set --prompt_template "
            "boxed, or --reward_funcs math_answer_line."
        )
    if "math_answer_line" in names and "Answer:" not in text:
        raise ValueError(
            "The reward 'math_answer_line' reads a line 'Answer:', which the prompts do not ask for. Set "
            "--prompt_template dapo, or --reward_funcs math."
        )


def check_writable(folder: str) -> None:
    """Check that files can be written to the output folder."""
    probe = Path(folder) / f".writable-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"`output_dir={folder!r}` cannot be written to: {error.strerror}.") from error


def check_columns(names: Sequence[str], functions: Sequence[Callable[..., Any]], columns: Sequence[str]) -> None:
    """Check that the data have the columns that the reward functions take as arguments, and that the functions take
    all that they are given."""
    for name, function in zip(names, functions, strict=True):
        if surplus := surplus_arguments(function, columns):
            raise ValueError(
                f"The reward {name!r} takes no {', '.join(surplus)}, but TRL gives every reward function all columns "
                "of the data and arguments of its own. End its parameters with **kwargs."
            )
        for column in missing_columns(function, columns):
            raise ValueError(
                f"The reward {name!r} needs a column {column!r}; the data has {', '.join(columns)}."
                + (" Name the column with the answers: --answer_column NAME." if column == "answer" else "")
            )


def _given_to_rewards(columns: Sequence[str]) -> set[str]:
    """Return the arguments that TRL gives to a reward function, in some settings at least."""
    return _TRL_ARGUMENTS | (set(columns) - _KEPT_BY_TRL)


def surplus_arguments(function: Callable, columns: Sequence[str]) -> list[str]:
    """Return the arguments that TRL will give to a reward function, and that it does not take."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return []
    optional = {"environments"}  # given where there are any
    return sorted(_given_to_rewards(columns) - optional - {parameter.name for parameter in parameters})


def missing_columns(function: Callable, columns: Sequence[str]) -> list[str]:
    """Return the required parameters of a reward function that neither TRL nor a column fills."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in _given_to_rewards(columns)
    ]
