"""Rows to evaluate on are not trained on."""

import pytest
from datasets import Dataset

from opefo_trl.data import hold_out, whole_batches

ROWS = Dataset.from_list([{"prompt": f"{index}+1="} for index in range(10)])


def test_rows_come_from_the_test_split_in_whole_batches():
    train, test = hold_out(ROWS, ROWS.select(range(4)), 3, 0, "x")
    assert len(train) == 10 and len(test) == 3
    assert len(hold_out(ROWS, ROWS, None, 0, "x")[1]) == 10
    assert [len(whole_batches(ROWS, size)) for size in (3, 5, 10, 64)] == [9, 10, 10, 10]


def test_without_a_test_split_they_are_taken_off_the_training_rows():
    train, test = hold_out(ROWS, None, 3, 0, "x")
    assert len(train) == 7 and len(test) == 3 and not set(train["prompt"]) & set(test["prompt"])
    assert hold_out(ROWS, None, 3, 0, "x")[1]["prompt"] == test["prompt"]
    assert len(hold_out(ROWS, None, None, 0, "x")[1]) == 1  # a tenth
    assert hold_out(ROWS, None, 0, 0, "x")[1] is None
    with pytest.raises(ValueError, match="`eval_prompts=10`.*'x'"):
        hold_out(ROWS, None, 10, 0, "x")
