"""Mistakes that are refused before the first step. (More of them: test_train_script.py.)"""

import warnings
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import ModelConfig

from opefo_trl import OPEFOConfig
from opefo_trl.cli.preflight import (
    check_answers,
    check_columns,
    check_model,
    check_prompts,
    check_sizes,
    missing_columns,
    sharding_of,
    warn_about_memory,
)
from opefo_trl.data.templates import DAPO_PREFIX, DAPO_SUFFIX
from opefo_trl.rewards import REWARDS, find_reward, format_reward, math_reward

BOXED = "{} Put the answer into \\boxed{{}}."


def test_columns_that_a_reward_needs():
    def reward(prompts, completions, answer, weight=1.0, **kwargs):
        return answer

    assert missing_columns(reward, ["prompt"]) == ["answer"]
    assert missing_columns(reward, ["prompt", "answer"]) == []
    of_prompts = lambda prompt, completions, trainer_state, **others: []  # noqa: E731
    assert missing_columns(of_prompts, ["prompt"]) == ["prompt"]  # which TRL does not pass on
    with pytest.raises(ValueError, match="'mine' .*'prompt'.* prompt, answer"):
        check_columns(["mine"], [of_prompts], ["prompt", "answer"])


def test_the_hub_is_not_asked_for_the_playgrounds_model(monkeypatch):
    monkeypatch.setattr("transformers.utils.peft_utils.cached_file", lambda name, *_, **__: pytest.fail(name))
    check_model(ModelConfig("playground"), False)


def test_a_reward_takes_all_that_trl_gives_it():
    columns = ["prompt", "answer", "source"]
    with pytest.raises(ValueError, match=r"'exact' takes no .*log_extra.*prompts, source, .*\*\*kwargs"):
        check_columns(["exact"], [lambda completions, answer: []], columns)

    def every(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, source):
        return []

    check_columns(["every"], [every], columns)
    columns += ["target", "letters", "words", "pair"]
    check_columns([*REWARDS], [find_reward(name, 9) for name in REWARDS], columns)


def test_answers_that_nothing_can_be_compared_with_are_named():
    rows = Dataset.from_list(
        [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "left to the reader, it is easy"}]
    )
    with pytest.raises(ValueError, match="1 of 2 rows .*'train'.* row 1,.*'left to.*--answer_column"):
        check_answers([format_reward, math_reward], rows, "train")
    check_answers([format_reward], rows, "train")  # which does not read them
    check_answers([math_reward], rows.select([0]), "train")


def test_prompts_and_rewards_have_to_agree(recwarn):
    asks = {"math": BOXED.format("1+1?"), "math_answer_line": DAPO_PREFIX + "1+1?" + DAPO_SUFFIX}
    for name, prompt in asks.items():
        check_prompts([name], prompt)
        check_prompts([name], [{"role": "user", "content": prompt}])
    check_prompts(["playground"], "Make 24")
    assert not recwarn.list
    with pytest.raises(ValueError, match="'math'.*--prompt_template boxed"):
        check_prompts(["math"], asks["math_answer_line"])
    with pytest.raises(ValueError, match="'math_answer_line'.*--prompt_template dapo"):
        check_prompts(["math_answer_line"], asks["math"])
    with pytest.warns(UserWarning, match="'math'.*--prompt_template boxed"):
        check_prompts(["math"], "1+1?")


def test_rollouts_and_evaluation_batches_must_be_filled():
    args = SimpleNamespace(
        generation_batch_size=32,
        num_generations=4,
        num_generations_eval=None,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=6,
        world_size=2,
    )
    check_sizes(args, 8, True)
    with pytest.raises(
        ValueError, match="7 prompts.* 8 .*`generation_batch_size=32`.*`per_device_train_batch_size=16`.* 2 processes"
    ):
        check_sizes(args, 7, True)
    args.num_generations_eval = 5
    check_sizes(args, 8, False)
    with pytest.raises(ValueError, match="`per_device_eval_batch_size=6` on 2 .* 5 samples"):
        check_sizes(args, 8, True)


def test_a_run_that_cannot_fit_is_warned_about(monkeypatch, tmp_path):
    args = OPEFOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=64)

    def warned(name, gib, prompt="1+1=?", **model):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=gib * 2**30))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_about_memory(args, ModelConfig(model_name_or_path=name, **model), ["2+2=?", prompt])
        return " ".join(str(warning.message) for warning in caught)

    assert warned("playground", 16) == "" and warned("Qwen/Qwen2.5-Math-7B", 4096) == ""
    assert warned(str(tmp_path), 1) == ""  # a folder without a config: there is nothing to plan with
    message = warned("Qwen/Qwen2.5-Math-7B", 16)
    assert all(
        word in message for word in ("training takes", "of 16.0", "`per_device_train_batch_size`", "opefo-trl plan")
    )
    small = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert warned(small, 24) == "" and "of 24.0" in warned(small, 24, [{"role": "user", "content": "long " * 2000}])
    assert warned(small, 1, use_peft=True, lora_target_modules=["q_proj", "lm_head"]) == ""  # not in the plan
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "of 4.0" in warned("Qwen/Qwen2.5-Math-7B", 16)


@pytest.mark.parametrize(
    ("stage", "fsdp", "processes", "name"),
    [(None, "", 1, "none"), (None, "", 8, "ddp"), (None, "true", 8, "fsdp"), (3, "", 8, "zero3"), (0, "", 8, "ddp")],
)
def test_the_sharding_of_a_run_is_that_of_its_launcher(monkeypatch, stage, fsdp, processes, name):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    assert sharding_of(SimpleNamespace(deepspeed_plugin=plugin, world_size=processes)) == name
