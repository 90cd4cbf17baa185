"""Training sets as they are sampled: prompts as in training, judged by the first reward function."""

import pandas as pd
import pytest
from datasets import Dataset
from trl import GRPOTrainer

from opefo_trl.evaluation.model_source import ModelSource
from opefo_trl.evaluation.training_set import RewardGrader, report_pass_rates, training_task
from opefo_trl.grading import Grader
from opefo_trl.playground import TASKS, playground_dataset
from opefo_trl.rewards import MathReward, overlong_reward

PLAIN = Dataset.from_dict({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"], "weight": [1, 0]})


def test_rewards_get_what_they_get_in_training():
    seen = {}

    def reward(prompts, completions, weight, log_metric, **others):
        log_metric("some", 1.0)
        seen.update(others, prompts=prompts, completions=completions, weight=weight)
        return [0.6, 0.5]

    grades = RewardGrader(reward).grade(list(PLAIN), ["a", "b"])
    assert [grade.outcome for grade in grades] == ["correct", "wrong"]
    assert seen.keys() == {"prompts", "completions", "weight", "answer", "log_extra"}
    assert seen["prompts"] == ["1+1=", "2+2="] and seen["completions"] == ["a", "b"] and seen["weight"] == [1, 0]
    rows = playground_dataset("train").select([0, 1])
    RewardGrader(lambda completions, **_: seen.update(completions=completions) or [1, 1]).grade(list(rows), ["a", "b"])
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in "ab"]


def test_completions_without_a_reward_are_errors_and_coroutines_are_awaited():
    async def reward(completions, **_):
        return [None, float("nan"), 1.0]

    reward.normal_form = str.upper
    grades = RewardGrader(reward).grade([PLAIN[0]] * 3, ["a", "b", "c"])
    assert [(grade.outcome, grade.answer) for grade in grades] == [("error", "A"), ("error", "B"), ("correct", "C")]


def test_a_reward_that_needs_a_training_is_refused():
    with pytest.raises(ValueError, match="'completion_ids'.*--reward_funcs"):
        RewardGrader(overlong_reward(100))


@pytest.mark.parametrize("rows", [PLAIN, playground_dataset("train").select(range(5))], ids=["texts", "conversations"])
def test_prompts_are_tokenized_as_trl_does(rows):
    tokenizer = ModelSource("playground").tokenizer()
    task = training_task("some/data", "train", rows, "none", tokenizer, lambda **_: [], 3)
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.processing_class, trainer._is_vlm, trainer.environment_factories = tokenizer, False, None
    trainer.tools, trainer.chat_template, trainer.chat_template_kwargs = [], None, {}
    assert task.prompts == trainer._tokenize_prompts(list(rows["prompt"]))[0]
    tokenizer.chat_template = "{% if brief %}Brief: {% endif %}" + tokenizer.chat_template
    trainer.chat_template_kwargs = {"brief": True}
    other = training_task("some/data", "train", rows, "none", tokenizer, lambda **_: [], 3, brief=True)
    assert other.prompts == trainer._tokenize_prompts(list(rows["prompt"]))[0]
    assert (other.prompts == task.prompts) == isinstance(rows[0]["prompt"], str)
    assert (task.name, task.k, task.max_new_tokens) == ("data-train", 3, None)
    assert [task.gold(index) for index in range(len(rows))] == list(rows)  # rows, for rewards that read any column


def test_math_is_judged_by_the_grader_of_its_reward():
    tokenizer = ModelSource("playground").tokenizer()
    reward = MathReward("answer_line", 3.0)
    task = training_task("train.jsonl", "train", PLAIN, "dapo", tokenizer, reward, 2)
    assert isinstance(task.grader, Grader) and (task.grader.policy, task.grader.timeout) == ("answer_line", 3.0)
    assert [task.gold(0), task.gold(1)] == ["2", "4"] and task.problems[1]["problem"] == "2+2="
    with task.grader as grader:
        assert [grade.outcome for grade in grader.grade([task.gold(0)] * 2, ["Answer: 2", r"\boxed{2}"])] == [
            "correct",
            "no_answer",
        ]
    embedded = training_task("playground", "train", playground_dataset("train"), "none", tokenizer, print, 2)
    assert embedded.max_new_tokens == TASKS["playground"].max_new_tokens


def test_rates_are_counts_of_right_samples(tmp_path):
    task = training_task("train.jsonl", "train", PLAIN, "none", ModelSource("playground").tokenizer(), print, 4)
    outcomes = {"train-train-0": ["correct", "wrong", "timeout", "correct"], "train-train-1": ["error"] * 4}
    rows = [{"id": name, "outcome": outcome} for name, each in reversed(outcomes.items()) for outcome in each]
    printed = report_pass_rates(tmp_path, task, pd.DataFrame(rows))
    assert "train-train: 2 problems, 4 samples each: 25.0% right" in printed  # 2 of 8
    written = pd.read_json(tmp_path / "train-train.jsonl", lines=True)
    assert written["problem"].tolist() == ["1+1=", "2+2="] and written["pass_rate"].tolist() == [0.5, 0]
