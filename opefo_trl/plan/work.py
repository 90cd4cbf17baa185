"""Tokens, FLOPs and time of an optimizer step.

A multiplication by a weight is 2 FLOPs per token and parameter; attention adds 4 per token, head dimension and token
that it looks at, half of the width on average. A backward pass costs two forward passes, or one with LoRA, where the
weights need no gradient. The time is a range: its lower end takes completions of half the limit and 50 % of what the
machine can do, its upper end all at the limit and 20 %. Rewards, saving and the update itself are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from opefo_trl.plan.memory import cache_bytes
from opefo_trl.plan.recipe import Machine, Recipe
from opefo_trl.plan.shapes import Shape

__all__: list[str] = []  # of use inside this package only

EFFICIENCY = (0.5, 0.2)  # of FLOPs and bandwidth, at the ends of the range; our choice


@dataclass(frozen=True)
class Work:
    """Work of one optimizer step, on all GPUs together, and its time."""

    tokens: int  # of prompts and completions, at most
    training_flops: float
    generation_flops: float
    training_seconds: tuple[float, float]
    generation_seconds: tuple[float, float]

    @property
    def seconds(self) -> tuple[float, float]:
        (fast, slow), (quick, late) = self.training_seconds, self.generation_seconds
        return fast + quick, slow + late


def measure_work(shape: Shape, recipe: Recipe, machine: Machine, at_once: int | None = None) -> Work:
    """Return the work of a step; `at_once` is the number of sequences that vLLM generates together."""
    rows = recipe.rows * recipe.micro_batches  # on each GPU
    ends = [(0.5 * recipe.completion, EFFICIENCY[0]), (float(recipe.completion), EFFICIENCY[1])]
    flops, speed = machine.teraflops * 1e12, machine.bandwidth * 1e12
    training, generation, training_seconds, generation_seconds = [], [], [], []
    for completion, efficiency in ends:
        forward = rows * forward_flops(shape, recipe.prompt, completion)
        training.append(forward * passes(recipe))
        generation.append(forward / recipe.iterations)
        moved = decoded_bytes(shape, recipe, completion, at_once) / recipe.iterations
        training_seconds.append(training[-1] / flops / efficiency)
        generation_seconds.append(max(generation[-1] / flops, moved / speed) / efficiency)
    return Work(
        tokens=machine.gpus * rows * recipe.width,
        training_flops=machine.gpus * training[1],
        generation_flops=machine.gpus * generation[1],
        training_seconds=(training_seconds[0], training_seconds[1]),
        generation_seconds=(generation_seconds[0], generation_seconds[1]),
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


def decoded_bytes(shape: Shape, recipe: Recipe, completion: float, at_once: int | None) -> float:
    """Return the bytes that a GPU reads to generate its part of a step: all weights and the cache, for each token."""
    ranks, size = (recipe.engine.ranks, 2) if recipe.engine else (1, recipe.weight_bytes)
    sequences = recipe.rows * recipe.micro_batches * ranks  # that an engine generates
    together = max(1, min(at_once or sequences, sequences))
    cache = together * (recipe.prompt + completion / 2) * cache_bytes(shape, size)
    return sequences / together * completion * (size * shape.parameters + cache) / ranks
