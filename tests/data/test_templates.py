"""Templates go around a problem and come off it again."""

import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

from opefo_trl.data import with_template
from opefo_trl.data.templates import DAPO_PREFIX, DAPO_SUFFIX, strip_dapo_template, text_of


def templated(problem, template):
    return with_template(Dataset.from_list([{"prompt": problem}]), template)[0]["prompt"]


def test_a_template_makes_a_chat_of_a_problem():
    (message,) = templated("1+1=", "boxed")
    assert message["role"] == "user"
    assert message["content"].startswith("1+1=\n") and message["content"].endswith("\\boxed{}.")
    assert templated("1+1=", "none") == "1+1="
    braces = r"Find \frac{1}{2} of {x} and {problem}"
    assert all(braces in templated(braces, template)[0]["content"] for template in ("boxed", "dapo"))


def test_an_unknown_template_and_one_around_a_conversation_are_refused():
    with pytest.raises(ValueError, match="`prompt_template='box'`.*'boxed'"):
        templated("1+1=", "box")
    with pytest.raises(ValueError, match="`prompt_template='boxed'`.*conversations.*--prompt_column"):
        templated([{"role": "user", "content": "1+1="}], "boxed")


# Stripping letters of the template would eat both ends of such a problem
LETTERS = DAPO_PREFIX + DAPO_SUFFIX + "\\ "


@given(st.text(st.sampled_from(LETTERS), min_size=1))
@example(DAPO_PREFIX)
@example(DAPO_SUFFIX)
@example(DAPO_PREFIX + "x" + DAPO_SUFFIX)
def test_dapos_template_comes_off_to_the_letter(problem):
    prompt = DAPO_PREFIX + problem + DAPO_SUFFIX
    assert strip_dapo_template(prompt) == strip_dapo_template([{"role": "user", "content": prompt}]) == problem
    assert templated(problem, "dapo")[0]["content"] == prompt
    two = [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}]
    assert strip_dapo_template(two) == two and strip_dapo_template(problem[1:]) == problem[1:]


def test_the_text_of_a_conversation_and_of_its_last_message():
    messages = [{"role": "assistant", "content": "a"}, {"role": "tool"}, {"role": "assistant", "content": "b"}]
    assert text_of("a") == text_of("a", last_only=True) == "a"
    assert text_of(messages) == "a\n\nb" and text_of(messages, last_only=True) == "b"
    assert text_of(messages[:2], last_only=True) == text_of([]) == ""
