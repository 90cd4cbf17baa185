"""The sentences task: the judge, and the words of the two splits."""

from collections import Counter

import pytest

from opefo_trl.playground import TASKS, sentences_reward
from opefo_trl.playground.sentences import is_right, normal_form

SPLITS = TASKS["sentences"].splits
LONG = "The river was dark " + "and very " * 3 + "cold by the"  # 13 words


@pytest.mark.parametrize(
    "answer",
    [
        "The lantern lit the river.",  # five words
        "Lantern in hand, she crossed the cold RIVER at night.",
        " A river's edge, a lantern's glow: the river took the lantern.\n",
        LONG + " lantern.",  # 14 words
    ],
)
def test_one_short_sentence_with_both_words_is_right(answer):
    assert is_right(answer, "river lantern") and sentences_reward([answer], pair=["river lantern"]) == [1.0]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "River and lantern.",  # four words
        "The lantern lit the river",  # no full stop
        "The lantern lit the river!",
        "The lantern was lit. The river was dark.",
        "The lantern lit\nthe dark river.",
        "The lanterns lit the dark river.",  # another word
        "The boat was on the river.",
        LONG + " old lantern.",
        "River lantern river lantern river.",
        "A a a river lantern.",
        "River lantern 1 2 3.",
        "The river flowed… the lantern glowed.",
    ],
)
def test_anything_else_is_wrong(answer):
    assert not is_right(answer, "river lantern")


def test_a_person_would_count_these_as_one_answer():
    answers = ("The lantern lit the river.", "the lantern, lit the river", " The  Lantern lit the river!\n")
    assert {normal_form(answer) for answer in answers} == {"the lantern lit the river"}
    assert sentences_reward.normal_form is TASKS["sentences"].normal_form is normal_form


def test_held_out_prompts_share_no_word_with_those_that_are_trained_on():
    trained, held_out = (Counter(" ".join(SPLITS[split]).split()) for split in ("train", "test"))
    assert not set(trained) & set(held_out)
    assert len(SPLITS["train"]) == 120 and set(trained.values()) == {6}  # every word as often
    assert len(SPLITS["test"]) == 28 and all(len(set(pair.split())) == 2 for pair in [*SPLITS["train"]])
    assert SPLITS["test"]["river lantern"] == "Write one short sentence with the words river and lantern."
