"""Data sets from files, folders and the playground."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict, enable_caching

from opefo_trl.data import load_splits, pick_split

ROWS = [{"prompt": f"{index}+1=", "answer": str(index + 1)} for index in range(10)]


def test_files_folders_and_the_playground(tmp_path):
    data, folder = Dataset.from_list(ROWS), tmp_path
    data.to_json(folder / "rows.jsonl"), data.to_parquet(folder / "rows.parquet"), data.to_csv(folder / "rows.csv")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows[v2]*.json").write_text(json.dumps(ROWS))  # a name and no pattern
    for name in ("rows.jsonl", "rows.parquet", "rows.csv", "rows.json", "rows[v2]*.json"):
        splits = load_splits(str(folder / name))
        assert list(splits) == ["train"] and splits["train"]["prompt"] == data["prompt"]
    DatasetDict({"train": data, "test": data.select([0, 1])}).save_to_disk(folder / "saved")
    data.save_to_disk(folder / "one")
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


def test_a_configuration_that_is_not_there_is_named_with_its_option(tmp_path):
    Dataset.from_list(ROWS).to_json(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="'main' not found.*'default'.*`dataset_config`, which a recipe may set"):
        load_splits(str(tmp_path), "main")


def test_saved_data_in_a_folder_that_cannot_be_written_to_are_mapped(tmp_path, monkeypatch):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    try:
        rows = load_splits(str(tmp_path / "saved"))["train"]
        assert len(rows.map(lambda row: {"n": 1}).shuffle(seed=0).train_test_split(2)["test"]) == 2
        assert sorted((tmp_path / "saved").iterdir()) == before
    finally:
        enable_caching()


def test_splits_that_are_missing_or_empty():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "none": Dataset.from_list([])})
    assert len(pick_split(splits, "train", "x")) == 10
    with pytest.raises(ValueError, match="`split='test'`.*'train', 'none'"):
        pick_split(splits, "test", "x")
    with pytest.raises(ValueError, match="'none'.*empty"):
        pick_split(splits, "none", "x")
