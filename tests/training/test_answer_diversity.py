"""Counting different right answers."""

import torch
from scripts import python

from opefo_trl.rewards import math_reward, words_reward
from opefo_trl.training.answer_diversity import RolloutAnswers, digest, digests_of, distinct_right, normal_form_of
from opefo_trl.training.reward_guard import watch_reward


def test_a_text_and_a_conversation_have_one_name():
    assert digest("3*8") == digest([{"role": "assistant", "content": "3*8"}]) == digest(" 3*8\n")
    assert digest("3*8") != digest("8*3")
    assert 0 <= digest("") < 2**63 and digest("\ud800") != digest("")  # a broken surrogate has a name too


def test_names_are_those_of_every_other_process():
    command = "from opefo_trl.training.answer_diversity import digest; print(digest('3*8'))"
    assert int(python("-c", command)) == digest("3*8")


def test_distinct_right_answers_are_counted_in_each_group():
    # right and different: {a, b} in the first group, {c} in the second, none in the third: (2 + 1 + 0) / 3
    names = digests_of(list("aab" + "ccd" + "efg"), torch.device("cpu"))
    right = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0]).bool()
    assert distinct_right(names, right, 3) == (1.0, 2 / 3)


def test_the_first_reward_function_says_which_answers_are_one():
    form = normal_form_of([watch_reward(words_reward, "words", False), math_reward])  # as the trainer wraps it
    names = digests_of(["Brook.", "brook", "bread", "a brook"], torch.device("cpu"), form)
    assert distinct_right(names, torch.ones(4).bool(), 4) == (3.0, 1.0)
    assert normal_form_of([math_reward, words_reward]) is str.strip


class SecondOfTwo:
    """What the second of two processes sees; the first one's completions are known."""

    process_index = 1

    def gather(self, own):
        return torch.cat([digests_of(list("aabc"), own.device), own])


def test_a_process_keeps_the_rewards_of_its_own_completions():
    nan = float("nan")
    rewards = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0], [0, 1], [0, nan], [nan, nan]])
    weights = torch.tensor([1.0, 0.5])
    answers = RolloutAnswers.count(rewards, weights, list("wxyz"), 4, SecondOfTwo())
    torch.testing.assert_close(answers.rewards, torch.tensor([1, 0.5, 0, nan]), equal_nan=True)
    assert answers.right.tolist() == [True, False, False, False]
    torch.testing.assert_close(answers.solved_share, torch.full((4,), 1 / 3))  # one of the four was not judged
    assert (answers.distinct, answers.solved) == (1.0, 1.0)  # two right answers of the first process are the same
    advantages = torch.tensor([-1.0, 2.0, 0.0, -1.0])
    assert answers.right_or_better(advantages) is answers.right
    none_right = RolloutAnswers.count(rewards * 0.5, weights, list("wxyz"), 4, SecondOfTwo())
    assert none_right.right_or_better(advantages).tolist() == [False, True, False, False]
