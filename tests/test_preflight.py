"""What is refused before the first step. (Most of it: test_train_script.py.)"""

import pytest

from opefo_trl.preflight import check_columns, missing_columns


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
