"""Training data from wherever it lies."""

import json

import pytest
from datasets import Dataset, DatasetDict

from opefo_trl.data import hold_out, load_splits, pick_split, shape_prompts, whole_batches

ROWS = [{"prompt": f"{index}+1=", "answer": str(index + 1)} for index in range(10)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.json"])
def test_files(folder, name):
    splits = load_splits(str(folder / name))
    assert list(splits) == ["train"] and splits["train"]["prompt"] == [row["prompt"] for row in ROWS]


def test_folders(folder, tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(folder / "saved")
    Dataset.from_list(ROWS).save_to_disk(folder / "one")
    (folder / "files").mkdir()
    (folder / "files" / "train.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "files" / "test.jsonl").write_text((folder / "rows.jsonl").read_text())
    assert {name: len(rows) for name, rows in load_splits(str(folder / "saved")).items()} == {"train": 10, "test": 2}
    assert list(load_splits(str(folder / "one"))) == ["train"]
    assert set(load_splits(str(folder / "files"))) == {"train", "test"}


def test_the_playground():
    assert set(load_splits("playground")) == {"train", "test"}


def test_what_is_not_there_or_cannot_be_read(folder):
    (folder / "broken.jsonl").write_text('{"prompt": ')
    (folder / "notes.txt").write_text("hello")
    (folder / "empty").mkdir()
    for name, words in {
        "nowhere.jsonl": "There is no file",
        "./nowhere": "There is no file",
        str(folder / "broken.jsonl"): "cannot be read",
        str(folder / "notes.txt"): "none of .jsonl, .json, .parquet, .csv",
        str(folder / "empty"): "holds no data set",
        "nobody/nothing": "'nobody/nothing' cannot be loaded",
    }.items():
        with pytest.raises((ValueError, OSError), match=words) as caught:
            load_splits(name)
        assert "\n" not in str(caught.value)


def test_columns_get_the_names_that_rewards_look_for():
    data = Dataset.from_list([{"question": "1+1=", "solution": "2", "answer": "two"}])
    shaped = shape_prompts(data, "question", "solution")
    assert shaped[0] == {"prompt": "1+1=", "answer": "2"}
    boxed = shape_prompts(data, "question", "solution", "boxed")[0]["prompt"]
    assert (
        boxed[0]["role"] == "user" and boxed[0]["content"].startswith("1+1=\n") and "\\boxed{}" in boxed[0]["content"]
    )


def test_braces_in_a_problem_are_left_alone():
    problem = r"Find \frac{1}{2} of {x}"
    assert (
        problem in shape_prompts(Dataset.from_list([{"prompt": problem}]), template="boxed")[0]["prompt"][0]["content"]
    )


def test_columns_that_are_missing_are_named():
    data = Dataset.from_list([{"question": "1+1=", "answer": "2"}])
    with pytest.raises(ValueError, match=r"no column 'prompt'; it has question, answer.*--prompt_column"):
        shape_prompts(data)
    with pytest.raises(ValueError, match=r"no column 'gold'.*--answer_column"):
        shape_prompts(data, "question", "gold")
    with pytest.raises(ValueError, match="prompt_template='box'"):
        shape_prompts(data, "question", None, "box")
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1="}]}])
    with pytest.raises(ValueError, match="these are conversations"):
        shape_prompts(chats, template="boxed")


def test_evaluation_takes_the_test_split_or_rows_that_are_not_trained_on():
    rows = Dataset.from_list(ROWS)
    train, test = hold_out(DatasetDict({"train": rows, "test": rows.select(range(4))}), "train", "test", 3, 0, "x")
    assert len(train) == 10 and len(test) == 3
    train, test = hold_out(DatasetDict({"train": rows}), "train", "test", 3, 0, "x")
    assert len(train) == 7 and len(test) == 3 and not set(train["prompt"]) & set(test["prompt"])
    again = hold_out(DatasetDict({"train": rows}), "train", "test", 3, 0, "x")[1]
    assert again["prompt"] == test["prompt"]
    assert hold_out(DatasetDict({"train": rows}), "train", "test", 0, 0, "x")[1] is None
    assert len(hold_out(DatasetDict({"train": rows}), "train", "test", None, 0, "x")[1]) == 1  # a tenth
    assert len(hold_out(DatasetDict({"train": rows, "test": rows}), "train", "test", None, 0, "x")[1]) == 10
    assert [len(whole_batches(rows, size)) for size in (3, 5, 10, 64)] == [9, 10, 10, 10]
    with pytest.raises(ValueError, match="eval_prompts=10"):
        hold_out(DatasetDict({"train": rows}), "train", "test", 10, 0, "x")


def test_splits_that_are_not_there_or_empty():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "none": Dataset.from_list([])})
    with pytest.raises(ValueError, match=r"no split 'test'. Choose one of 'train', 'none'"):
        pick_split(splits, "test", "x")
    with pytest.raises(ValueError, match="empty"):
        pick_split(splits, "none", "x")
