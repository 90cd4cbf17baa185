"""Which part of a text is its answer."""

import pytest
import yaml
from material import MATERIAL

from opefo_trl.grading.answers import answer_of, bare, boxes_of, without_thinking

CASES = yaml.safe_load((MATERIAL / "answers.yaml").read_text())


@pytest.mark.parametrize(("text", "boxes"), CASES["boxes"])
def test_boxes(text, boxes):
    assert boxes_of(text) == boxes


def test_braces_by_the_hundred_thousand_take_no_time():
    """A quadratic scan would run into the timeout of the test."""
    many = 200_000
    assert boxes_of(r"\boxed{" * many) == boxes_of("{" * 5 * many) == []
    (box,) = boxes_of(r"\boxed{" * many + "1" + "}" * many)
    assert box.startswith(r"\boxed{") and len(boxes_of(box)) == 1


@pytest.mark.parametrize(("text", "policy", "answer"), CASES["policies"])
def test_policies_find_the_last_answer(text, policy, answer):
    assert answer_of(text, policy) == answer


@pytest.mark.parametrize(("text", "rest"), CASES["thinking"])
def test_what_a_model_thinks_is_no_answer(text, rest):
    assert without_thinking(text) == rest


@pytest.mark.parametrize(("gold", "text"), CASES["golds"])
def test_golds_come_in_many_wrappings(gold, text):
    assert bare(gold) == text
