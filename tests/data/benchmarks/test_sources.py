"""Benchmarks from folders, files and the Hub, and real copies of them."""

import re
import shutil
from pathlib import Path

import pytest
from benchmark_rows import COUNTS, refusal, rows_of, write
from datasets import Dataset, DatasetDict
from material import BENCH, HUB_COPIES, read_lines

from opefo_trl.data.benchmarks import load_benchmark, sources

COPIES = {
    "math-ai__aime24": "aime24",
    "HuggingFaceH4__aime_2024": "aime24",
    "math-ai__aime25": "aime25",
    "math-ai__amc23": "amc23",
    "HuggingFaceH4__MATH-500": "math500",
    "math-ai__minervamath": "minerva",
    "Hothan__OlympiadBench": "olympiadbench",
}


def test_a_file_becomes_three_text_columns(tmp_path):
    rows = [{**row, "answer": int(row["answer"])} for row in rows_of("aime25", answer="5")]
    rows[3]["answer"] = r"336^\circ"  # beside integers
    loaded = load_benchmark("aime25", write(tmp_path / "rows.jsonl", rows))
    assert {name: feature.dtype for name, feature in loaded.features.items()} == dict.fromkeys(
        ("id", "problem", "answer"), "string"
    )
    assert loaded["answer"][2:5] == ["2", "336", "4"]


def test_in_a_folder_a_normalised_file_goes_before_copies_and_copies_go_in_order(tmp_path):
    write(tmp_path / "aime25.jsonl", rows_of("aime25", problem="Another?"))
    last = "BytedTsinghua-SIA__AIME-2024/data/train.jsonl"
    for place in (last, "HuggingFaceH4/aime_2024/train.jsonl", "math-ai__aime24/test.jsonl", "aime24.jsonl"):
        write(tmp_path / place, rows_of("aime24", problem=place))
        loaded = load_benchmark("AIME24", str(tmp_path))
        assert loaded["problem"][0] == place and str(tmp_path / Path(place).parts[0]) in loaded.info.description


def test_a_copy_of_a_data_set_in_a_folder_of_any_name(tmp_path):
    rows = rows_of("gsm8k")
    write(tmp_path / "3f1c" / "main" / "test.jsonl", rows)
    write(tmp_path / "3f1c" / "main" / "train.jsonl", rows[:7])
    write(tmp_path / "3f1c" / "socratic" / "test.jsonl", rows[:9])
    DatasetDict({"train": Dataset.from_list(rows[:7]), "test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "s")
    for folder in ("3f1c", "s"):
        assert len(load_benchmark("gsm8k", tmp_path / folder)) == 1319


def test_aime_2025_in_two_configurations_is_one_benchmark(tmp_path):
    rows = [{"question": row["problem"], "answer": row["answer"]} for row in rows_of("aime25")]
    copy = tmp_path / "plain" / "opencompass__AIME2025"
    files = {part: write(copy / f"aime2025-{part}.jsonl", rows[start : start + 15]) for part, start in HALVES.items()}
    card = "".join(
        f"- config_name: AIME2025-{part}\n  data_files:\n  - split: test\n    path: {file.name}\n"
        for part, file in files.items()
    )
    shutil.copytree(tmp_path / "plain", tmp_path / "card")
    (tmp_path / "card" / copy.name / "README.md").write_text(f"---\nconfigs:\n{card}---\n# AIME 2025\n")
    for part, file in files.items():
        target = tmp_path / "folders" / "opencompass" / "AIME2025" / f"AIME2025-{part}" / "test.jsonl"
        target.parent.mkdir(parents=True)
        shutil.copy(file, target)
    for folder in ("plain", "card", "folders"):
        assert load_benchmark("aime25", tmp_path / folder)["answer"] == [row["answer"] for row in rows]
    assert "30 problems, but 15 rows" in refusal("aime25", files["I"])


HALVES = {"I": 0, "II": 15}


# ---- what is refused


def test_splits_that_leave_a_choice_are_named(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "mine" / f"{split}.jsonl", rows_of("aime24"))
    message = refusal("aime24", tmp_path / "mine")
    assert "train, validation" in message and "'test'" in message


def test_a_folder_without_the_benchmark_says_what_was_looked_for(tmp_path):
    write(tmp_path / "aime24.jsonl", rows_of("aime24"))
    (tmp_path / "MANIFEST.json").write_text("{}")
    message = refusal("aime25", tmp_path)
    assert all(name in message for name in ("aime25.jsonl", "math-ai__aime25", "opencompass__AIME2025"))
    (tmp_path / "openai__gsm8k").mkdir()
    (tmp_path / "openai__gsm8k" / "README.md").write_text("config_name: main\n")
    assert "openai__gsm8k" in refusal("gsm8k", tmp_path)


@pytest.mark.parametrize("place", ["math-ai__aime25/test.jsonl", "math-ai/aime25/test.jsonl", "aime25.jsonl"])
def test_another_benchmark_of_as_many_rows_is_refused(tmp_path, place):
    path = write(tmp_path / place, rows_of("aime25"))
    folders = [path.parent] if path.parent != tmp_path else []
    for source in (path, *folders, "math-ai/aime25"):
        assert re.search("AIME 2025.*aime24", refusal("aime24", source))
    for folder in folders:
        assert len(load_benchmark("aime25", folder)) == 30


# ---- the Hub


def test_a_source_that_is_out_of_reach_is_named(tmp_path):
    for source in (tmp_path / "nowhere", "./nowhere", "nowhere", "data/rows.jsonl", "~/nowhere/at/all"):
        assert repr(str(source)) in refusal("aime24", source)
    message = refusal("aime24", None)
    assert "math-ai/aime24" in message and "HuggingFaceH4/aime_2024" in message
    assert "'nobody/nothing'" in refusal("aime24", "nobody/nothing")


@pytest.fixture
def hub(monkeypatch):
    """Data sets that can be loaded, by name and configuration; all others are out of reach."""
    reachable = {}

    def load(name, config=None):
        if (name, config) not in reachable:
            raise ValueError(f"The data set {name!r} cannot be loaded: out of reach.")
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in reachable[name, config].items()})

    monkeypatch.setattr(sources, "load_splits", load)
    return reachable


def test_the_first_source_is_taken_without_a_word(hub, recwarn):
    hub["openai/gsm8k", "main"] = {"train": rows_of("gsm8k")[:9], "test": rows_of("gsm8k")}
    loaded = load_benchmark("gsm8k")
    assert len(loaded) == 1319 and loaded.info.description == "GSM8K from openai/gsm8k on the Hub"
    hub["somebody/contest", None] = {"train": rows_of("aime24")}  # a name that is not in the table
    assert load_benchmark("aime24", "somebody/contest")["answer"][7] == "7"
    assert not recwarn.list


def test_another_source_is_taken_with_a_warning(hub):
    for part, start in HALVES.items():
        hub["opencompass/AIME2025", f"AIME2025-{part}"] = {"test": rows_of("aime25")[start : start + 15]}
    with pytest.warns(UserWarning, match="aime25.*opencompass/AIME2025.*'math-ai/aime25'"):
        assert len(load_benchmark("aime25")) == 30
    assert len(load_benchmark("aime25", "opencompass/AIME2025")) == 30
    other_columns = [{"question": row["problem"], "answer": row["answer"]} for row in rows_of("aime25")]
    hub["opencompass/AIME2025", "AIME2025-II"] = {"test": other_columns[15:]}
    assert "one of problem" in refusal("aime25", "opencompass/AIME2025")


def test_a_fault_of_the_first_source_is_not_hidden_by_the_second(hub):
    hub["math-ai/aime24", None] = {"test": rows_of("aime24")[1:]}
    hub["HuggingFaceH4/aime_2024", None] = {"train": rows_of("aime24")}
    assert "29 rows came from math-ai/aime24 on the Hub" in refusal("aime24", None)
    assert len(load_benchmark("aime24", "HuggingFaceH4/aime_2024")) == 30
    hub["somebody/contest", None] = {"train": rows_of("aime24")}  # a name that is not in the table
    assert load_benchmark("aime24", "somebody/contest")["answer"][7] == "7"


# ---- real copies


@pytest.mark.parametrize(("folder", "name"), COPIES.items())
def test_a_hub_copy_is_the_normalised_file(folder, name):
    loaded = load_benchmark(name, HUB_COPIES / folder)
    expected = read_lines(f"bench/{name}.jsonl")
    assert loaded["answer"] == [row["answer"] for row in expected]
    assert loaded["id"] == load_benchmark(name, BENCH)["id"]
    assert len(set(loaded["id"])) == len(loaded) == COUNTS[name]
    if name != "aime25":  # typed by other hands
        assert loaded["problem"] == [row["problem"].strip() for row in expected]


def test_the_aime_of_dapo_is_the_same_30_problems():
    loaded = load_benchmark("aime24", HUB_COPIES / "BytedTsinghua-SIA__AIME-2024")
    expected = {row["problem"].strip(): row["answer"] for row in read_lines("bench/aime24.jsonl")}
    same = [row for row in loaded if row["problem"] in expected]
    assert len(loaded) == 30 and len(same) == 29  # one text is typed by other hands
    assert all(expected[row["problem"]] == row["answer"] for row in same)
    assert sorted(loaded["answer"]) == sorted(expected.values())
