"""Sizes of a model, from its config alone. The configs of our recipes' models are in shapes.json, for use offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from opefo_trl.playground import resolve_model

__all__: list[str] = []  # of use inside this package only

SHIPPED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text())
_MADE_FROM = {"out/smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the folder of our recipes, before it is made
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # dense decoders with the same blocks


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder with gated MLPs and grouped-query attention."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    tied: bool  # whether the LM head is the embedding
    biases: tuple[str, ...] = ()  # linear layers with a bias
    qk_norm: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: inputs and outputs by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
        }
        gates = dict.fromkeys(("gate_proj", "up_proj"), (self.hidden, self.intermediate))
        return attention | gates | {"down_proj": (self.intermediate, self.hidden)}

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        biases = sum(self.linears[name][1] for name in self.biases)
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        embeddings = (1 if self.tied else 2) * self.embedding_parameters
        return self.linear_parameters + self.layers * (biases + norms) + self.hidden + embeddings

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Return the parameters of an adapter on these linear layers; `all-linear` stands for all of a block's."""
        chosen = self.linears if "all-linear" in targets else targets
        unknown = sorted(set(chosen) - set(self.linears))
        if unknown:
            raise ValueError(
                f"`lora_target_modules` names {', '.join(unknown)}, which the plan does not know. It knows "
                f"all-linear, {', '.join(self.linears)}."
            )
        return self.layers * sum(rank * sum(self.linears[name]) for name in chosen)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Return the sizes in a config.json."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"`model_type={family!r}` is unknown to the plan, which counts the parameters of dense decoders: "
            f"{', '.join(_FAMILIES)}."
        )
    heads = config["num_attention_heads"]
    everywhere = ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
    mlp = ("gate_proj", "up_proj", "down_proj") if config.get("mlp_bias") else ()
    return Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        context=config.get("max_position_embeddings", 0) or 2**20,
        tied=bool(config.get("tie_word_embeddings")),
        biases=("q_proj", "k_proj", "v_proj") if family == "qwen2" else (*everywhere, *mlp),
        qk_norm=family == "qwen3",
    )


def load_shape(name: str, **options: Any) -> Shape:
    """Return the sizes of a model: in a folder, in shapes.json, or on the Hub. `options` go to `AutoConfig`."""
    folder = Path(resolve_model(name)).expanduser()
    if not folder.is_dir() and (known := SHIPPED.get(_MADE_FROM.get(name, name))):
        return read_shape(known)
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The config of the model {name!r} cannot be read: {reason} Give a folder with a config.json, a model on "
            f"the Hub, or one that needs no Hub: {', '.join(SHIPPED)}."
        ) from error
    return read_shape(config.to_dict())
