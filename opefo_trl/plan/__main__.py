"""Predict whether a recipe fits its machine, and how long a step takes.

    opefo-trl plan --config qwen2.5-math-7b --gpus 8 --memory 80
    opefo-trl plan --config qwen2.5-math-7b --accelerate_config fsdp2
    opefo-trl plan --config qwen2.5-0.5b-gsm8k --memory 24 --per_device_train_batch_size 64

Options of `opefo-trl train` override the recipe. Exit status: 0 if the recipe fits, 1 if it does not, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import psutil
import yaml

from opefo_trl.cli.parser import check_names, plain_errors, read_config, split_options
from opefo_trl.cli.recipe_files import MACHINES, RECIPES, TOP, find_file
from opefo_trl.plan.memory import GIB, RESERVED, Plan, predict, sequences_at_once
from opefo_trl.plan.recipe import DEFAULTS, PROMPT_TOKENS, SHARDINGS, Machine, Recipe, read_recipe, read_sharding
from opefo_trl.plan.shapes import Shape, load_shape
from opefo_trl.plan.work import Work, measure_work
from opefo_trl.validation import check_bool, check_number

__all__: list[str] = []  # `opefo-trl plan` is the way in


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "opefo-trl plan",
        description=f"{__doc__.splitlines()[0]} Options of `opefo-trl train` override the recipe.",
        usage="opefo-trl plan --config RECIPE [--OPTION VALUE ...]",
        epilog="Page: docs/performance.md",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=119, max_help_position=32),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="RECIPE", help="name of a recipe, or a file")
    add("--accelerate_config", metavar="MACHINE", help="name of a machine, a config file, or a number of GPUs")
    add(
        "--gpus", type=int, help="number of GPUs, or of processes on a CPU (default: of the accelerate config, else 1)"
    )
    add("--memory", type=float, help="of each GPU, in GiB (default: 80; on a CPU, an equal share of this machine's)")
    add("--sharding", choices=SHARDINGS, help="default: of the accelerate config, else zero3 on several GPUs")
    add("--prompt_tokens", type=int, default=PROMPT_TOKENS, help="tokens of the longest prompt (default: 256)")
    add("--teraflops", type=float, help="dense bf16 TFLOP/s of each GPU (default: 312, an A100; 0.2 on a CPU)")
    add("--bandwidth", type=float, help="of each GPU's memory, in TB/s (default: 2, an A100; 0.02 on a CPU)")
    with plain_errors(parser.prog):
        options, overrides = parser.parse_known_args(arguments)
        config = read_config(str(find_file("config", options.config, RECIPES)))
        given = read_overrides(split_options(overrides))
        values = config | given
        if not values.get("model_name_or_path"):
            raise ValueError(f"{options.config!r} names no model. Give --model_name_or_path NAME.")
        known = train_options()
        check_names(config, known, f"in {options.config}")
        check_names(given, known | vars(options).keys(), "on the command line")
        machine = read_machine(options, not check_bool("use_cpu", values.get("use_cpu", False)))
        shape = load_shape(values["model_name_or_path"])
        recipe = read_recipe(values, int(check_number("prompt_tokens", options.prompt_tokens, 1)), machine.gpus)
    plan = predict(shape, recipe, machine)
    at_once = sequences_at_once(plan, recipe)
    print(f"{values['model_name_or_path']}, {describe(shape, recipe, machine)}\n")
    print(table(plan))
    print(f"\n{sentences(plan, machine, measure_work(shape, recipe, machine, at_once), at_once)}")
    raise SystemExit(1 if plan.problems else 0)


# ---- what the command line and its files say


def train_options() -> set[str]:
    """Return the names of all options of train.py, most of which no plan depends on."""
    script = runpy.run_path(str(TOP / "train.py"))["ScriptArguments"]
    return {*DEFAULTS, *(field.name for field in fields(script)), "env"}


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of train.py among these words: a name, and the values up to the next name."""
    values: dict[str, list[Any]] = {}
    for word in words:
        name, has_value, value = word.partition("=")  # of a VALUE that begins with a dash
        if not word.startswith("--"):
            if not values:
                raise ValueError(f"{word!r} belongs to no option. Options begin with --, as in --gpus 8.")
            values[next(reversed(values))].append(yaml.safe_load(word))
            continue
        values[name[2:]] = [yaml.safe_load(value)] if has_value else []
    return {name: (given[0] if len(given) == 1 else given or True) for name, given in values.items()}


def read_machine(options: argparse.Namespace, on_gpu: bool) -> Machine:
    launch: dict[str, Any] = {}
    if (options.accelerate_config or "").isdecimal():
        launch = {"num_processes": int(options.accelerate_config), "distributed_type": "MULTI_GPU"}
    elif options.accelerate_config:
        launch = read_config(str(find_file("accelerate_config", options.accelerate_config, MACHINES)))
    gpus = int(check_number("gpus", launch.get("num_processes", 1) if options.gpus is None else options.gpus, 1))
    sharding = options.sharding or (read_sharding(launch) if launch else "zero3" if on_gpu and gpus > 1 else "ddp")
    defaults = (80.0, 312.0, 2.0) if on_gpu else (psutil.virtual_memory().total / GIB / gpus, 0.2, 0.02)
    given = {name: getattr(options, name) for name in ("memory", "teraflops", "bandwidth")}
    numbers = {
        name: check_number(name, default if value is None else value, above=0)
        for (name, value), default in zip(given.items(), defaults, strict=True)
    }
    if gpus == 1 and not sharding.startswith("zero"):  # DeepSpeed keeps 32-bit copies on one GPU as well
        sharding = "none"
    return Machine(gpus=gpus, sharding=sharding, on_gpu=on_gpu, **numbers)


# ---- what is printed


def describe(shape: Shape, recipe: Recipe, machine: Machine) -> str:
    device = "GPU" if machine.on_gpu else "process"
    several = f"{machine.gpus} {device}{'' if machine.gpus == 1 else 's' if machine.on_gpu else 'es'}"
    rows = machine.gpus * recipe.rows * recipe.micro_batches
    return (
        f"{shape.parameters / 1e6:,.1f} million parameters, on {several} of {machine.memory:.4g} GiB, sharding "
        f"{machine.sharding}\n{rows} completions of up to {recipe.prompt} + {recipe.completion} tokens a step, "
        f"{recipe.rows} in a micro-batch on each {device}"
    )


def table(plan: Plan) -> str:
    phases = (plan.training, plan.generating)
    rows = {name: [phase.get(name, 0.0) / GIB for phase in phases] for name in plan.training | plan.generating}
    rows = {name: row for name, row in rows.items() if any(row)}
    rows["sum"] = [sum(phase.values()) / GIB for phase in phases]
    lines = [f"{name:14} {training:9.2f} {generating:11.2f}" for name, (training, generating) in rows.items()]
    return "\n".join([f"{'GiB of each':14} {'training':>9} {'generating':>11}", *lines])


def sentences(plan: Plan, machine: Machine, work: Work, at_once: int | None) -> str:
    moments = ", ".join(f"{moment} {size / GIB:.2f}" for moment, size in plan.moments.items())
    lines = [f"Gradients, activations and logits within a micro-batch, GiB:\n  {moments}."]
    if plan.cache_tokens is not None:
        lines.append(
            f"vLLM: a cache of {max(0, plan.cache_tokens):,} tokens, {at_once} of the longest sequences at once."
        )
    (train, train_slow), (generate, generate_slow) = work.training_seconds, work.generation_seconds
    lines.append(
        f"A step: up to {work.tokens:,} tokens, {work.training_flops / 1e12:,.2f} TFLOPs to train on them and "
        f"{work.generation_flops / 1e12:,.2f} to generate them.\nBetween {train + generate:,.1f} and "
        f"{train_slow + generate_slow:,.1f} seconds: training {train:,.1f} to {train_slow:,.1f}, generation "
        f"{generate:,.1f} to {generate_slow:,.1f}."
    )
    spare = plan.memory - max(sum(plan.training.values()), sum(plan.generating.values()))
    reserved = f" beside {RESERVED / GIB:g} kept for CUDA" if machine.on_gpu else ""
    fits = f"It fits, with {spare / GIB:.1f} GiB to spare{reserved}."
    lines.append(f"It does not fit: {'; '.join(plan.problems)}." if plan.problems else fits)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
