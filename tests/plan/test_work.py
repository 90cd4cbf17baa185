"""FLOPs and bytes of a step beside sums that are done by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from opefo_trl.plan.recipe import Engine, Machine, read_recipe
from opefo_trl.plan.shapes import Shape, load_shape
from opefo_trl.plan.work import decoding, forward_flops, measure_work, passes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu"
SHAPE = load_shape("Qwen/Qwen2.5-0.5B-Instruct")
RECIPE = read_recipe({"gradient_accumulation_steps": 4, "max_completion_length": 768, "bf16": True}, 256)
LINEAR, EMBEDDING = 357_826_560, 136_134_656  # 24 x 14,909,440; 151,936 x 896


def test_a_forward_is_two_flops_per_parameter_and_token_and_attention():
    attention = 24 * 4 * 896 * 1024 * 512  # layers x 4 x width of the heads x tokens x those before, on average
    assert forward_flops(SHAPE, 256, 768) == 2 * LINEAR * 1024 + 2 * EMBEDDING * 768 + attention
    assert SHAPE.linear_parameters == LINEAR and SHAPE.embedding_parameters == EMBEDDING


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"gradient_checkpointing": False, "flow_scope": "running"}, 3),  # forward, and twice that backward
        ({"flow_scope": "running"}, 4),  # the forward again
        ({"gradient_accumulation_steps": 4}, 4),  # generation measures the flow
        ({"use_vllm": True}, 5),  # TRL's scoring pass
        ({"num_iterations": 2}, 5),
        ({"gradient_accumulation_steps": 4, "beta": 0.1}, 5),
        ({"gradient_accumulation_steps": 4, "use_peft": True}, 3),  # no gradient of the weights
    ],
)
def test_forwards_of_a_step(options, number):
    assert passes(read_recipe(options, 256)) == number


def test_a_step_of_several_gpus():
    one, eight = (measure_work(SHAPE, RECIPE, Machine(gpus, 80, "ddp")) for gpus in (1, 8))
    assert one.tokens == 4 * 8 * 1024 and eight.tokens == 8 * one.tokens  # micro-batches x rows x tokens
    assert one.generation_flops == 32 * forward_flops(SHAPE, 256, 768)
    assert one.training_flops == 4 * one.generation_flops and eight.training_flops == 8 * one.training_flops
    assert eight.training_seconds == one.training_seconds  # each does its own part
    assert one.training_seconds[1] == pytest.approx(one.training_flops / (0.1 * 312e12))
    shorter = forward_flops(SHAPE, 256, 384) / forward_flops(SHAPE, 256, 768)  # half of the completion
    assert one.training_seconds[0] == pytest.approx(one.training_seconds[1] * shorter * 0.1 / 0.5)
    assert measure_work(SHAPE, replace(RECIPE, iterations=2), Machine(1, 80, "none")).generation_flops == (
        one.generation_flops / 2
    )


def test_generation_reads_weights_and_cache_for_every_token():
    cache = 24 * 2 * 2 * 64 * 2  # layers x keys and values x heads x width x bytes
    recipe = replace(RECIPE, engine=Engine(0.5, 1, False, None))
    all_at_once = 768 * (2 * 494_032_768 + 32 * (256 + 384) * cache)
    assert decoding(SHAPE, recipe, 768, 32) == (768, all_at_once)
    in_two_waves = 2 * 768 * (2 * 494_032_768 + 16 * (256 + 384) * cache)
    assert decoding(SHAPE, recipe, 768, 16) == (2 * 768, in_two_waves)
    two_ranks = 768 * (2 * 494_032_768 + 64 * (256 + 384) * cache) / 2
    assert decoding(SHAPE, replace(recipe, engine=Engine(0.5, 2, False, None)), 768, 64) == (768, two_ranks)
    slow = Machine(1, 80, "none", bandwidth=0.2)
    assert measure_work(SHAPE, recipe, slow, 32).generation_seconds[1] == pytest.approx(all_at_once / 0.2e12 / 0.1)


def test_a_gpu_is_not_faster_than_it_launches_kernels_and_a_cpu_waits_for_none():
    fast = Machine(1, 80, "none", teraflops=1e6, bandwidth=1e6)
    work = measure_work(SHAPE, RECIPE, fast)
    assert work.training_seconds == pytest.approx((24 * 4 * 4 * 0.2e-3, 24 * 4 * 4 * 2e-3))  # layers, passes, batches
    assert work.generation_seconds == pytest.approx((24 * 384 * 0.2e-3, 24 * 768 * 2e-3))
    vllm = measure_work(SHAPE, replace(RECIPE, engine=Engine(0.5, 1, False, None)), fast)
    assert vllm.generation_seconds == pytest.approx((24 * 384 * 0.02e-3, 24 * 768 * 0.2e-3))
    assert measure_work(SHAPE, RECIPE, replace(fast, on_gpu=False)).training_seconds[1] < 0.01


def test_seconds_that_an_h100_took_are_in_the_range():
    """Recorded by benchmarks/smollm2.py, where transformers generates, and by benchmarks/overhead.py."""
    lines = (RESULTS / "words.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["setting"] == "none" and "peak_mib" in row]
    taken = [row["seconds_per_step"] for row in rows]
    options = {"per_device_train_batch_size": 64, "max_completion_length": 10, "gradient_checkpointing": False}
    h100 = Machine(1, 80, "none", teraflops=989, bandwidth=3.35)
    work = measure_work(load_shape("out/smollm2"), read_recipe(options, 46), h100)
    fast, slow = map(sum, zip(work.training_seconds, work.generation_seconds, strict=True))
    assert len(taken) == 3 and all(fast < seconds < slow for seconds in taken)
    (fast, slow), seconds = overhead()
    assert fast < seconds < slow


def overhead() -> tuple[tuple[float, float], float]:
    """Return the predicted range and the measured seconds of a training step of half a billion parameters."""
    measured = json.loads((RESULTS / "overhead.json").read_text())
    sizes = measured["options"]
    shape = Shape(
        sizes["vocab"], sizes["hidden"], 4 * sizes["hidden"], sizes["layers"], 16, 4, 64, 32768, True,
        ("q_proj", "k_proj", "v_proj"),
    )  # fmt: skip
    options = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_completion_length": sizes["length"],
        "flow_scope": "running",
    }  # fmt: skip
    h100 = Machine(1, 80, "none", teraflops=989, bandwidth=3.35)
    work = measure_work(shape, read_recipe(options, 16), h100)
    return work.training_seconds, measured["results"]["control none"]["seconds"]
