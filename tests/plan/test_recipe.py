"""Options of train.py and config files of accelerate are read as these read them."""

from pathlib import Path

import pytest
import yaml

from opefo_trl.plan.recipe import Machine, read_recipe, read_sharding

ROOT = Path(__file__).parents[2]


def recipe_of(name: str, **options):
    return read_recipe(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) | options, 256)


def test_a_recipe_of_a_file():
    recipe = recipe_of("qwen2.5-math-7b")
    assert (recipe.rows, recipe.micro_batches, recipe.rollout_rows) == (4, 8, 32)
    assert (recipe.prompt, recipe.completion, recipe.width) == (256, 3000, 3256)
    assert recipe.weight_bytes == 2 and recipe.autocast and recipe.checkpointing and recipe.scoring_pass
    assert recipe.engine.sleeps and (recipe.engine.utilization, recipe.engine.longest) == (0.35, 4096)
    assert recipe.lora_rank == 0 and not recipe.reference and recipe.optimizer_states == 2
    lora = recipe_of("qwen2.5-1.5b-lora-single-gpu", beta=0.1)
    assert (lora.lora_rank, lora.lora_targets) == (32, ("all-linear",))
    assert lora.reference_pass and not lora.reference  # the model without its adapter is the reference
    assert recipe_of("qwen2.5-math-7b", beta=0.1).reference


def test_missing_options_have_the_defaults_of_train_py():
    recipe = read_recipe({}, 64)
    assert (recipe.rows, recipe.micro_batches, recipe.completion) == (8, 1, 512)
    assert recipe.weight_bytes == 4 and recipe.autocast and recipe.checkpointing and recipe.engine is None
    assert not recipe.scoring_pass  # generation measures the flow
    assert not recipe_of("smollm2-words").scoring_pass
    assert recipe_of("smollm2-words", num_iterations=2).scoring_pass  # TRL's own


def test_options_that_decide_memory():
    assert read_recipe({"steps_per_generation": 4}, 64).rollout_rows == 32
    assert read_recipe({"generation_batch_size": 64}, 64, gpus=2).rollout_rows == 32
    assert read_recipe({"optim": "sgd"}, 64).optimizer_states == 0
    assert read_recipe({"optim": "adamw_8bit"}, 64).states_in_8bit
    assert read_recipe({"load_in_4bit": True}, 64).quantized_bits == 4
    assert not read_recipe({"bf16": False}, 64).autocast
    server = {"use_vllm": True, "vllm_mode": "server"}
    assert read_recipe(server, 64).engine is None and read_recipe(server, 64).scoring_pass
    short = {"use_vllm": True, "vllm_max_model_length": 300, "vllm_mode": "colocate", "max_completion_length": 256}
    assert read_recipe(short, 64).prompt == 44


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size=0`"),
        ({"max_completion_length": None}, "`max_completion_length=None`"),
        ({"use_vllm": True, "vllm_max_model_length": 512, "vllm_mode": "colocate"}, "`vllm_max_model_length=512`"),
        ({"dtype": "int8"}, "`dtype='int8'`.*'bfloat16'"),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 3, "vllm_mode": "colocate"}, r"`vllm_gpu_memory_ut.*=3`"),
    ],
)
def test_values_that_cannot_be_planned_with_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(options, 64)


def test_sharding_of_every_config_of_accelerate():
    found = {
        path.stem: read_sharding(yaml.safe_load(path.read_text()))
        for path in (ROOT / "configs" / "accelerate").glob("*.yaml")
    }
    assert found == {
        "cpu": "ddp", "ddp": "ddp", "single_gpu": "none", "fsdp2": "fsdp",
        "zero2": "zero2", "zero3": "zero3", "multi_node": "zero3",
    }  # fmt: skip
    with pytest.raises(ValueError, match="zero7"):
        read_sharding({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 7}})
    with pytest.raises(ValueError, match="`distributed_type='TPU'`"):
        read_sharding({"distributed_type": "TPU"})


def test_what_is_spread_over_the_gpus():
    spread = {
        name: [Machine(8, 80, name).shards(part) for part in ("weights", "gradients", "optimizer")]
        for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    }
    everything = [8, 8, 8]
    assert spread == {
        "ddp": [1, 1, 1], "zero1": [1, 1, 8], "zero2": [1, 8, 8], "zero3": everything, "fsdp": everything
    }  # fmt: skip
