"""The words task: the list, the judge, and the letters of the two splits."""

import pytest

from opefo_trl.playground import TASKS, words_reward
from opefo_trl.playground.words import is_right, normal_form, word_list

SPLITS = TASKS["words"].splits


@pytest.mark.parametrize("answer", ["brook", "Brook", "BRING", "bread.", "Bread!", " brown\n"])
def test_one_word_of_the_list_is_right(answer):
    assert is_right(answer, "br") and words_reward([answer], letters=["br"]) == [1.0]


@pytest.mark.parametrize(
    "answer",
    ["", "br", "Brian", "brxyz", "The word is brook.", "brook river", "brook,", "bread. Brook.", "crook", "."],
)
def test_anything_else_is_wrong(answer):
    assert not is_right(answer, "br")


def test_a_person_would_count_these_as_one_answer():
    assert {normal_form(answer) for answer in ("Brook", "brook.", " BROOK!\n")} == {"brook"}
    assert normal_form(" The word is brook. ") == "The word is brook."
    assert words_reward.normal_form is TASKS["words"].normal_form is normal_form


def test_held_out_prompts_share_no_letter_with_those_that_are_trained_on():
    trained, held_out = (set("".join(SPLITS[split])) for split in ("train", "test"))
    assert trained and held_out and not trained & held_out
    assert SPLITS["test"]["di"] == "Answer with one word. Write an English word that starts with DI."
    assert SPLITS["train"]["b"] == "Answer with one word. Write an English word that starts with the letter B."


def test_every_prompt_has_many_right_answers():
    words = word_list()
    assert len(words) == 38_842 and all(word.isalpha() and word.islower() and len(word) > 2 for word in words)
    for letters in [*SPLITS["train"], *SPLITS["test"]]:
        assert sum(word.startswith(letters) for word in words) >= 60, letters
