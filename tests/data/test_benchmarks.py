"""Six benchmarks and GSM8K, whatever their source calls the columns and however it writes the answers."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from opefo_trl.data.benchmarks import BENCHMARKS, SIX, benchmark_name, load_benchmark, sources

EVAL = Path(os.environ.get("OPEFO_SHARED", Path(__file__).parents[3] / "shared")) / "eval"
real = pytest.mark.skipif(not EVAL.is_dir(), reason=f"there is no {EVAL} with copies of the benchmarks")
COPIES_ON_HUB = {
    "math-ai__aime24": "aime24",
    "HuggingFaceH4__aime_2024": "aime24",
    "math-ai__aime25": "aime25",
    "math-ai__amc23": "amc23",
    "HuggingFaceH4__MATH-500": "math500",
    "math-ai__minervamath": "minerva",
    "Hothan__OlympiadBench": "olympiadbench",
}


DAPO_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(name, **first):
    """As many rows as the benchmark has; fields of the first row may be given."""
    rows = [{"id": str(index), "problem": f"Problem {index}?", "answer": str(index)} for index in range(count(name))]
    rows[0].update(first)
    return rows


def count(name):
    return {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "gsm8k": 1319}.get(name, 675)


def first_answer(tmp_path, name, answer):
    """What becomes of the first answer of a benchmark; the others are of its kind, lists beside a list."""
    rows = rows_of(name, answer=answer)
    for row in rows[1:]:
        row["answer"] = [row["answer"]] if isinstance(answer, list) else row["answer"]
        row["answer"] = float(row["answer"]) if isinstance(answer, float) else row["answer"]
    return load_benchmark(name, write(tmp_path / "rows.jsonl", rows))["answer"][0]


def refusal(name, source):
    with pytest.raises(ValueError) as caught:
        load_benchmark(name, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_are_forgiven_their_case_and_dashes():
    for name, words in {
        "aime24": "AIME24 aime_2024 AIME-24",
        "math500": "MATH-500 Math500",
        "amc23": "AMC_2023",
    }.items():
        assert {benchmark_name(word) for word in words.split()} == {name}
    assert benchmark_name("Minerva Math") == "minerva" and benchmark_name("OlympiadBench") == "olympiadbench"


@pytest.mark.parametrize(
    ("name", "near"), [("aime23", "aime2"), ("minvera", "minerva"), ("olympiad", "olympiadbench")]
)
def test_a_name_that_is_unknown_is_answered_with_the_known_ones(name, near):
    words = refusal(name, None)
    assert f"Did you mean '{near}" in words and all(known in words for known in BENCHMARKS)


def test_names_of_larger_sets_are_not_taken_for_a_part_of_them():
    for name in ("math", "amc", "aime", ""):
        refusal(name, None)


def test_the_table_is_the_protocol():
    assert list(BENCHMARKS) == [*SIX, "gsm8k"] and len(SIX) == 6
    assert {name: benchmark.k for name, benchmark in BENCHMARKS.items() if benchmark.k != 1} == {
        "aime24": 32,
        "aime25": 32,
        "amc23": 32,
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_all_of_its_rows_or_is_refused(tmp_path, name):
    rows = rows_of(name)
    loaded = load_benchmark(name, write(tmp_path / "all.jsonl", rows))
    assert loaded.column_names == ["id", "problem", "answer"]
    assert {feature.dtype for feature in loaded.features.values()} == {"string"}
    assert loaded["problem"] == [row["problem"] for row in rows]
    for wrong in (rows[:-2], [*rows, {"id": "x", "problem": "One too many?", "answer": "1"}]):
        words = refusal(name, write(tmp_path / f"{len(wrong)}.jsonl", wrong))
        assert str(count(name)) in words and f"{len(wrong)} rows came from {tmp_path}" in words


def test_olympiadbench_may_lack_the_row_that_the_hub_lacks(tmp_path):
    assert len(load_benchmark("olympiadbench", write(tmp_path / "rows.jsonl", rows_of("olympiadbench")[1:]))) == 674


@pytest.mark.parametrize("problem", ["problem", "question", "Problem", "Question"])
@pytest.mark.parametrize("answer", ["answer", "Answer", "final_answer", "expected_answer"])
def test_columns_have_many_names(tmp_path, problem, answer):
    rows = [{problem: row["problem"], answer: row["answer"], "url": "x"} for row in rows_of("aime24")]
    loaded = load_benchmark("aime24", write(tmp_path / "rows.jsonl", rows))
    assert loaded[7] == {"id": "aime24-7", "problem": "Problem 7?", "answer": "7"}


def test_an_answer_goes_before_a_solution_and_a_solution_gives_its_last_box(tmp_path):
    rows = rows_of("minerva")
    for row in rows:
        row["solution"] = rf"First \boxed{{0}}, but then \boxed{{\frac{{{row['answer']}}}{{2}}}}."
    assert load_benchmark("minerva", write(tmp_path / "both.jsonl", rows))["answer"][5] == "5"
    for row in rows:
        del row["answer"]
    assert load_benchmark("minerva", write(tmp_path / "solution.jsonl", rows))["answer"][5] == r"\frac{5}{2}"
    rows[3]["solution"] = "So it is 3."
    words = refusal("minerva", write(tmp_path / "none.jsonl", rows))
    assert "Row 3 (id 3)" in words and r"without an answer in \boxed{}" in words


def test_a_missing_column_is_named_beside_those_there(tmp_path):
    rows = [{"id": row["id"], "text": row["problem"], "answer": row["answer"]} for row in rows_of("aime24")]
    words = refusal("aime24", write(tmp_path / "rows.jsonl", rows))
    assert "the columns id, text, answer" in words and "wanted in one of problem, question" in words
    rows = [{"id": row["id"], "problem": row["problem"], "gold": row["answer"]} for row in rows_of("aime24")]
    words = refusal("aime24", write(tmp_path / "golds.jsonl", rows))
    assert "the columns id, problem, gold" in words and "wanted in one of answer, final_answer" in words


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (27.0, "27"),
        (9.6, "9.6"),
        (-1, "-1"),
        (3159, "3159"),
        (["9.6\n"], "9.6"),
        (["2", "3"], "2, 3"),
        (r" \frac43 ", r"\frac43"),
        (r"$\boxed{\sqrt{2}}$", r"\sqrt{2}"),
        (r"69\%", r"69\%"),
        ("\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_answers_of_every_type(tmp_path, answer, text):
    assert first_answer(tmp_path, "amc23", answer) == text


@pytest.mark.parametrize("answer", [None, "", "  ", float("nan"), float("inf"), "nan", "None", [], [""], [None]])
@pytest.mark.parametrize("name", ["aime24", "amc23"])
def test_a_row_without_an_answer_is_named(tmp_path, name, answer):
    rows = rows_of(name)
    rows[4]["answer"] = answer
    if not isinstance(answer, str):
        for row in rows[:4] + rows[5:]:
            row["answer"] = [row["answer"]] if isinstance(answer, list) else float(row["answer"])
    words = refusal(name, write(tmp_path / "rows.jsonl", rows))
    assert re.match(rf"Row 4 \(id 4\) of {tmp_path}/rows.jsonl, counted from 0, has no answer", words)


def test_yes_is_no_answer(tmp_path):
    rows = [{**row, "answer": True} for row in rows_of("amc23")]
    assert "has no answer, but True" in refusal("amc23", write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("problem", [None, "", " \n"])
def test_a_row_without_a_problem_is_named(tmp_path, problem):
    rows = rows_of("amc23")
    rows[6]["problem"] = problem
    assert "Row 6 (id 6)" in refusal("amc23", write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("answer", "text"),
    [("025", "25"), ("000", "0"), (70.0, "70"), (r"336^\circ", "336"), (r"$336^{\circ}$", "336"), ("336°", "336")],
)
def test_aime_answers_are_plain_integers(tmp_path, answer, text):
    assert first_answer(tmp_path, "aime24", answer) == text


@pytest.mark.parametrize("answer", ["1000", "-1", "3.5", "1/2", "12 or 13", "x"])
def test_aime_answers_that_cannot_be(tmp_path, answer):
    words = refusal("aime25", write(tmp_path / "rows.jsonl", rows_of("aime25", answer=answer)))
    assert "Row 0 (id 0)" in words and f"{answer!r}, which is no integer from 0 to 999" in words


def test_aime_integers_may_be_numbers_beside_a_text(tmp_path):
    rows = [{**row, "answer": int(row["answer"])} for row in rows_of("aime25", answer="5")]
    rows[3]["answer"] = r"336^\circ"
    assert load_benchmark("aime25", write(tmp_path / "rows.jsonl", rows))["answer"][2:5] == ["2", "336", "4"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### -3", "-3"),
        ("18", "18"),
    ],
)
def test_gsm8k_answers_stand_behind_four_hashes(tmp_path, answer, text):
    assert first_answer(tmp_path, "gsm8k", answer) == text


def test_gsm8k_without_hashes_is_refused(tmp_path):
    words = refusal("gsm8k", write(tmp_path / "rows.jsonl", rows_of("gsm8k", answer="So she sold 72 clips.")))
    assert "Row 0 (id 0)" in words and "without a number behind '####'" in words


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("$69$,$84$", "69,84"),
        (["9.6\n"], "9.6"),
        ([r"$(-\infty, 0) \cup\{1\}$."], r"(-\infty, 0) \cup\{1\}"),
        (["$\\frac{41}{12}$"], r"\frac{41}{12}"),
        (r"\$5", r"\$5"),
        (["$1$", "$2$"], "1, 2"),
    ],
)
def test_olympiad_answers_lose_their_dollars_and_full_stop(tmp_path, answer, text):
    assert first_answer(tmp_path, "olympiadbench", answer) == text


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("Let $\frac{m}{n}$", r"Let $\frac{m}{n}$"),
        ("\frac{1}{2} of it", r"\frac{1}{2} of it"),
        ("of $\triangle DEF$ and $2\times 3$", r"of $\triangle DEF$ and $2\times 3$"),
        ("$\binom{4}{2}$", r"$\binom{4}{2}$"),
        ("$(1\right)$ on\ran", r"$(1\right)$ on" + "\ran"),
        ("have\tequal\tperimeters.\tThe area", "have\tequal\tperimeters.\tThe area"),  # math500, geometry/843
        ("{\n\treturn 2*sin(3*x + pi)\n}", "{\n\treturn 2*sin(3*x + pi)\n}"),  # math500, precalculus/1199
        (r"$\frac{a}{b}$ in $\mathbb{R}$", r"$\frac{a}{b}$ in $\mathbb{R}$"),
        ("two lines\r\nof text", "two lines\r\nof text"),
    ],
)
def test_broken_escapes_are_mended_and_nothing_else(tmp_path, broken, whole):
    path = write(tmp_path / "rows.jsonl", rows_of("math500", problem=broken))
    assert load_benchmark("math500", path)["problem"][0] == whole


def test_a_problem_may_not_stand_there_twice(tmp_path):
    rows = rows_of("aime24", problem="Problem 9?")
    words = refusal("aime24", write(tmp_path / "rows.jsonl", rows))
    assert "a problem 2 times" in words and "0 and 9" in words and "'Problem 9?'" in words


def amc_of_two_years(url="https://example.org/{}_AMC_12A_Problems/Problem_{}"):
    return [
        {
            "id": index,
            "problem": f"Problem {index}?",
            "answer": float(index),
            "url": url.format(2022 + index % 2, index),
        }
        for index in range(80)
    ] + [{"id": 80 + n, "problem": f"Old {n}?", "answer": 1.0, "url": url.format(2022, n)} for n in range(3)]


def test_of_83_amc_problems_only_those_of_2023_count(tmp_path):
    loaded = load_benchmark("amc23", write(tmp_path / "rows.jsonl", amc_of_two_years()))
    assert loaded["answer"] == [str(index) for index in range(1, 80, 2)]
    assert loaded["id"][:2] == ["amc23-1", "amc23-3"]


def test_83_amc_problems_of_unknown_years_are_refused(tmp_path):
    words = refusal("amc23", write(tmp_path / "same.jsonl", amc_of_two_years("https://example.org/{1}")))
    assert "AMC 2023 has 40 problems, but 0 rows came" in words and "0 of its 83 rows are from 2023" in words
    rows = [{key: value for key, value in row.items() if key != "url"} for row in amc_of_two_years()]
    assert "40 problems, but 83 rows came" in refusal("amc23", write(tmp_path / "none.jsonl", rows))
    rows = amc_of_two_years()
    rows[1]["url"] = None
    assert "39 of its 83 rows are from 2023" in refusal("amc23", write(tmp_path / "one.jsonl", rows))


def halves_of_aime25(folder):
    rows = [{"question": row["problem"], "answer": row["answer"]} for row in rows_of("aime25")]
    write(folder / "aime2025-I.jsonl", rows[:15])
    write(folder / "aime2025-II.jsonl", rows[15:])
    return [row["answer"] for row in rows]


def test_aime_2025_in_two_configs_is_one_benchmark(tmp_path):
    answers = halves_of_aime25(tmp_path / "plain" / "opencompass__AIME2025")
    assert load_benchmark("aime25", tmp_path / "plain")["answer"] == answers
    card = "".join(
        f"- config_name: AIME2025-{part}\n  data_files:\n  - split: test\n    path: aime2025-{part}.jsonl\n"
        for part in ("I", "II")
    )
    shutil.copytree(tmp_path / "plain", tmp_path / "card")
    (tmp_path / "card" / "opencompass__AIME2025" / "README.md").write_text(f"---\nconfigs:\n{card}---\n# AIME 2025\n")
    assert load_benchmark("aime25", tmp_path / "card")["answer"] == answers
    for part in ("I", "II"):
        place = tmp_path / "folders" / "opencompass" / "AIME2025" / f"AIME2025-{part}"
        place.mkdir(parents=True)
        shutil.copy(tmp_path / "plain" / "opencompass__AIME2025" / f"aime2025-{part}.jsonl", place / "test.jsonl")
    assert load_benchmark("aime25", tmp_path / "folders")["answer"] == answers
    half = tmp_path / "plain" / "opencompass__AIME2025" / "aime2025-I.jsonl"
    assert "30 problems, but 15 rows came" in refusal("aime25", half)


def dapo_row(index, problem, answer):
    return {
        "prompt": [{"role": "user", "content": f"{DAPO_HEAD}{problem}{DAPO_TAIL}"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


# Both ends are letters of the template: stripping its characters would eat them.
def dapo_rows():
    return [dapo_row(index, f"Solve {index} and then answer", str(index)) for index in range(30)] * 32


def test_32_copies_in_a_template_are_30_problems(tmp_path):
    loaded = load_benchmark("aime24", write(tmp_path / "rows.jsonl", dapo_rows()))
    assert loaded["problem"] == [f"Solve {index} and then answer" for index in range(30)]
    assert loaded["answer"] == [str(index) for index in range(30)]
    assert loaded["id"] == [f"aime24-{index}" for index in range(30)]


def test_copies_that_differ_are_refused(tmp_path):
    rows = dapo_rows()
    rows[31] = dapo_row(1, "Solve 1 and then answer", "7")
    words = refusal("aime24", write(tmp_path / "answer.jsonl", rows))
    assert "32 times" in words and "the answer 1 and 7" in words
    rows[31] = dapo_row(0, "Solve 0 and then answer", "0")
    assert "33 times that it should have 32 times" in refusal("aime24", write(tmp_path / "more.jsonl", rows))
    rows[31]["prompt"][0]["content"] = "Solve 1 and then answer"
    words = refusal("aime24", write(tmp_path / "bare.jsonl", rows))
    assert "Row 31 (id 0)" in words and "not in DAPO's template" in words
    rows[31]["prompt"] = None
    assert "Row 31 (id 0)" in refusal("aime24", write(tmp_path / "empty.jsonl", rows))
    rows[31] = dapo_row(1, "Solve 1 and then answer", None)
    assert "Row 31 (id 1)" in refusal("aime24", write(tmp_path / "none.jsonl", rows))
    assert "but 959 rows came" in refusal("aime24", write(tmp_path / "fewer.jsonl", rows[1:]))


def test_ids_are_the_sources_own_where_they_tell_rows_apart(tmp_path):
    def ids(rows):
        return load_benchmark("aime24", write(tmp_path / "rows.jsonl", rows))["id"][:3]

    rows = rows_of("aime24")
    assert ids([{**row, "id": 60 + index} for index, row in enumerate(rows)]) == [
        "aime24-60",
        "aime24-61",
        "aime24-62",
    ]
    assert ids([{**row, "id": f"aime24-{index + 5}"} for index, row in enumerate(rows)])[0] == "aime24-5"
    assert ids([{**row, "id": 60.0 + index} for index, row in enumerate(rows)])[1] == "aime24-61"
    assert ids([{**row, "id": "same"} for row in rows]) == ["aime24-0", "aime24-1", "aime24-2"]
    assert ids([{**row, "id": row["id"] if index else None} for index, row in enumerate(rows)])[0] == "aime24-0"
    assert ids([{"unique_id": f"test/{row['id']}.json", **row, "id": None} for row in rows])[0] == "aime24-test/0.json"
    bare = [{"Problem": row["problem"], "Answer": int(row["answer"]), "ID": f"2024-I-{row['id']}"} for row in rows]
    assert ids(bare)[2] == "aime24-2024-I-2"


@pytest.mark.parametrize(
    "place",
    [
        "aime24.jsonl",
        "math-ai__aime24/test.jsonl",
        "HuggingFaceH4/aime_2024/train.jsonl",
        "BytedTsinghua-SIA__AIME-2024/data/train.jsonl",
    ],
)
def test_a_folder_of_benchmarks(tmp_path, place):
    write(tmp_path / place, rows_of("aime24"))
    write(tmp_path / "aime25.jsonl", rows_of("aime25", problem="Another?"))
    loaded = load_benchmark("AIME24", tmp_path)
    assert loaded["problem"][0] == "Problem 0?" and str(tmp_path / Path(place).parts[0]) in loaded.info.description


def test_a_normalised_file_goes_before_copies_and_copies_go_in_order(tmp_path):
    for place in ("HuggingFaceH4__aime_2024/train.jsonl", "math-ai__aime24/test.jsonl", "aime24.jsonl"):
        write(tmp_path / place, rows_of("aime24", problem=place))
        assert load_benchmark("aime24", str(tmp_path))["problem"][0] == place


def test_a_copy_by_itself_under_any_name(tmp_path):
    rows = rows_of("gsm8k")
    write(tmp_path / "3f1c" / "main" / "test.jsonl", rows)
    write(tmp_path / "3f1c" / "main" / "train.jsonl", rows[:7])
    write(tmp_path / "3f1c" / "socratic" / "test.jsonl", rows[:9])
    assert len(load_benchmark("gsm8k", tmp_path / "3f1c")) == 1319
    splits = {"train": Dataset.from_list(rows[:7]), "test": Dataset.from_list(rows)}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(load_benchmark("gsm8k", tmp_path / "saved")) == 1319
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert len(load_benchmark("gsm8k", tmp_path / "rows.parquet")) == 1319


def test_splits_that_leave_a_choice_are_named(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "mine" / f"{split}.jsonl", rows_of("aime24"))
    assert "the splits train, validation, and none is 'test'" in refusal("aime24", tmp_path / "mine")


def test_a_folder_without_the_benchmark_says_what_was_looked_for(tmp_path):
    write(tmp_path / "aime24.jsonl", rows_of("aime24"))
    (tmp_path / "MANIFEST.json").write_text("{}")
    words = refusal("aime25", tmp_path)
    assert "holds nothing for aime25" in words
    assert all(looked in words for looked in ("aime25.jsonl", "math-ai__aime25", "opencompass__AIME2025"))
    (tmp_path / "openai__gsm8k").mkdir()
    (tmp_path / "openai__gsm8k" / "README.md").write_text("config_name: main\n")
    assert "openai__gsm8k" in refusal("gsm8k", tmp_path)


@pytest.mark.parametrize("place", ["math-ai__aime25/test.jsonl", "math-ai/aime25/test.jsonl", "aime25.jsonl"])
def test_another_benchmark_of_as_many_rows_is_refused(tmp_path, place):
    path = write(tmp_path / place, rows_of("aime25"))
    assert "is AIME 2025 by its name, and aime24 was asked for" in refusal("aime24", path)
    if path.parent != tmp_path:
        assert "is AIME 2025 by its name" in refusal("aime24", path.parent)
        assert len(load_benchmark("aime25", path.parent)) == 30
    assert "is AIME 2025 by its name" in refusal("aime24", "math-ai/aime25")


def test_a_source_that_is_not_there(tmp_path):
    for source in (tmp_path / "nowhere", "./nowhere", "nowhere", "data/rows.jsonl", "~/nowhere/at/all"):
        assert "There is no file or folder" in refusal("aime24", source)


def test_the_hub_without_a_net_is_one_error(monkeypatch):
    words = refusal("aime24", None)
    assert "No source of aime24" in words and "math-ai/aime24" in words and "HuggingFaceH4/aime_2024" in words
    assert "'nobody/nothing' cannot be loaded" in refusal("aime24", "nobody/nothing")


@pytest.fixture
def hub(monkeypatch):
    """Data sets that can be loaded by name and config; all others are out of reach."""
    there = {}

    def load(name, config=None):
        if (name, config) not in there:
            raise ValueError(f"The data set {name!r} cannot be loaded: out of reach.")
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in there[name, config].items()})

    monkeypatch.setattr(sources, "load_splits", load)
    return there


def test_the_first_source_is_taken_without_a_word(hub, recwarn):
    hub["openai/gsm8k", "main"] = {"train": rows_of("gsm8k")[:9], "test": rows_of("gsm8k")}
    loaded = load_benchmark("gsm8k")
    assert len(loaded) == 1319 and loaded.info.description == "GSM8K from openai/gsm8k on the Hub"
    assert not recwarn.list


def test_another_source_is_taken_with_a_warning(hub):
    hub["opencompass/AIME2025", "AIME2025-I"] = {"test": rows_of("aime25")[:15]}
    hub["opencompass/AIME2025", "AIME2025-II"] = {"test": rows_of("aime25")[15:]}
    with pytest.warns(
        UserWarning, match="aime25 is taken from opencompass/AIME2025.*'math-ai/aime25' cannot be loaded"
    ):
        assert len(load_benchmark("aime25")) == 30
    assert len(load_benchmark("aime25", "opencompass/AIME2025")) == 30
    halves = [{"question": row["problem"], "answer": row["answer"]} for row in rows_of("aime25")]
    hub["opencompass/AIME2025", "AIME2025-II"] = {"test": halves[15:]}
    assert "wanted in one of problem" in refusal("aime25", "opencompass/AIME2025")


def test_what_is_wrong_in_the_first_source_is_not_hidden_by_the_second(hub):
    hub["math-ai/aime24", None] = {"test": rows_of("aime24")[1:]}
    hub["HuggingFaceH4/aime_2024", None] = {"train": rows_of("aime24")}
    assert "29 rows came from math-ai/aime24 on the Hub" in refusal("aime24", None)
    assert len(load_benchmark("aime24", "HuggingFaceH4/aime_2024")) == 30


def test_a_name_on_the_hub_that_is_not_in_the_table(hub):
    hub["somebody/contest", None] = {"train": rows_of("aime24")}
    assert load_benchmark("aime24", "somebody/contest")["answer"][7] == "7"


@real
@pytest.mark.parametrize(("folder", "name"), COPIES_ON_HUB.items())
def test_a_copy_of_a_hub_data_set_has_the_answers_of_the_normalised_file(folder, name):
    loaded = load_benchmark(name, EVAL / "hf_like" / folder)
    expected = read(EVAL / "bench" / f"{name}.jsonl")
    assert loaded["answer"] == [row["answer"] for row in expected]
    assert loaded["id"] == load_benchmark(name, EVAL / "bench")["id"]
    assert len(set(loaded["id"])) == len(loaded) == count(name)
    if name != "aime25":  # typed by other hands
        assert loaded["problem"] == [row["problem"].strip() for row in expected]


@real
@pytest.mark.parametrize("name", SIX)
def test_both_folders_give_the_same_answers_in_the_same_order(name):
    normalised, copies = load_benchmark(name, EVAL / "bench"), load_benchmark(name, EVAL / "hf_like")
    assert normalised["answer"] == copies["answer"] == load_benchmark(name, EVAL / "hf_like")["answer"]


@real
def test_the_aime_of_dapo_is_the_same_30_problems():
    loaded = load_benchmark("aime24", EVAL / "hf_like" / "BytedTsinghua-SIA__AIME-2024")
    expected = {row["problem"].strip(): row["answer"] for row in read(EVAL / "bench" / "aime24.jsonl")}
    same = [row for row in loaded if row["problem"] in expected]
    assert len(loaded) == 30 and len(same) == 29  # one text is typed by other hands
    assert all(expected[row["problem"]] == row["answer"] for row in same)
    assert sorted(loaded["answer"]) == sorted(expected.values())


@real
def test_broken_escapes_of_the_real_aime25_are_mended():
    problems = load_benchmark("aime25", EVAL / "hf_like")["problem"]
    assert not re.search(r"[\f\t\r\x08]", "".join(problems))
    assert r"\[\prod^{63}_{k=4} \frac{\log_k" in problems[18] and r"circumcircle of $\triangle DEF$" in problems[19]
    assert r"expressed as $\frac{m}{n}$" in problems[27]


@real
def test_the_amc_of_two_years_as_ai_mo_has_it(tmp_path):
    old = Dataset.from_parquet(str(EVAL / "hf_like/open-r1__DAPO-Math-17k-Processed_SHAPE-FIXTURE/en/train.parquet"))
    rows = [
        {"question": row["prompt"], "answer": float(row["solution"]), "url": "2022_AMC_12A_Problems"} for row in old
    ] + [
        {key: row[key] for key in ("question", "answer", "url")}
        for row in read(EVAL / "hf_like/math-ai__amc23/test.jsonl")
    ]
    loaded = load_benchmark("amc23", write(tmp_path / "AI-MO__aimo-validation-amc" / "train.jsonl", rows).parent)
    assert len(rows) == 83
    assert loaded["answer"] == [row["answer"] for row in read(EVAL / "bench" / "amc23.jsonl")]


@real
@pytest.mark.parametrize(("folder", "name"), COPIES_ON_HUB.items())
def test_a_broken_copy_is_refused(tmp_path, folder, name):
    (file,) = (EVAL / "hf_like" / folder).rglob("*.jsonl")
    rows = read(file)
    text = "problem" if "problem" in rows[0] else "question"
    gold = next(column for column in ("answer", "final_answer", "solution") if column in rows[0])
    place = tmp_path / folder / file.relative_to(EVAL / "hf_like" / folder)

    write(place, [{"statement" if key == text else key: row[key] for key in row} for row in rows])
    assert "wanted in one of problem, question" in refusal(name, tmp_path)
    write(place, rows[:9] + rows[11:])
    assert f"{len(rows) - 2} rows came from {tmp_path}" in refusal(name, tmp_path)
    write(place, [*rows[:9], {**rows[9], gold: float("nan")}, *rows[10:]])
    words = refusal(name, tmp_path)
    assert words.startswith("Row 9") and "no answer" in words
    write(place, [*rows[:9], rows[8], *rows[10:]])
    assert "a problem 2 times" in refusal(name, tmp_path)
