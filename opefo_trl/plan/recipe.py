"""Settings that decide memory and work: a recipe from the options of train.py, a machine from accelerate's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from trl import ModelConfig

from opefo_trl.config import OPEFOConfig
from opefo_trl.validation import check_bool, check_choice, check_number

__all__: list[str] = []  # of use inside this package only

PROMPT_TOKENS = 256  # of the longest prompt, where nobody says otherwise
DEFAULTS = {
    field.name: field.default if field.default is not MISSING else None
    for config in (OPEFOConfig, ModelConfig)
    for field in fields(config)
}
# What each way of running on several GPUs spreads over them; the rest is on each GPU
SHARDINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp": ("optimizer", "gradients", "weights"),
}
_STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}  # of an optimizer; Adam has 2


@dataclass(frozen=True)
class Engine:
    """A vLLM engine in the training processes."""

    utilization: float  # of the GPU's memory
    ranks: int  # GPUs that share its weights and cache
    sleeps: bool  # whether it gives its memory back while training
    longest: int | None  # tokens of a sequence; None: the model's context


@dataclass(frozen=True)
class Recipe:
    """Settings of a run that decide its memory and its work."""

    rows: int  # of a micro-batch
    micro_batches: int  # of an optimizer step
    rollout_rows: int  # completions that a process generates at once
    iterations: int  # times that a rollout is trained on
    prompt: int  # tokens
    completion: int
    weight_bytes: int
    autocast: bool  # bf16 or fp16 arithmetic
    checkpointing: bool
    attention: str
    optimizer_states: int
    states_in_8bit: bool
    lora_rank: int  # 0: all parameters are trained
    lora_targets: tuple[str, ...]
    quantized_bits: int  # 0: the frozen weights are not quantized
    reference: bool  # whether a frozen copy of the model is in memory
    reference_pass: bool
    scoring_pass: bool
    engine: Engine | None
    served: bool = False  # whether vLLM generates on GPUs of its own

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Machine:
    """GPUs, or processes on CPUs, and what they can do."""

    gpus: int
    memory: float  # GiB of each
    sharding: str
    on_gpu: bool = True
    teraflops: float = 312.0  # dense bf16, at most; an A100's
    bandwidth: float = 2.0  # of its memory, TB/s

    def shards(self, part: str) -> int:
        """Return over how many GPUs weights, gradients or optimizer are spread."""
        return self.gpus if part in SHARDINGS[self.sharding] else 1


def read_recipe(options: Mapping[str, Any], prompt: int, gpus: int = 1) -> Recipe:
    """Return the recipe of these options of train.py; those that are missing have their defaults."""
    values = DEFAULTS | dict(options)

    def number(name: str) -> int:
        return int(check_number(name, values[name], 1, whole=True))

    check_choice("dtype", values["dtype"], ("float32", "bfloat16", "float16", "auto"))
    check_bool("use_peft", values["use_peft"])
    check_bool("use_vllm", values["use_vllm"])
    if values["use_peft"] and values["lora_modules_to_save"]:
        raise ValueError("`lora_modules_to_save` is not planned: the modules that it names are trained as a whole.")
    lora, beta = bool(values["use_peft"]), check_number("beta", values["beta"], 0)
    targets = values["lora_target_modules"] or ("q_proj", "v_proj")  # PEFT's default for these models
    optimizer = str(getattr(values["optim"], "value", values["optim"]))
    rows, micro_batches, completion = map(
        number, ("per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length")
    )
    steps = micro_batches
    if values["steps_per_generation"]:
        steps = number("steps_per_generation")
    elif values["generation_batch_size"]:
        steps = max(1, number("generation_batch_size") // (rows * gpus))
    several_updates = steps * number("num_iterations") > micro_batches
    engine = None
    if values["use_vllm"] and values["vllm_mode"] == "colocate":
        engine = Engine(
            utilization=check_number("vllm_gpu_memory_utilization", values["vllm_gpu_memory_utilization"], 0, 1),
            ranks=number("vllm_tensor_parallel_size"),
            sleeps=bool(values["vllm_enable_sleep_mode"]),
            longest=number("vllm_max_model_length") if values["vllm_max_model_length"] else None,
        )
        if engine.longest is not None:
            if engine.longest <= completion:
                raise ValueError(
                    f"`vllm_max_model_length={engine.longest}` leaves no room for a prompt beside "
                    f"`max_completion_length={completion}`. Raise it, or lower that."
                )
            prompt = min(prompt, engine.longest - completion)
    return Recipe(
        rows=rows,
        micro_batches=micro_batches,
        rollout_rows=rows * steps,
        iterations=number("num_iterations"),
        prompt=prompt,
        completion=completion,
        weight_bytes=4 if values["dtype"] == "float32" else 2,
        autocast=bool(values["bf16"] or values["fp16"] or values["bf16"] is None),
        checkpointing=bool(values["gradient_checkpointing"]),
        attention=values["attn_implementation"] or "sdpa",
        optimizer_states=next((count for name, count in _STATES.items() if name in optimizer), 2),
        states_in_8bit="8bit" in optimizer,
        lora_rank=number("lora_r") if lora else 0,
        lora_targets=(targets,) if isinstance(targets, str) else tuple(targets),
        quantized_bits=4 if values["load_in_4bit"] else 8 if values["load_in_8bit"] else 0,
        reference=beta > 0 and not lora,
        reference_pass=beta > 0,
        # TRL scores a rollout for vLLM's ratio, and where it takes several updates; else generation measures the flow
        scoring_pass=(bool(values["use_vllm"]) and values["flow_scope"] == "batch") or several_updates,
        engine=engine,
        served=bool(values["use_vllm"]) and engine is None,
    )


def read_sharding(config: Mapping[str, Any]) -> str:
    """Return the sharding that a config file of accelerate asks for."""
    kind = config.get("distributed_type", "NO")
    if kind == "DEEPSPEED":
        stage = (config.get("deepspeed_config") or {}).get("zero_stage")
        return check_choice("zero_stage", f"zero{stage}", SHARDINGS, otherwise=", or say --sharding")
    kinds = {"NO": "none", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp", "FSDP": "fsdp"}
    return kinds[check_choice("distributed_type", kind, [*kinds, "DEEPSPEED"])]
