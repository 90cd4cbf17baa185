"""Tasks that come with the package: their data, their judges, and their names everywhere."""

import inspect

import pytest

from opefo_trl.data import load_splits
from opefo_trl.evaluation.samples import TaskGrader, benchmark_of, load_problems
from opefo_trl.playground import TASKS
from opefo_trl.playground.embedded import judge
from opefo_trl.rewards import REWARDS, find_reward

RIGHT = {
    "playground": ("10", "4+6"),
    "words": ("di", "Dinner."),
    "sentences": ("river bird", "A bird sat by the river."),
}


def test_answers_are_texts_or_the_last_of_a_conversation():
    chat = [{"role": "assistant", "content": "hm"}, {"role": "assistant", "content": " a "}]
    assert judge(["a", " a\n", "b", chat], "aaaa", str.__eq__) == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_data_set_a_reward_and_a_benchmark_of_one_name(name):
    task, (gold, answer) = TASKS[name], RIGHT[name]
    splits = load_splits(name)
    assert set(splits) == {"train", "test"} and set(splits["train"].column_names) == {"prompt", task.gold}
    assert not set(splits["train"][task.gold]) & set(splits["test"][task.gold])
    assert name in REWARDS
    reward = find_reward(name, 10)
    assert task.gold in inspect.signature(reward).parameters  # which train.py checks the columns by
    problems = load_problems(name)
    assert len(problems) == len(splits["test"]) == benchmark_of(name).counts[0]
    (problem,) = (row for row in problems if row["answer"] == gold)
    assert problem["problem"] == splits["test"][problems.index(problem)]["prompt"][0]["content"]
    right, wrong = TaskGrader(task).grade([gold, gold], [f" {answer}\n", "no"])
    assert right.correct and not wrong.correct and right.answer == task.normal_form(answer)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="`split='validation'` of the words.*'train', 'test'"):
        TASKS["words"].dataset("validation")
