"""Pass rates are written for problems, and problems are found again by their text."""

import json

import pytest
from datasets import Dataset

from opefo_trl.data import check_range, keep_by_pass_rate
from opefo_trl.data.pass_rates import write_pass_rates
from opefo_trl.data.templates import DAPO_PREFIX, DAPO_SUFFIX

PROBLEMS = [f"{number} + 1?" for number in range(9)]
ROWS = Dataset.from_dict({"prompt": PROBLEMS, "answer": [str(number + 1) for number in range(9)]})


@pytest.fixture
def rates(tmp_path):
    """Rates of 0/8, 1/8 ... 8/8."""
    write_pass_rates(tmp_path / "rates.jsonl", PROBLEMS, list(range(9)), 8)
    return str(tmp_path / "rates.jsonl")


def test_a_line_for_each_problem_and_a_summary(tmp_path):
    summary = write_pass_rates(tmp_path / "rates.jsonl", ["a", "\u00e9", "c"], [0, 3, 4], 4)
    lines = [json.loads(line) for line in (tmp_path / "rates.jsonl").read_text().splitlines()]
    assert lines[1] == {"problem": "\u00e9", "pass_rate": 0.75, "right": 3, "samples": 4}
    assert [line["pass_rate"] for line in lines] == [0, 0.75, 1]
    assert "3 problems" in summary and "58.3% right" in summary  # 7 of 12
    assert "1 problems are never solved, 1 always, 1 in between" in summary


@pytest.mark.parametrize(
    ("keep", "kept"),
    [((0.1, 0.9), range(1, 8)), ((0.125, 0.25), (1, 2)), ((0, 1), range(9)), ((0, 0), (0,)), ((0.9, 1.0), (8,))],
)
def test_both_ends_of_the_range_are_kept(rates, keep, kept):
    rows, summary = keep_by_pass_rate(ROWS, rates, keep)
    assert rows["prompt"] == [PROBLEMS[index] for index in kept] and len(rows["answer"]) == len(kept)
    assert f"{len(kept)} of 9 problems" in summary
    assert f"{min(kept)} are below, {8 - max(kept)} above" in summary


@pytest.mark.parametrize(
    "prompt",
    [
        "3  +\n1? ",
        DAPO_PREFIX + "3 + 1?" + DAPO_SUFFIX,
        [{"role": "user", "content": "3 + 1?"}],
        [{"role": "user", "content": DAPO_PREFIX + "3 + 1?" + DAPO_SUFFIX}],
    ],
)
def test_a_problem_is_known_in_any_dress(rates, prompt):
    assert len(keep_by_pass_rate(Dataset.from_list([{"prompt": prompt}]), rates, (0.375, 0.375))[0]) == 1


def test_an_empty_range_names_the_rates_that_there_are(rates):
    counts = "3 are below, 2 above.* 2 are at 0, 1 at 1.*0.375 to 0.5"
    with pytest.raises(ValueError, match=f"`keep_pass_rates=0.4 0.45`.* {counts}"):
        keep_by_pass_rate(ROWS.select([0, 0, 3, 4, 8]), rates, (0.4, 0.45))
    with pytest.raises(ValueError, match="1 are at 0, 1 at 1, and no other"):
        keep_by_pass_rate(ROWS.select([0, 8]), rates, (0.1, 0.9))


def test_problems_without_a_rate_are_counted(rates):
    more = Dataset.from_list([{"prompt": "what?"}, {"prompt": PROBLEMS[3]}, {"prompt": "why?"}])
    with pytest.raises(ValueError, match="2 of 3 problems, such as 'what\\?'.*--dataset_name"):
        keep_by_pass_rate(more, rates, (0, 1))


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", "3", '{"problem": "a"}', '{"problem": "a", "pass_rate": 2}', '{"pass_rate": 0.5}']
)
def test_a_line_that_is_no_pass_rate_is_named(tmp_path, line):
    (tmp_path / "rates.jsonl").write_text(f'{{"problem": "b", "pass_rate": 0.5}}\n{line}\n')
    with pytest.raises(ValueError, match="rates.jsonl.*line 2.*opefo-trl eval"):
        keep_by_pass_rate(ROWS, str(tmp_path / "rates.jsonl"), (0, 1))


@pytest.mark.parametrize("keep", [[], [0.5], [0.1, 0.5, 0.9], [-0.1, 0.5], [0.1, 10], [0.6, 0.5]])
def test_a_range_is_two_rates_in_order(keep):
    check_range([0.5, 0.5])
    with pytest.raises(ValueError, match="`keep_pass_rates"):
        check_range(keep)
