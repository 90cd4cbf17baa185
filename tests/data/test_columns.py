"""Columns of data sets get the names that TRL and the rewards look for."""

import pytest
from datasets import Dataset

from opefo_trl.data import bare_problems
from opefo_trl.data.columns import find_column


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "p", "answer": "1"}, "1"),
        ({"question": "p", "answer": "so\n#### 1"}, "so\n#### 1"),  # GSM8K
        ({"Problem": "p", "Answer": "1"}, "1"),
        ({"problem": "p", "solution": "is \\boxed{1}"}, "is \\boxed{1}"),  # MATH
        ({"prompt": "p", "reward_model": {"ground_truth": "1", "style": "x"}}, "1"),  # DAPO
        ({"prompt": "p"}, None),
    ],
)
def test_columns_are_found_without_being_named(row, answer):
    bare = bare_problems(Dataset.from_list([row]))[0]
    assert bare["prompt"] == "p" and bare.get("answer") == answer
    assert {name: bare[name] for name in row} == row  # and stay for rewards that read them


def test_the_first_name_wins_and_lower_case_goes_first():
    assert find_column(("problem", "question"), ["Question", "Problem"]) == "Problem"
    assert find_column(("answer",), ["answer", "Answer"]) == find_column(("answer",), ["Answer", "answer"]) == "answer"
    assert find_column(("answer",), ["gold"]) is None


def test_columns_and_fields_can_be_named():
    data = Dataset.from_list([{"question": "1+1=", "solution": "2", "answer": "two"}])
    assert bare_problems(data, "question", "solution")[0] == {"prompt": "1+1=", "answer": "2"}
    with pytest.raises(ValueError, match=r"'prompt'; it has text, answer.*--prompt_column"):
        bare_problems(Dataset.from_list([{"text": "1+1=", "answer": "2"}]))
    with pytest.raises(ValueError, match=r"'gold'.*--answer_column"):
        bare_problems(data, "question", "gold")
    data = Dataset.from_list([{"prompt": "p", "meta": {"gold": {"text": "5"}}}])
    assert bare_problems(data, None, "meta.gold.text")[0]["answer"] == "5"
    with pytest.raises(ValueError, match=r"'meta\.silver'; it has prompt, meta.*--answer_column"):
        bare_problems(data, None, "meta.silver")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "  "}], "1 of 1 rows .*'prompt'.* row 0"),
        ([{"prompt": [{"role": "user", "content": ""}]}], "1 of 1 rows .*'prompt'"),
        ([{"prompt": "a", "answer": 1.0}, {"prompt": "b", "answer": float("nan")}], "1 of 2 rows .*'answer'.* row 1"),
        (
            [{"prompt": "a", "reward_model": {"ground_truth": "1"}}, {"prompt": "b", "reward_model": None}],
            r"1 of 2 rows .*'reward_model\.ground_truth'.* row 1",
        ),
    ],
)
def test_empty_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        bare_problems(Dataset.from_list(rows))
