"""Predictions beside what was measured, and the arithmetic of what cannot be measured here."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from scripts import load_script, python

from opefo_trl.cli.recipe_files import MACHINES
from opefo_trl.plan.__main__ import main
from opefo_trl.plan.memory import GIB, cache_bytes, predict, sequences_at_once
from opefo_trl.plan.recipe import PROMPT_TOKENS, Machine, read_recipe, read_sharding
from opefo_trl.plan.shapes import load_shape

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())["results"]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SEVEN = load_shape("Qwen/Qwen2.5-Math-7B")
PARAMETERS = 7_615_616_512
FULL = {"dtype": "bfloat16", "bf16": True, "gradient_accumulation_steps": 8, "max_completion_length": 1000}


def plan_of(options: dict, machine: Machine, shape=SEVEN):
    return predict(shape, read_recipe(FULL | options, 256), machine)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/memory.py")


def test_predictions_are_within_a_fifth_of_what_was_measured(benchmark):
    assert [row["case"] for row in RESULTS] == list(benchmark.CASES)
    page = (ROOT / "docs" / "performance.md").read_text()
    for row in RESULTS:
        assert benchmark.line(row) in page
        assert abs(benchmark.error(row, "peak")) < 0.2 and abs(benchmark.error(row, "beyond")) < 0.2, row["case"]
        assert benchmark.prediction(row["case"]) == pytest.approx(row["predicted"]), row["case"]  # by today's code


def test_the_peak_on_an_h100_is_near_the_prediction():
    """Recorded by benchmarks/smollm2.py: SmolLM2 in bf16 autocast, 64 rows, prompts of 44 to 46 tokens."""
    lines = (ROOT / "benchmarks" / "results" / "gpu" / "words.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["setting"] == "none" and "peak_mib" in row]
    assert len(rows) == 3 and all("--bf16 true" in " ".join(row["arguments"]) for row in rows)
    options = yaml.safe_load((ROOT / "configs" / "smollm2-words.yaml").read_text())
    options |= {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "use_cpu": False, "bf16": True}
    plan = predict(load_shape("out/smollm2"), read_recipe(options, 46), Machine(1, 80, "none"))
    for row in rows:
        assert sum(plan.training.values()) / 2**20 == pytest.approx(row["peak_mib"], rel=0.2)


@pytest.mark.slow
def test_a_measurement_of_today_is_near_the_prediction(benchmark, tmp_path):
    file = tmp_path / "plan.json"
    python(ROOT / "benchmarks" / "memory.py", "--cases", "tiny, LoRA, check", "tiny, rows", "--json", file)
    rows = json.loads(file.read_text())["results"]
    assert len(rows) == 2
    assert all(abs(benchmark.error(row, key)) < 0.2 for row in rows for key in ("peak", "beyond"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_machine_that_it_names(path):
    text = path.read_text()
    options = yaml.safe_load(text)
    named = re.search(r"(one|\d+) GPUs? of (\d+) GB", text)
    if named:
        launch = re.search(r"--accelerate_config (\w+)", text)[1]
        gpus = 1 if named[1] == "one" else int(named[1])
        sharding = read_sharding(yaml.safe_load((MACHINES / f"{launch}.yaml").read_text()))
        machine = Machine(gpus, float(named[2]), sharding)
    else:
        assert options["use_cpu"]
        machine = Machine(1, 8, "none", on_gpu=False)  # GiB that any laptop has
    recipe = read_recipe(options, PROMPT_TOKENS if named else 46, machine.gpus)  # the longest of the tasks
    plan = predict(load_shape(options["model_name_or_path"]), recipe, machine)
    assert plan.problems == []
    if recipe.engine:  # and the engine generates the whole rollout at once
        assert sequences_at_once(plan, recipe) == recipe.rollout_rows


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "optimizer"),  # bytes per parameter
    [
        ("ddp", 2, 2, 4),  # bf16, and Adam's two states in bf16
        ("zero2", 2, 2 / 8, 12 / 8),  # a 32-bit copy and two 32-bit states
        ("zero3", 2 / 8, 2 / 8, 12 / 8),
        ("fsdp", 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_bytes_of_a_parameter(sharding, weights, gradients, optimizer):
    training = plan_of({}, Machine(8, 80, sharding)).training
    found = [training[name] / PARAMETERS for name in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx([weights, gradients, optimizer])
    if sharding == "ddp":
        assert training["communication"] == 2 * PARAMETERS  # its buckets


def test_an_adapter_a_reference_and_quantized_weights():
    machine = Machine(1, 80, "none")
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"}
    training = plan_of(lora, machine).training
    adapter = SEVEN.lora_parameters(8, ["all-linear"])
    assert training["weights"] == 2 * PARAMETERS + 4 * adapter  # the adapter is in float32
    assert training["gradients"] == 4 * adapter and training["optimizer"] == 8 * adapter
    four_bits = plan_of(lora | {"load_in_4bit": True}, machine).training["weights"]
    assert training["weights"] - four_bits == 1.5 * SEVEN.linear_parameters
    assert plan_of({"beta": 0.1}, machine).training["reference"] == 2 * PARAMETERS
    assert plan_of({"beta": 0.1, **lora}, machine).training["reference"] == 0


def test_checkpointing_and_smaller_micro_batches_take_less():
    def peak(**options):
        training = plan_of(options, Machine(8, 80, "zero3")).training
        return training["activations"] + training["logits"]

    assert peak() < 0.25 * peak(gradient_checkpointing=False)
    assert peak(per_device_train_batch_size=4) < 0.8 * peak()  # the gradient of the LM head stays


def test_the_cache_of_vllm_and_of_transformers():
    shape, machine = SEVEN, Machine(1, 80, "none")
    assert cache_bytes(shape, 2) == 57_344  # 2 x 28 layers x 4 heads x 128 x 2 bytes
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.5,
        "vllm_max_model_length": 4096,
    }
    plan, recipe = plan_of(vllm, machine), read_recipe(FULL | vllm, 256)
    assert plan.cache_tokens == int((40 * GIB - 2 * PARAMETERS - 1.5 * GIB) / 57_344)
    assert plan.training["engine"] == plan.generating["engine"] == 40 * GIB
    assert sequences_at_once(plan, recipe) == 64  # the rollout; the cache has room for 369 sequences of 1256
    assert sequences_at_once(replace(plan, cache_tokens=10_000), recipe) == 7
    asleep = plan_of(vllm | {"vllm_enable_sleep_mode": True}, machine)
    assert asleep.training["engine"] == GIB and asleep.generating["engine"] == 40 * GIB
    halved = plan_of(vllm | {"vllm_tensor_parallel_size": 2}, Machine(2, 80, "zero3"))
    assert halved.cache_tokens == int((40 * GIB - PARAMETERS - 1.5 * GIB) / (57_344 / 2))
    assert plan_of({}, machine).generating["cache"] == 64 * 1256 * 57_344
    assert plan_of({}, Machine(8, 80, "zero3")).generating["weights"] == 2 * PARAMETERS  # gathered


def test_what_does_not_fit_is_said():
    problems = plan_of({}, Machine(1, 24, "none")).problems
    assert len(problems) == 2 and "training" in problems[0] and "generating" in problems[1] and "22.5" in problems[0]
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 8192,
    }
    (problem,) = plan_of(vllm, Machine(8, 80, "zero3")).problems
    assert "vLLM" in problem and "8192" in problem


def test_deepspeed_on_one_gpu_keeps_its_copies(capsys):
    words = ["--config", str(ROOT / "configs" / "qwen2.5-1.5b-lora-single-gpu.yaml"), "--use_peft", "false"]
    rows = {}
    for sharding in ("ddp", "zero2"):
        with pytest.raises(SystemExit):
            main([*words, "--gpus", "1", "--sharding", sharding, "--dtype", "bfloat16"])
        printed = capsys.readouterr().out
        rows[sharding] = float(re.search(r"^optimizer +([\d.]+)", printed, re.M)[1])
        assert f"sharding {'none' if sharding == 'ddp' else sharding}" in printed
    assert rows["zero2"] == pytest.approx(3 * rows["ddp"], rel=0.01)  # 4 + 8 bytes in place of 4


def test_a_server_generates_on_gpus_of_its_own():
    options, machine = {"per_device_train_batch_size": 4, "steps_per_generation": 64}, Machine(8, 80, "zero3")
    served = plan_of({**options, "use_vllm": True, "vllm_mode": "server"}, machine)
    alone = plan_of({**options, "use_vllm": False}, machine)
    assert "cache" in alone.generating and "cache" not in served.generating and served.cache_tokens is None
    assert served.generating["weights"] == served.training["weights"] == alone.generating["weights"] / 8


def test_the_cache_of_an_engine_is_that_of_its_weights_and_heads():
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5, "use_peft": True}
    full, quantized = (plan_of({**options, "load_in_4bit": bits}, Machine(1, 24, "none")) for bits in (False, True))
    assert full.cache_tokens <= 0 < quantized.cache_tokens
    four, eight = (
        plan_of({**options, "vllm_tensor_parallel_size": ranks}, Machine(8, 80, "ddp")).cache_tokens
        for ranks in (4, 8)
    )
    assert eight < 1.2 * four  # SEVEN has four heads of keys, of which two ranks hold the same
