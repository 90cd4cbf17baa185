"""Vocabulary sums of a live model: `flow.vocabulary_score` at every position that a scoring forward visits.

The sums are taken in a forward hook of the backbone, inside the model's own forward, so that the LM head is as whole
there (FSDP, ZeRO-3) as it is for the head that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from opefo_trl.flow import vocabulary_score

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def vocabulary_scores(
    model: PreTrainedModel, *, estimator: str, temperature: float, keep: int, head_in_fp32: bool = False
) -> Iterator[list[Tensor]]:
    """Collect one (b, keep) tensor for every forward of `model` in the block: its scores at the last `keep` tokens."""
    scores: list[Tensor] = []
    settings = head_settings(model.config)

    def measure(_module: Any, _args: Any, output: Any) -> None:
        hidden = output.last_hidden_state[:, -keep - 1 : -1]  # position t - 1 predicts token t
        head = model.get_output_embeddings()
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            weight, bias = _whole(head.weight), _whole(head.bias)
            autocast: Any = nullcontext()
            if head_in_fp32:
                hidden, weight = hidden.float(), weight.float()
                bias = None if bias is None else bias.float()
                autocast = torch.autocast(hidden.device.type, enabled=False)
            with autocast:
                scores.append(
                    vocabulary_score(
                        hidden.to(weight.device),
                        weight,
                        bias,
                        estimator=estimator,
                        temperature=temperature,
                        **settings,
                    )
                )

    handle = model.base_model.register_forward_hook(measure)
    try:
        yield scores
    finally:
        handle.remove()


def head_settings(config: PretrainedConfig) -> dict[str, Any]:
    """What a model does to the output of its LM head: a factor, and Gemma's softcapping."""
    text = config.get_text_config()
    # Cohere, Muse Glimmer and Falcon-H1 multiply; Granite and MiniCPM3 divide, HyperCLOVA X multiplies.
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(text, name, None)
        if scale is not None:
            break
    else:
        scaling = getattr(text, "logits_scaling", None) or 1.0
        scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
    return {"logit_scale": float(scale), "softcap": getattr(text, "final_logit_softcapping", None)}


def _whole(parameter: Any) -> Any:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
