"""Which part of a text is its answer."""

import pytest

from opefo_trl.grading.answers import answer_of, bare, boxes_of


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"so \boxed{72}", ["72"]),
        (r"\boxed{\frac{1}{2}} and \fbox{3}", [r"\frac{1}{2}", "3"]),
        (r"\boxed {4}", ["4"]),
        (r"\boxed{}\boxed{ }", []),
        (r"\boxed{72", []),
        (r"\boxed{\boxed{3}}", [r"\boxed{3}"]),
        (r"\boxed{unclosed and then \boxed{5}", ["5"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\left\{x \mid x > 0\right.}", [r"\left\{x \mid x > 0\right."]),  # an escaped brace closes nothing
        (r"{{ \boxed{6} }", ["6"]),
        (r"} \boxed{7}", ["7"]),
        (r"a line \\{ \boxed{8}", ["8"]),
    ],
)
def test_boxes(text, boxes):
    assert boxes_of(text) == boxes


def test_braces_by_the_hundred_thousand_take_no_time():
    """A quadratic scan would run into the timeout of the test."""
    many = 200_000
    assert boxes_of(r"\boxed{" * many) == boxes_of("{" * 5 * many) == []
    (box,) = boxes_of(r"\boxed{" * many + "1" + "}" * many)
    assert box.startswith(r"\boxed{") and len(boxes_of(box)) == 1


@pytest.mark.parametrize(
    ("text", "policy", "answer"),
    [
        (r"\boxed{1} wait \boxed{ 2 }", "boxed", "2"),
        ("Answer: 5", "boxed", None),
        ("Answer: 4\nno\n**Answer:** 5 \n", "answer_line", "5"),
        ("the answer: 5 is good", "answer_line", None),
        ("Answer:", "answer_line", None),
        ("Answer: $\\frac{1}{2}$.", "answer_line", "$\\frac{1}{2}$."),
        (r"\boxed{3}. Answer: 4", "lenient", "3"),
    ],
)
def test_policies_find_the_last_answer(text, policy, answer):
    assert answer_of(text, policy) == answer


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (72, "72"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("$69$,$84$", "$69$,$84$"),  # two answers: the dollars within stay
        ("so 3.\n#### 1,234", "1,234"),
        (r"Hence $x = \boxed{x^2}$.", "x^2"),
        (["1", "$2$"], "1, 2"),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_golds_come_in_many_wrappings(gold, text):
    assert bare(gold) == text
