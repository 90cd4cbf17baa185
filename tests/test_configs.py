"""Every recipe is parsed by the real parser, and its comments do the same arithmetic."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from scripts import load_script
from trl import ModelConfig

from opefo_trl import OPEFOConfig
from opefo_trl.cli.parser import Parser
from opefo_trl.data import TEMPLATES
from opefo_trl.playground import TASKS
from opefo_trl.rewards import find_reward

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MACHINES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
README = (ROOT / "README.md").read_text()


def parse(path):
    types = (load_script("train.py").ScriptArguments, OPEFOConfig, ModelConfig)
    return Parser(types).parse(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])


def test_all_recipes_and_machines_exist_and_the_readme_lists_the_recipes():
    assert {path.stem for path in RECIPES} == {
        "quickstart", "qwen2.5-math-7b", "qwen3-4b-base", "qwen2.5-1.5b-lora-single-gpu", "qwen2.5-0.5b-gsm8k",
        "smollm2-words", "smollm2-words-lora", "smollm2-sentences",
    }  # fmt: skip
    assert {path.stem for path in MACHINES} == {"single_gpu", "ddp", "zero2", "zero3", "fsdp2", "cpu", "multi_node"}
    assert [path.name for path in RECIPES if f"configs/{path.name}" not in README] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_right(path, recwarn):
    script, args, model = parse(path)
    text = path.read_text()
    names = re.findall(r"^(\w+):", text, re.M)
    assert len(names) == len(set(names)) == len(yaml.safe_load(text))  # no option twice
    assert args.updates_per_rollout == 1 and args.strict_on_policy
    assert model.model_name_or_path and script.dataset_name and args.output_dir.startswith("out/")
    assert script.prompt_template in TEMPLATES
    for name in script.reward_funcs:
        find_reward(name, args.max_completion_length)
    assert args.reward_weights is None or len(args.reward_weights) == len(script.reward_funcs)
    assert not [warning for warning in recwarn if "control=" in str(warning.message)]  # no field is idle
    if args.use_vllm:
        assert args.max_completion_length < args.vllm_max_model_length
    if command := re.search(r"opefo-trl train --accelerate_config (\S+) --config (\S+)", text):
        assert command[2] == path.stem
        ranks = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{command[1]}.yaml")).num_processes
        comment = re.search(r"(\d+) x (\d+) micro-batches x (\d+) GPUs? = (\d+) completions", text)
        rows, micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
        completions = rows * micro_batches * ranks
        assert [int(number) for number in comment.groups()] == [rows, micro_batches, ranks, completions]
        prompts, answers = re.search(r"(\d+) problems, (\d+) answers each", text).groups()
        assert int(prompts) * int(answers) == completions and int(answers) == args.num_generations
        assert args.per_device_eval_batch_size * ranks % args.num_generations == 0
        return
    task = TASKS[script.dataset_name]
    assert script.reward_funcs == [script.dataset_name] and args.max_completion_length == task.max_new_tokens
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps
    prompts, answers = re.search(r"(\d+) (?:prompts|questions), (\d+) answers each", text).groups()
    assert int(prompts) * int(answers) == completions and int(answers) == args.num_generations
    held_out = re.search(r"(\d+) answers\s+(?:# )?to each of (\d+)", text).groups()
    assert [int(number) for number in held_out] == [args.num_generations_eval, len(task.splits["test"])]


@pytest.mark.parametrize("path", [path for path in RECIPES if "smollm2" in path.stem], ids=lambda path: path.stem)
def test_the_overrides_for_a_gpu_are_options(path):
    comment = path.read_text().split("minutes: ")[1].split("\n\n")[0].replace("#", " ")
    types = (load_script("train.py").ScriptArguments, OPEFOConfig, ModelConfig)
    words = [*comment.split(), "--use_cpu", "true", "--bf16", "false"]  # there is no GPU here
    _, args, _ = Parser(types).parse(["--config", str(path), *words])
    assert args.use_vllm and args.updates_per_rollout == 1 and args.generation_batch_size == 256
    assert args.generation_batch_size % args.num_generations == 0


@pytest.mark.parametrize("name", ["qwen2.5-math-7b", "qwen3-4b-base"])
def test_the_papers_recipes_have_its_learning_rate_of_strictly_on_policy_runs(name):
    args = parse(ROOT / "configs" / f"{name}.yaml")[1]
    assert args.learning_rate == pytest.approx(8**0.5 * 1e-6, rel=1e-3) and args.updates_per_rollout == 1
    assert args.control == "opefo" and args.flow_target is None


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_a_machine_is_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    kinds = dict.fromkeys(("zero2", "zero3", "multi_node"), "DEEPSPEED") | {"fsdp2": "FSDP", "single_gpu": "NO"}
    assert config.distributed_type == kinds.get(path.stem, "MULTI_GPU")
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert config.use_cpu == (path.stem == "cpu")
    if config.distributed_type == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == (2 if path.stem == "zero2" else 3)
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
