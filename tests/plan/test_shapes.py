"""Parameters are those that transformers and PEFT count, on models without memory."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from opefo_trl.plan.shapes import SHIPPED, load_shape, read_shape
from opefo_trl.playground import MODEL

PUBLISHED = {  # on the models' pages
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
}
SMALL = {
    "qwen2": {},
    "qwen3": {"head_dim": 48, "attention_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {},
}


def empty_model(config: dict):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_shape_has_the_parameters_of_its_model(name):
    assert load_shape(name).parameters == PUBLISHED[name] == empty_model(SHIPPED[name]).num_parameters()


@pytest.mark.parametrize("family", SMALL)
def test_parameters_of_every_family_and_of_adapters(family):
    config = {**SIZES, "model_type": family, **SMALL[family]}
    shape, model = read_shape(config), empty_model(config)
    assert shape.parameters == model.num_parameters()
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        adapted = get_peft_model(empty_model(config), LoraConfig(r=4, target_modules=targets))
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert shape.lora_parameters(4, [targets] if isinstance(targets, str) else targets) == trained


def test_a_shape_is_found_in_a_folder_or_in_what_is_shipped(tmp_path):
    config = AutoConfig.for_model("llama", **SIZES)
    config.save_pretrained(tmp_path)
    assert load_shape(str(tmp_path)) == read_shape(config.to_dict())
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        numbers = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert load_shape("playground").parameters == numbers
    assert load_shape("out/smollm2") == load_shape("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_unknown_models_and_layers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'me/unknown' .*config.json.*Qwen/Qwen3-4B-Base"):
        load_shape("me/unknown")
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_shape(str(tmp_path))  # an empty folder
    with pytest.raises(ValueError, match="`model_type='gpt2'`.*llama"):
        read_shape({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="`lora_target_modules`.*c_attn.*all-linear"):
        read_shape({**SIZES, "model_type": "qwen2"}).lora_parameters(4, ["q_proj", "c_attn"])
