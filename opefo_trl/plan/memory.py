"""Memory of a run, in bytes per GPU, from shapes and settings alone.

    training   = weights + gradients + optimizer + reference + communication + activations + logits + engine
    generating = weights + optimizer + reference + engine, or the cache of transformers' generation, or neither if a
                 vLLM server generates on GPUs of its own

Activations are the tensors that autograd saves for the backward pass, counted as transformers runs a block. With
gradient checkpointing a block saves its input alone, and one block at a time is computed again. TRL 1.16 never holds
all logits: it projects tiles of 4096 tokens by 32768 words, and accumulates the gradient of the LM head in float32. A
micro-batch has its peak at one of four moments (`step_moments`). Rows are taken to be as long as they can be.

Not counted: offloading, reward models, evaluation, models that are no dense decoders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opefo_trl.plan.recipe import Machine, Recipe
from opefo_trl.plan.shapes import Shape

__all__: list[str] = []  # of use inside this package only

GIB = 2**30
TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's fused LM head
TILE_COPIES = (3, 7.25)  # float32 temporaries of its `_forward_tile` and `_backward_tile`, which run without Triton

# Our choice, where nothing was measured
RESERVED = 1.5 * GIB  # of a GPU: CUDA context, NCCL, fragmentation
ENGINE_SCRATCH = 1.5 * GIB  # of vLLM: CUDA graphs, and activations of its largest batch
ENGINE_ASLEEP = 1.0 * GIB  # what vLLM keeps while it sleeps

# Full-size buffers of parameters and gradients in flight, in elements: DeepSpeed's defaults
_BUFFERS = {"zero1": 1e9, "zero2": 1e9, "zero3": 1.5e9}  # two buckets of 5e8; 1e9 live parameters and a bucket


@dataclass(frozen=True)
class Plan:
    """Bytes per GPU by part, while training and while generating, and what fits into vLLM's cache."""

    training: dict[str, float]
    generating: dict[str, float]
    moments: dict[str, float]  # of a micro-batch: what it takes at each of them; `training` counts the largest
    memory: float  # that a GPU has for these parts
    cache_tokens: int | None = None  # of one vLLM engine
    sequence: int = 0  # tokens of the longest sequence that vLLM must be able to hold

    @property
    def problems(self) -> list[str]:
        """Why the run cannot fit; empty if it fits."""
        found = [
            f"{phase} takes {sum(parts.values()) / GIB:.1f} GiB of {self.memory / GIB:.1f}"
            for phase, parts in (("training", self.training), ("generating", self.generating))
            if sum(parts.values()) > self.memory
        ]
        if self.cache_tokens is not None and self.cache_tokens < self.sequence:
            found.append(
                f"vLLM's cache holds {max(0, self.cache_tokens)} tokens, fewer than one sequence of {self.sequence}"
            )
        return found


def predict(shape: Shape, recipe: Recipe, machine: Machine) -> Plan:
    """Return the memory of a run on one of its GPUs."""
    kept = kept_parts(shape, recipe, machine)
    moments = step_moments(shape, recipe, machine)
    training = kept | max(moments.values(), key=lambda parts: sum(parts.values()))
    generating = kept | ({"gradients": training["gradients"]} if machine.sharding == "zero3" else {})
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    memory = machine.memory * GIB - (RESERVED if machine.on_gpu else 0)
    if recipe.served:
        return Plan(training, generating, sums, memory)
    if recipe.engine is None:
        generating["weights"] *= machine.shards("weights")  # TRL gathers them
        size = hidden_bytes(recipe, machine)
        generating["cache"] = recipe.rollout_rows * recipe.width * cache_bytes(shape, size)
        return Plan(training, generating, sums, memory)
    engine, held = recipe.engine, recipe.engine.utilization * machine.memory * GIB
    training["engine"] = ENGINE_ASLEEP if engine.sleeps else held
    generating["engine"] = held
    # vLLM quantizes what the run does, and serves the rest in 16 bits
    served = frozen_bytes(shape, replace(recipe, weight_bytes=2), machine)
    room = held - served / engine.ranks - ENGINE_SCRATCH
    tokens = int(room / (cache_bytes(shape, 2) / min(engine.ranks, shape.kv_heads)))  # each has a head at least
    return Plan(training, generating, sums, memory, tokens, engine.longest or shape.context)


def cache_bytes(shape: Shape, size: int) -> int:
    """Return the bytes that a token takes in a cache of keys and values."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * size


def sequences_at_once(plan: Plan, recipe: Recipe) -> int | None:
    """Return how many of the longest sequences an engine generates together: its cache and TRL's limit decide."""
    if plan.cache_tokens is None or recipe.engine is None:
        return None
    return max(0, min(plan.cache_tokens // recipe.width, recipe.rollout_rows * recipe.engine.ranks))


# ---- what is there between two steps


def kept_parts(shape: Shape, recipe: Recipe, machine: Machine) -> dict[str, float]:
    """Return the bytes of weights, optimizer, a reference model, and buffers for communication."""
    trained = trained_parameters(shape, recipe)
    weight, _, states = trained_sizes(recipe, machine)
    frozen = frozen_bytes(shape, recipe, machine) if recipe.lora_rank else 0
    copy = shape.parameters * hidden_bytes(recipe, machine) if recipe.reference else 0
    sharded = machine.shards("weights")
    buffers = _BUFFERS.get(machine.sharding, 0.0) * 2
    if machine.sharding == "ddp":  # a copy of all gradients, in buckets
        buffers = trained * weight
    elif machine.sharding == "fsdp":  # the gathered weights of two blocks, and of the embeddings and the head
        buffers = 2 * (2 * shape.linear_parameters / shape.layers + (2 - shape.tied) * shape.embedding_parameters)
    return {
        "weights": (trained * weight + frozen) / sharded,
        "optimizer": trained * states / machine.shards("optimizer"),
        "reference": copy / sharded,
        "communication": buffers if machine.gpus > 1 else 0.0,
    }


def trained_parameters(shape: Shape, recipe: Recipe) -> int:
    if recipe.lora_rank:
        return shape.lora_parameters(recipe.lora_rank, recipe.lora_targets)
    return shape.parameters


def trained_sizes(recipe: Recipe, machine: Machine) -> tuple[float, float, float]:
    """Return the bytes of weight, gradient and optimizer of one trained parameter, before they are sharded.

    DeepSpeed trains 16-bit weights with 32-bit copies in the optimizer. accelerate turns weights that FSDP2 trains
    into 32 bits, as PEFT does those of an adapter. Otherwise gradient and states have the type of the weights.
    """
    states = recipe.optimizer_states
    if by_deepspeed(recipe, machine):
        return 2, 2, 4 + states * (1 if recipe.states_in_8bit else 4)
    wide = recipe.lora_rank > 0 or (machine.sharding == "fsdp" and recipe.autocast)
    weight = 4 if wide else recipe.weight_bytes
    return weight, weight, states * (1 if recipe.states_in_8bit else weight)


def by_deepspeed(recipe: Recipe, machine: Machine) -> bool:
    """Return whether DeepSpeed turns all weights into 16 bits."""
    return machine.sharding.startswith("zero") and recipe.autocast


def frozen_bytes(shape: Shape, recipe: Recipe, machine: Machine) -> float:
    """Return the bytes of the weights under an adapter; quantization leaves embeddings and norms as they are."""
    quantized = shape.linear_parameters if recipe.quantized_bits else 0
    size = 2 if by_deepspeed(recipe, machine) else recipe.weight_bytes
    return quantized * recipe.quantized_bits / 8 + (shape.parameters - quantized) * size


def hidden_bytes(recipe: Recipe, machine: Machine) -> int:
    """Return the bytes of a number of the hidden states between the blocks."""
    fsdp = machine.sharding == "fsdp" and recipe.autocast  # casts what it gathers
    return 2 if fsdp or by_deepspeed(recipe, machine) else recipe.weight_bytes


# ---- what comes and goes in a micro-batch


def step_moments(shape: Shape, recipe: Recipe, machine: Machine) -> dict[str, dict[str, float]]:
    """Return the bytes of gradients, activations and logits at the moments of a micro-batch that may need most."""
    tokens = recipe.rows * recipe.width
    residual, full = hidden_bytes(recipe, machine), not recipe.lora_rank
    matmul = 2 if recipe.autocast else residual
    gradient = trained_sizes(recipe, machine)[1]
    gradients = trained_parameters(shape, recipe) * gradient / machine.shards("gradients")
    accumulated = gradients if recipe.micro_batches > 1 else 0.0  # the first micro-batch begins without gradients

    block = tokens * block_bytes(shape, recipe, residual, matmul)
    casts = 2.0 * shape.linear_parameters if matmul < residual else 0.0  # autocast's copies of the weights
    if recipe.checkpointing:
        saved = float(shape.layers * tokens * shape.hidden * residual)
        recomputed = block + casts / shape.layers
        cached = casts if full else 0.0  # which autocast drops when the forward ends
    else:
        saved, recomputed, cached = shape.layers * block + casts, 0.0, 0.0
    saved += tokens * shape.hidden * (8 + residual + matmul) + tokens * recipe.width  # last norm, head's input, mask
    largest = shape.hidden * shape.intermediate * residual if full else 0  # gradient of a linear layer
    in_backward = tokens * (2 * shape.intermediate * matmul + shape.hidden * residual) + largest

    forward, backward = tile_bytes(shape, recipe, machine, matmul)
    head = shape.embedding_parameters * residual if full else 0  # gradient of the LM head, or of the embedding
    if full:
        backward += 4 * shape.embedding_parameters + (head if residual < 4 else 0)
    waiting = head if shape.tied or recipe.micro_batches == 1 else 0  # a tied one, for that of the embedding
    moments = {
        "LM head forward": (accumulated, saved + cached, forward),
        "LM head backward": (accumulated, saved, backward),
        "last block backward": (accumulated, saved + recomputed + in_backward, waiting),
        "embedding backward": (gradients, 0.0, (2 if shape.tied else 1) * head),
    }
    names = ("gradients", "activations", "logits")
    return {moment: dict(zip(names, parts, strict=True)) for moment, parts in moments.items()}


def block_bytes(shape: Shape, recipe: Recipe, residual: int, matmul: int) -> float:
    """Return the bytes that one block saves for the backward pass, per token.

    Each norm saves its input in float32, and its normalised input if its weight is trained. Linear layers save their
    input, once for all that share it unless each casts it for itself. Attention saves queries, keys, values, output
    and a logsumexp; the MLP saves gate, activation, up-projection and their product.
    """
    trains = not recipe.lora_rank
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * shape.hidden * (4 + trains * residual)
    if shape.qk_norm:
        norms += (queries + keys) * (4 + trains * matmul)
    casts_itself = matmul < residual or (not trains and matmul < 4)  # an adapter has float32 weights
    inputs = (5 if casts_itself else 2) * shape.hidden * matmul
    padded = recipe.rows > 1 and recipe.attention == "sdpa"  # a mask; else the kernel shares keys among heads itself
    repeated = queries if padded or recipe.attention == "eager" else keys
    attention = 2 * (queries + repeated) * matmul + 4 * shape.heads
    if padded:
        attention += recipe.width * matmul  # the mask, as numbers
    if recipe.attention == "eager":  # all probabilities, in float32 and as they multiply the values
        attention += shape.heads * recipe.width * (4 + (matmul if matmul < 4 else 0))
    return norms + inputs + attention + 4 * shape.intermediate * matmul


def tile_bytes(shape: Shape, recipe: Recipe, machine: Machine, matmul: int) -> tuple[float, float]:
    """Return the scratch memory of TRL's fused LM head, forward and backward: a tile, and on a CPU copies of it."""
    scored = recipe.rows * (recipe.completion if machine.on_gpu else recipe.width - 1)
    rows = min(scored, TILE_TOKENS)
    buffer = rows * TILE_WORDS * matmul
    copy = 0 if machine.on_gpu else 4 * rows * min(shape.vocabulary, TILE_WORDS)
    gradient = 4 * scored * shape.hidden  # of the hidden states, in float32
    return buffer + TILE_COPIES[0] * copy, buffer + TILE_COPIES[1] * copy + gradient
