"""Verdicts of real math-verify, in the order and number of the completions."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from material import MATERIAL, read_lines

from opefo_trl.grading import Grade, Grader, Outcome
from opefo_trl.grading.grader import LONGEST, cores_of_rank


@pytest.fixture(scope="module")
def lenient():
    with Grader(policy="lenient", workers=1) as shared:
        yield shared


@pytest.mark.parametrize(
    ("gold", "completion", "outcome"),
    [
        (r"\frac{1}{2}", r"\boxed{\frac12}", "correct"),
        ("1,234", r"\boxed{1234}", "correct"),
        ("x=5", r"\boxed{5}", "correct"),
        ("69,84", r"\boxed{84, 69}", "correct"),
        (["1", "2"], r"\boxed{2, 1}", "correct"),
        ("69,84", r"\boxed{69}", "wrong"),
        (r"1 - \sqrt{2}", r"\boxed{1}", "wrong"),  # TRL's accuracy_reward reads this gold as 1
        (r"2^{1009}", r"\boxed{2}", "wrong"),
        ("72", r"\boxed{73}", "wrong"),
        ("72", "72", "no_answer"),
        ("72", r"<think>Maybe \boxed{72}? Let me", "no_answer"),
        ("72", r"<think>Maybe \boxed{72}?</think> No: \boxed{71}", "wrong"),
        ("", r"\boxed{1}", "error"),
        ("3", r"\boxed{" + "3" * (LONGEST + 1) + "}", "wrong"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", "correct"),
    ],
)
def test_verdicts(grader, gold, completion, outcome):
    assert grader.grade([gold], [completion])[0].outcome == outcome


BOXED = yaml.safe_load((MATERIAL / "boxed_answers.yaml").read_text())


@pytest.mark.parametrize("topic", BOXED)
def test_boxed_answers_by_hand(grader, topic):
    golds, answers, verdicts = zip(*BOXED[topic], strict=True)
    grades = grader.grade(golds, [rf"so it is $\boxed{{{answer}}}$." for answer in answers])
    given = ["right" if grade.correct else "wrong" for grade in grades]
    assert [case for case, verdict in zip(BOXED[topic], given, strict=True) if case[2] != verdict] == []
    assert [grade.answer for grade in grades] == list(answers)  # as written, however it was read
    assert verdicts.count("wrong") >= 5 and set(verdicts) == {"right", "wrong"}


@pytest.mark.parametrize(
    ("gold", "completion", "outcome", "answer"),
    [
        ("5/6", "The answer is $\\frac{5}{6}$", "correct", "\\frac{5}{6}"),
        ("6m", "The answer is $6m$.", "correct", "6"),  # both without the letter
        ("336", "Answer: $336$", "correct", "336"),
        ("4", "The answer is 5", "wrong", "5"),
        ("4", "I do not know", "no_answer", None),
        ("4", "", "no_answer", None),
        ("4", r"4 \boxed{5}", "wrong", "5"),  # a box counts, whatever else there is
        ("4", "4" + " and so on" * 1000, "no_answer", None),  # only the end is searched
    ],
)
def test_the_lenient_policy(lenient, gold, completion, outcome, answer):
    assert lenient.grade([gold], [completion]) == [Grade(Outcome(outcome), answer)]


def test_grades_come_in_order_are_counted_and_remembered(grader, monkeypatch):
    grader.counts.clear()
    golds, texts = [str(n) for n in range(50)], [rf"\boxed{{{n + n % 2}}}" for n in range(50)]
    grades = grader.grade(golds, texts)
    assert [grade.correct for grade in grades] == [n % 2 == 0 for n in range(50)]
    assert grader.counts == Counter(correct=25, wrong=25)
    monkeypatch.setattr(grader, "_judge", None)  # no worker is asked again
    assert grader.grade(golds * 100, texts * 100) == grades * 100
    assert grader.counts["correct"] == 25 * 101
    with pytest.raises(ValueError, match="50 golds and 1 completions"):
        grader.grade(golds, ["1"])


def test_golds_that_are_no_answers_are_found(grader):
    readable = ["72", r"\frac{1}{2}", "-3", "#### 5", r"\text{the red one}", "Yes", ["1", "2"], 0.5, "10 cm", "(1, 2)"]
    bad = [
        "",
        " ",
        None,
        float("nan"),
        "see the proof",
        "We have 3 apples and so the answer is 5.",
        r"\frac{1}{",
        "}{",
    ]
    assert grader.unreadable([*readable, *bad]) == list(range(len(readable), len(readable) + len(bad)))


def test_threads_share_a_grader(grader):
    def grade(start):
        numbers = range(start, start + 20)
        grades = grader.grade([str(n) for n in numbers], [rf"\boxed{{{n + n % 3}}}" for n in numbers])
        return [grade.correct for grade in grades]

    with ThreadPoolExecutor(6) as pool:
        verdicts = list(pool.map(grade, range(1000, 1120, 20)))
    assert verdicts == [[n % 3 == 0 for n in range(start, start + 20)] for start in range(1000, 1120, 20)]


def test_cores_are_shared_among_the_ranks_of_a_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("opefo_trl.grading.grader._CPU_QUOTA", tmp_path / "cpu.max")
    for quota, cores in (("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 16)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")  # as a container has it
        assert cores_of_rank() == cores
    (tmp_path / "cpu.max").unlink()
    assert cores_of_rank() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores_of_rank() == 2 and Grader().workers == 2 and Grader(workers=1).workers == 1
    with pytest.warns(UserWarning, match="`workers=5`.* 2 cores"):
        assert Grader(workers=5).workers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores_of_rank() == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("policy", ["box"]),
        ("timeout", [0, "fast", float("inf")]),
        ("memory", [-1, True]),
        ("workers", [0, 1.5]),
    ],
)
def test_wrong_options_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"`{name}={value!r}`")):
            Grader(**{name: value})


# ---- real material


@pytest.mark.slow
def test_public_cases(grader, lenient):
    cases = read_lines("grader_cases.jsonl")
    for policy, tiers in {grader: ("core", "safety"), lenient: ("core", "safety", "unboxed")}.items():
        chosen = [case for case in cases if case["tier"] in tiers]
        grades = policy.grade([case["gold"] for case in chosen], [case["prediction"] for case in chosen])
        wrong = [case["id"] for case, grade in zip(chosen, grades, strict=True) if grade.correct != case["expected"]]
        assert not wrong and len(chosen) > 190
        assert policy.alive == policy.workers  # also after answers that ended a worker


@pytest.mark.slow
def test_golds_of_the_benchmarks_match_themselves_and_not_their_neighbours(grader):
    wrong, false = [], []
    for file in sorted((MATERIAL / "bench").glob("*.jsonl")):
        rows = read_lines(file)
        golds = [row["answer"] for row in rows]
        assert grader.unreadable(golds) == []
        boxed = [rf"\boxed{{{gold}}}" for gold in golds]
        own = grader.grade(golds, boxed)
        other = grader.grade(golds, [*boxed[1:], boxed[0]])
        wrong += [row["id"] for row, grade in zip(rows, own, strict=True) if not grade.correct]
        false += [
            {gold, grade.answer}
            for gold, grade in zip(golds, other, strict=True)
            if grade.correct and "".join(gold.split()) != "".join(str(grade.answer).split())
        ]
    assert not wrong
    assert false in ([], [{"x=5", "5"}])  # one that is meant: an equation's right side
