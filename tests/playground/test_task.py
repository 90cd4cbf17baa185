"""The task of the playground and its data."""

import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opefo_trl.playground import MODEL, TASKS, playground_dataset, playground_reward, resolve_model
from opefo_trl.playground.task import MAX_ANSWER, TARGETS, is_right, question, random_expression, value


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3*8", 24),
        ("(7-1)*4", 24),
        ("2+3*4", 14),
        ("20-5-5", 10),  # grouped from the left
        ("48/2/2", 12),
        ("7/2*4", 14),  # 7/2 stays exact
        ("1/3", Fraction(1, 3)),
        ("((1+2))*3", 9),
    ],
)
def test_values(answer, expected):
    assert value(answer) == expected


@pytest.mark.parametrize(
    "answer",
    ["", "24", "(24)", "3--4", "-3+27", "+3+4", "03+21", "3*8=24", "3 * 8", "3*8+", "(3*8", "3*8)", "()", "2**3",
     "4//2", "5/0", "5/(3-3)", "2(3)", "3*x", "٣+٣", "1e9+1", "(" * 5000 + "1+1" + ")" * 5000],
)  # fmt: skip
def test_what_is_not_an_expression_has_no_value(answer):
    assert value(answer) is None


@given(st.recursive(
    st.integers(1, 50).map(str),
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map(lambda trio: "({}{}{})".format(*trio)),
    max_leaves=8,
))  # fmt: skip
def test_values_are_those_of_python(answer):
    exact = re.sub(r"(\d+)", r"Fraction(\1)", answer)
    try:
        expected = None if answer.isdigit() else eval(exact, {"Fraction": Fraction})  # one number is no expression
    except ZeroDivisionError:
        expected = None
    assert value(answer) == expected


def test_the_reward_takes_texts_and_conversations():
    answers = ["3*8", " 3*8\n", "3*9", "24"]
    chats = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert playground_reward(answers, target=[24] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert playground_reward(chats, target=[24] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_random_expressions_are_right_and_short():
    generator = random.Random(0)
    for _ in range(500):
        answer, target = random_expression(generator)
        assert is_right(answer, target) and target in TARGETS and len(answer) <= MAX_ANSWER


def test_held_out_prompts_are_never_trained_on():
    train, test = playground_dataset("train"), playground_dataset("test")
    assert not set(train["target"]) & set(test["target"])
    assert sorted([*train["target"], *test["target"]]) == list(TARGETS)
    assert len(test) == 36 and list(test["target"]) == sorted(test["target"])
    assert {target // 10 for target in test["target"]} == set(range(1, 10))  # every decade
    assert train[0]["prompt"] == [{"role": "user", "content": question(train[0]["target"])}]
    with pytest.raises(ValueError, match="`split='validation'`.*'train', 'test'"):
        playground_dataset("validation")
    assert set(TASKS["playground"].splits) == {"train", "test"}


def test_only_the_name_means_the_playground(tmp_path):
    assert resolve_model("playground") == str(MODEL)
    assert resolve_model("./playground") == "./playground"
    model = object()
    assert resolve_model(model) is model
