"""Tokens, FLOPs and time of an optimizer step.

A multiplication by a weight is 2 FLOPs per token and parameter; attention adds 4 per token, head dimension and token
that it looks at, half of the width on average. A backward pass costs two forward passes, or one with LoRA, where the
weights need no gradient. The time is a range: its lower end takes completions of half the limit and 50 % of what the
machine can do, its upper end all at the limit and 10 %. A GPU needs a time for each pass through a block at least,
which rules with small models. Rewards, saving and the update itself are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from opefo_trl.plan.memory import cache_bytes
from opefo_trl.plan.recipe import Machine, Recipe
from opefo_trl.plan.shapes import Shape

__all__: list[str] = []  # of use inside this package only

# Ends of the range: share of the longest completion, of FLOPs and bandwidth, and seconds to launch the kernels of a
# block. Our choice, after the steps of two small models on one H100 (docs/performance.md)
ENDS = ((0.5, 0.5, 0.2e-3), (1.0, 0.1, 2e-3))
CUDA_GRAPHS = 0.1  # of that time, for vLLM


@dataclass(frozen=True)
class Work:
    """Work of one optimizer step, on all GPUs together, and its time."""

    tokens: int  # of prompts and completions, at most
    training_flops: float
    generation_flops: float
    training_seconds: tuple[float, float]
    generation_seconds: tuple[float, float]


def measure_work(shape: Shape, recipe: Recipe, machine: Machine, at_once: int | None = None) -> Work:
    """Return the work of a step; `at_once` is the number of sequences that vLLM generates together."""
    rows = recipe.rows * recipe.micro_batches  # on each GPU
    flops, speed = machine.teraflops * 1e12, machine.bandwidth * 1e12
    seconds: tuple[list[float], list[float]] = ([], [])
    training = generation = 0.0
    for share, efficiency, launch in ENDS:
        completion, block = share * recipe.completion, launch * shape.layers * machine.on_gpu
        generation = rows * forward_flops(shape, recipe.prompt, completion) / recipe.iterations
        training = generation * recipe.iterations * passes(recipe)
        seconds[0].append(max(training / flops / efficiency, block * passes(recipe) * recipe.micro_batches))
        forwards, moved = decoding(shape, recipe, completion, at_once)
        block *= CUDA_GRAPHS if recipe.engine or recipe.served else 1
        seconds[1].append(max(generation / flops / efficiency, moved / speed / efficiency, block * forwards))
    return Work(
        tokens=machine.gpus * rows * recipe.width,
        training_flops=machine.gpus * training,
        generation_flops=machine.gpus * generation,
        training_seconds=(seconds[0][0], seconds[0][1]),
        generation_seconds=(seconds[1][0], seconds[1][1]),
    )


def passes(recipe: Recipe) -> int:
    """Return how many forward passes the training of a micro-batch costs."""
    backward = 1 if recipe.lora_rank else 2
    return 1 + backward + recipe.checkpointing + recipe.scoring_pass + recipe.reference_pass


def forward_flops(shape: Shape, prompt: float, completion: float) -> float:
    """Return the FLOPs of a forward pass over a row; the LM head sees the completion alone."""
    width = prompt + completion
    attention = 4 * shape.layers * shape.heads * shape.head_dim * width / 2
    return 2 * (shape.linear_parameters * width + shape.embedding_parameters * completion) + attention * width


def decoding(shape: Shape, recipe: Recipe, completion: float, at_once: int | None) -> tuple[float, float]:
    """Return how many tokens a GPU generates one after the other for its part of a step, and the bytes that it reads
    for them: all weights and the cache, each time."""
    ranks, size = (recipe.engine.ranks, 2) if recipe.engine else (1, recipe.weight_bytes)
    sequences = recipe.rows * recipe.micro_batches * ranks / recipe.iterations  # that an engine generates
    together = max(1, min(at_once or sequences, sequences))
    cache = together * (recipe.prompt + completion / 2) * cache_bytes(shape, size)
    forwards = sequences / together * completion
    return forwards, forwards * (size * shape.parameters + cache) / ranks
