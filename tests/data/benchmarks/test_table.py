"""Names of benchmarks, and the protocol of the paper."""

import pytest

from opefo_trl.data.benchmarks import BENCHMARKS, SIX, benchmark_name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aime24", ["AIME24", "aime_2024", "AIME-24"]),
        ("math500", ["MATH-500", "Math500"]),
        ("amc23", ["AMC_2023"]),
        ("minerva", ["Minerva Math"]),
        ("olympiadbench", ["OlympiadBench"]),
    ],
)
def test_case_and_dashes_of_a_name_do_not_matter(name, words):
    assert {benchmark_name(word) for word in words} == {name}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("aime23", "'aime2"),
        ("minvera", "'minerva'"),
        ("olympiad", "'olympiadbench'"),
        *((larger, "") for larger in ("math", "amc", "aime", "")),  # the name of a set is none of its parts
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_with_all(name, near):
    with pytest.raises(ValueError, match=f"`benchmark='{name}'`.*{near}") as caught:
        benchmark_name(name)
    assert all(f"'{known}'" in str(caught.value) for known in BENCHMARKS)


def test_the_table_is_the_protocol():
    assert list(BENCHMARKS) == [*SIX, "gsm8k"] and len(SIX) == 6
    samples = {name: benchmark.k for name, benchmark in BENCHMARKS.items() if benchmark.k != 1}
    assert samples == {"aime24": 32, "aime25": 32, "amc23": 32}
