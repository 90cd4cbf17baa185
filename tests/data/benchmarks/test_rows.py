"""Rows of any source become `id`, `problem` and `answer`, or an error that names the row."""

import re

import benchmark_rows
import pytest
from benchmark_rows import COUNTS, rows_of
from material import read_lines

from opefo_trl.data.benchmarks import BENCHMARKS
from opefo_trl.data.benchmarks.rows import normalise
from opefo_trl.data.templates import DAPO_PREFIX, DAPO_SUFFIX


def normalised(name, rows):
    return normalise(rows, name, BENCHMARKS[name], "here")


def refusal(name, rows):
    return benchmark_rows.refusal(name, rows, normalised)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_all_of_its_rows_or_is_refused(name):
    rows = rows_of(name)
    assert [row["problem"] for row in normalised(name, rows)] == [row["problem"] for row in rows]
    for wrong in (rows[:-2], [*rows, {"id": "x", "problem": "One too many?", "answer": "1"}]):
        message = refusal(name, wrong)
        assert str(COUNTS[name]) in message and f"{len(wrong)} rows came from here" in message
    if name == "olympiadbench":
        assert len(normalised(name, rows[1:])) == 674  # the copy on the Hub lacks a row


# ---- columns


@pytest.mark.parametrize("problem", ["problem", "question", "Problem", "Question"])
@pytest.mark.parametrize("answer", ["answer", "Answer", "final_answer", "expected_answer"])
def test_columns_have_many_names(problem, answer):
    rows = [{problem: row["problem"], answer: row["answer"], "url": "x"} for row in rows_of("aime24")]
    assert normalised("aime24", rows)[7] == {"id": "aime24-7", "problem": "Problem 7?", "answer": "7"}


def test_an_answer_is_preferred_to_a_solution_whose_last_box_is_the_answer():
    rows = rows_of("minerva")
    for row in rows:
        row["solution"] = rf"First \boxed{{0}}, but then \boxed{{\frac{{{row['answer']}}}{{2}}}}."
    assert normalised("minerva", rows)[5]["answer"] == "5"
    for row in rows:
        del row["answer"]
    assert normalised("minerva", rows)[5]["answer"] == r"\frac{5}{2}"
    rows[3]["solution"] = "So it is 3."
    message = refusal("minerva", rows)
    assert "Row 3 (id 3)" in message and r"\boxed{}" in message


@pytest.mark.parametrize(
    ("renamed", "wanted"), [("problem", "problem, question"), ("answer", "answer, .*final_answer, solution")]
)
def test_a_missing_column_is_named_beside_those_that_are_there(renamed, wanted):
    rows = [{"other" if name == renamed else name: row[name] for name in row} for row in rows_of("aime24")]
    message = refusal("aime24", rows)
    assert all(column in message for column in rows[0]) and re.search(f"in one of {wanted}", message)


# ---- answers and problems


@pytest.mark.parametrize("case", read_lines("benchmark_answers.jsonl"), ids=str)
def test_answers_of_every_type_have_one_form(case):
    rows = rows_of(case["benchmark"], answer=case["answer"])
    assert normalised(case["benchmark"], rows)[0]["answer"] == case["text"]


@pytest.mark.parametrize(
    ("name", "first", "words"),
    [
        *(
            (name, {"answer": answer}, ["Row 0 (id 0) of here, counted from 0, has no answer"])
            for name in ("aime24", "amc23")
            for answer in (None, "", "  ", float("nan"), float("inf"), "nan", "None", [], [""], [None], True)
        ),
        *(
            ("aime25", {"answer": answer}, ["Row 0 (id 0)", repr(answer), "0 to 999"])
            for answer in ("1000", "-1", "3.5", "1/2", "12 or 13", "x")
        ),
        ("gsm8k", {"answer": "So she sold 72 clips."}, ["Row 0 (id 0)", "'####'"]),
        *(("amc23", {"problem": problem}, ["Row 0 (id 0)"]) for problem in (None, "", " \n")),
        ("aime24", {"problem": "Problem 9?"}, ["2 times", "0 and 9", "'Problem 9?'"]),
    ],
)
def test_a_row_that_is_wrong_or_repeated_is_named(name, first, words):
    message = refusal(name, rows_of(name, **first))
    assert [word for word in words if word not in message] == []


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
def test_broken_escapes_are_mended_and_nothing_else(broken, whole):
    assert normalised("math500", rows_of("math500", problem=broken))[0]["problem"] == whole


# ---- sources with more than the benchmark


def amc_of_two_years(url="https://example.org/{}_AMC_12A_Problems/Problem_{}"):
    rows = [
        {"id": n, "problem": f"Problem {n}?", "answer": float(n), "url": url.format(2022 + n % 2, n)}
        for n in range(80)
    ]
    return rows + [{"id": 80 + n, "problem": f"Old {n}?", "answer": 1.0, "url": url.format(2022, n)} for n in range(3)]


def test_of_83_amc_problems_those_of_2023_are_taken_or_none_if_years_are_unknown():
    rows = normalised("amc23", amc_of_two_years())
    assert [row["answer"] for row in rows] == [str(n) for n in range(1, 80, 2)]
    assert [row["id"] for row in rows[:2]] == ["amc23-1", "amc23-3"]
    message = refusal("amc23", amc_of_two_years("https://example.org/{1}"))
    assert "40 problems, but 0 rows" in message and "0 of its 83 rows are from 2023" in message
    without_url = [{name: row[name] for name in ("id", "problem", "answer")} for row in amc_of_two_years()]
    assert "40 problems, but 83 rows" in refusal("amc23", without_url)
    rows = amc_of_two_years()
    rows[1]["url"] = None
    assert "39 of its 83 rows are from 2023" in refusal("amc23", rows)


def dapo_row(index, problem, answer):
    return {
        "prompt": [{"role": "user", "content": f"{DAPO_PREFIX}{problem}{DAPO_SUFFIX}"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


# Both ends of these problems are letters of the template: stripping its characters would eat them
def dapo_rows():
    return [dapo_row(index, f"Solve {index} and then answer", str(index)) for index in range(30)] * 32


def test_32_copies_in_a_template_are_30_problems():
    assert normalised("aime24", dapo_rows()) == [
        {"id": f"aime24-{n}", "problem": f"Solve {n} and then answer", "answer": str(n)} for n in range(30)
    ]


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        (dapo_row(1, "Solve 1 and then answer", "7"), ["32 times", "the answer 1 and 7"]),
        (dapo_row(0, "Solve 0 and then answer", "0"), ["33 times instead of 32"]),
        (dapo_row(1, "Solve 1 and then answer", None), ["Row 31 (id 1)"]),
        (
            {**dapo_row(0, "", "0"), "prompt": [{"role": "user", "content": "Solve 1"}]},
            ["Row 31 (id 0)", "DAPO's template"],
        ),
        ({**dapo_row(0, "", "0"), "prompt": None}, ["Row 31 (id 0)"]),
    ],
)
def test_copies_that_differ_are_refused(changed, messages):
    rows = dapo_rows()
    rows[31] = changed
    message = refusal("aime24", rows)
    assert all(part in message for part in messages)
    assert "but 959 rows" in refusal("aime24", rows[1:])


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        (lambda n: {"id": 60 + n}, ["60", "61"]),
        (lambda n: {"id": f"aime24-{n + 5}"}, ["5", "6"]),
        (lambda n: {"id": 60.0 + n}, ["60", "61"]),
        (lambda n: {"id": "same"}, ["0", "1"]),
        (lambda n: {"id": str(n + 3) if n else None}, ["0", "1"]),
        (lambda n: {"id": None, "unique_id": f"test/{n}.json"}, ["test/0.json", "test/1.json"]),
        (lambda n: {"id": None, "ID": f"2024-I-{n}"}, ["2024-I-0", "2024-I-1"]),
    ],
)
def test_ids_are_the_sources_own_if_they_tell_rows_apart(change, ids):
    rows = [{**row, **change(n)} for n, row in enumerate(rows_of("aime24"))]
    assert [row["id"] for row in normalised("aime24", rows)[:2]] == [f"aime24-{own}" for own in ids]
