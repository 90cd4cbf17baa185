"""Reward functions by name."""

import pickle
import sys

import pytest

from opefo_trl.rewards import REWARDS, MathReward, find_reward, format_reward, math_reward, overlong_reward


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("72", r"so \boxed{72}", 1.0),
        ("72", r"so \boxed{73}", 0.0),
        ("72", "no answer at all", 0.0),
        (r"$\frac{1}{2}$", r"\boxed{0.5}", 1.0),
        ("She has 48/2 = 24.\n#### 24", r"\boxed{24}", 1.0),  # GSM8K
        (7, r"\boxed{7}", 1.0),
        ("12", "First, \\boxed{3}.\n\nWait, that is wrong. So the answer is \\boxed{12}.", 1.0),  # the last one counts
        ("3", "First, \\boxed{3}.\n\nWait, that is wrong. So the answer is \\boxed{12}.", 0.0),
        (r"With \boxed{3} and so \boxed{12}.", r"\boxed{12}", 1.0),
        ("12", "The answer is 12", 0.0),  # no box, no answer
    ],
)
def test_math(gold, completion, expected):
    chat = [{"role": "assistant", "content": completion}]
    no_content = [{"role": "assistant", "tool_calls": []}]
    assert math_reward([completion, chat, no_content], answer=[gold] * 3) == [expected, expected, 0.0]


@pytest.mark.slow
def test_an_answer_that_cannot_be_graded_has_no_reward():
    assert math_reward([r"\boxed{1}"], answer=[""]) == [None]
    slow = MathReward(timeout=0.7, workers=1)
    assert slow([r"\boxed{9^{9^{9^{9^{9}}}}}", r"\boxed{3}"], answer=["3", "3"]) == [None, 1.0]


def test_outcomes_are_logged():
    metrics, extra = {}, {}
    completions = [r"\boxed{1}", r"\boxed{2}", "?", r"\boxed{1}"]
    rewards = math_reward(completions, ["1"] * 4, log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
    assert rewards == [1.0, 0.0, 0.0, 1.0]
    assert metrics == {
        "grading/correct": 0.5,
        "grading/wrong": 0.25,
        "grading/no_answer": 0.25,
        "grading/timeout": 0.0,
        "grading/error": 0.0,
    }
    assert extra == {"grade": ["correct", "wrong", "no_answer", "correct"], "found_answer": ["1", "2", None, "1"]}


def test_the_answer_line_of_dapo():
    reward = find_reward("math_answer_line", 10)
    assert reward(["so\nAnswer: 5", "Answer: 5", r"\boxed{5}"], answer=["5", "6", "5"]) == [1.0, 0.0, 0.0]


def test_a_reward_can_be_sent_to_another_process():
    reward = pickle.loads(pickle.dumps(MathReward("answer_line", 3.0, 1)))
    assert reward.options == ("answer_line", 3.0, 1) and reward.__name__ == "math_answer_line_reward"


def test_overlong_answers_are_punished_over_the_last_fifth():
    reward = overlong_reward(100)
    assert reward(completion_ids=[[0] * n for n in (0, 80, 90, 100, 101)]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert find_reward("overlong", 50)(completion_ids=[[0] * 45]) == [-0.5]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"so \boxed{72}", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        ("72", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{72", 0.0),
        (r"\boxed{1} or \boxed{2}", 0.0),
    ],
)
def test_format(completion, expected):
    assert format_reward([completion, [{"role": "assistant", "content": completion}]]) == [expected, expected]


def test_rewards_are_found_by_name_or_path(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def exact(completions, **_):\n    return [1.0]\nnumber = 1\n")
    (tmp_path / "broken.py").write_text("def exact(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert find_reward("math", 10) is math_reward and set(REWARDS) >= {"math", "format", "overlong", "playground"}
    assert find_reward("rewards_of_mine.exact", 10)(completions=[""]) == [1.0]
    for name, words in {
        "maths": "'math', 'math_answer_line', 'format', 'overlong', 'playground'.*dotted path",
        "rewards_of_mine.inexact": "cannot be imported",
        "nowhere.exact": "cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
        "rewards_of_mine.number": "is not a function",
        "broken.exact": "cannot be imported: SyntaxError",
    }.items():
        with pytest.raises(ValueError, match=words):
            find_reward(name, 10)
