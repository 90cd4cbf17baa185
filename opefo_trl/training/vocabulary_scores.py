"""Vocabulary sums of a live model: `flow.vocabulary_score` at every position of a scoring forward.

A forward hook on the backbone computes the sums inside the model's own forward, so that FSDP and ZeRO-3 have gathered
the LM head there as they have for the model's own use of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opefo_trl.flow import vocabulary_score
from opefo_trl.trl_compat import maybe_gather_lm_head_ctx

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def vocabulary_scores(
    model: PreTrainedModel, *, estimator: str, temperature: float, keep: int, head_in_fp32: bool = False
) -> Iterator[list[Tensor]]:
    """Collect the scores of the last `keep` tokens of every forward of `model` in the block, (b, keep) each."""
    scores: list[Tensor] = []
    settings = head_settings(model.config)

    def measure(_module: Any, _args: Any, output: Any) -> None:
        hidden = output.last_hidden_state[:, -keep - 1 : -1]  # position t - 1 predicts token t
        head = model.get_output_embeddings()
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            weight, bias = _full(head.weight), _full(head.bias)
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
    """Return how a model changes the output of its LM head: by a factor, and by Gemma's softcapping."""
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


def _full(parameter: Any) -> Any:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
