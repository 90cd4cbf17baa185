"""Which transforms of exact micro-batching are exact; tests of the gradients themselves are in test_rebatching.py."""

import pytest
from tiny import settings
from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, Llama4TextConfig, Phi3Config, Qwen2Config

from opefo_trl import OPEFOConfig
from opefo_trl.training.eligibility import BatchTransforms, positions_of


def with_rope(parameters, **more):
    """Return a config with nested RoPE parameters, of which a layer without positions has none."""
    config = Qwen2Config(**more)
    config.rope_parameters = parameters
    return config


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (Qwen2Config(), "relative"),
        (Gemma3TextConfig(), "relative"),
        (GPT2Config(), "absolute"),
        (Llama4TextConfig(attn_temperature_tuning=True), "absolute"),
        (BloomConfig(), "absolute"),  # ALiBi; we would have to look deeper to tell
        (Qwen2Config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "by length"),
        (Phi3Config(), "relative"),
        (with_rope({"full_attention": {"rope_type": "default"}, "sliding_attention": None}), "relative"),
        (with_rope({"main": {"rope_type": "default"}}, compress_rates=[4]), "absolute"),  # of DeepSeek V4
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_positions_of_a_model(config, positions):
    assert positions_of(config) == positions


def transforms(out, positions="relative", aux_loss=False, **overrides) -> BatchTransforms:
    args = OPEFOConfig(**settings(out, **overrides))
    return BatchTransforms.for_run(args, args.make_control(), positions, aux_loss)


def test_transforms_are_exact_unless_positions_or_the_users_choice_forbid_them(out):
    assert transforms(out) == BatchTransforms(True, True, True, True)
    assert transforms(out, micro_batching="trl") == BatchTransforms(False, False, False, False)
    assert not transforms(out, "absolute").trim_prompts and transforms(out, "absolute").trim
    assert not transforms(out, "by length").trim


def test_a_transform_that_is_not_exact_has_its_reason(out):
    said = str(transforms(out, beta=0.1))
    assert "trims padding, regroups rows by length" in said and "not drop" in said and "`beta=0.1`" in said
    routed = transforms(out, aux_loss=True)
    assert set(routed.reasons) == {"regroup", "drop"} and "router" in routed.reasons["drop"]
    assert str(routed).count("router") == 1  # one sentence for both
