"""Data sets from files, folders and the playground."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict

from opefo_trl.data import load_splits, pick_split

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


def test_folders_and_the_playground(folder):
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(folder / "saved")
    Dataset.from_list(ROWS).save_to_disk(folder / "one")
    (folder / "files").mkdir()
    for split in ("train", "test"):
        (folder / "files" / f"{split}.jsonl").write_text((folder / "rows.jsonl").read_text())
    assert {name: len(rows) for name, rows in load_splits(str(folder / "saved")).items()} == {"train": 10, "test": 2}
    assert list(load_splits(str(folder / "one"))) == ["train"]
    assert set(load_splits(str(folder / "files"))) == set(load_splits("playground")) == {"train", "test"}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nowhere.jsonl", FileNotFoundError),
        ("./nowhere", FileNotFoundError),
        ("{}/broken.jsonl", ValueError),
        ("{}/empty.jsonl", ValueError),
        ("{}/notes.txt", ValueError),
        ("{}/empty", ValueError),
        ("nobody/nothing", ValueError),
    ],
)
def test_data_that_cannot_be_read_are_named_in_one_line(tmp_path, name, error):
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    name = name.format(tmp_path)
    with pytest.raises(error, match=re.escape(repr(name))) as caught:
        load_splits(name)
    assert "\n" not in str(caught.value)
    if name.endswith(".txt"):
        assert ".jsonl, .json, .parquet, .csv" in str(caught.value)


def test_splits_that_are_missing_or_empty():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "none": Dataset.from_list([])})
    assert len(pick_split(splits, "train", "x")) == 10
    with pytest.raises(ValueError, match="`split='test'`.*'train', 'none'"):
        pick_split(splits, "test", "x")
    with pytest.raises(ValueError, match="'none'.*empty"):
        pick_split(splits, "none", "x")
