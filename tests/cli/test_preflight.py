"""What is refused before the first step. (Most of it: test_train_script.py.)"""

import pytest
from datasets import Dataset

from opefo_trl.cli.preflight import check_answers, check_columns, check_prompts, missing_columns
from opefo_trl.data.cleaning import DAPO_AFTER, DAPO_BEFORE
from opefo_trl.rewards import format_reward, math_reward

BOXED = "{} Put the answer into \\boxed{{}}."


def test_columns_that_a_reward_needs():
    def reward(prompts, completions, answer, weight=1.0, **kwargs):
        return answer

    assert missing_columns(reward, ["prompt"]) == ["answer"]
    assert missing_columns(reward, ["prompt", "answer"]) == []


def test_what_trl_does_not_pass_on_is_missing():
    def reward(prompt, completions, trainer_state):
        return []

    assert missing_columns(reward, ["prompt"]) == ["prompt"]
    with pytest.raises(ValueError, match="The reward 'mine' needs a column 'prompt'; the data has prompt, answer"):
        check_columns(["mine"], [reward], ["prompt", "answer"])


def test_answers_that_nothing_can_be_compared_with_are_named():
    rows = Dataset.from_list(
        [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "left to the reader, it is easy"}]
    )
    with pytest.raises(
        ValueError, match=r"1 of 2 rows of the split 'train' have answers that cannot be read, first row 1"
    ):
        check_answers([math_reward], rows, "train")
    check_answers([format_reward], rows, "train")  # which does not look at them
    check_answers([math_reward], rows.select([0]), "train")


def test_prompts_and_rewards_have_to_agree(recwarn):
    asks = {"math": BOXED.format("1+1?"), "math_answer_line": DAPO_BEFORE + "1+1?" + DAPO_AFTER}
    for name, prompt in asks.items():
        check_prompts([name], prompt)
        check_prompts([name], [{"role": "user", "content": prompt}])
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"prompts ask for a line 'Answer:'.*--prompt_template boxed"):
        check_prompts(["math"], asks["math_answer_line"])
    with pytest.raises(ValueError, match=r"which the prompts do not ask for.*--prompt_template dapo"):
        check_prompts(["math_answer_line"], asks["math"])
    with pytest.warns(UserWarning, match="which the first prompt does not ask for"):
        check_prompts(["math"], "1+1?")
    check_prompts(["playground"], "Make 24")
