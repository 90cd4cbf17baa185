"""Verdicts, deadlines and workers, with real math-verify in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shared import EVAL, needs, read_lines

from opefo_trl.grading import LONGEST, Grade, Grader, Outcome, answer_of, bare, boxes_of, cores_of_rank

# Right, and half a second's work
SLOW = (
    f"({', '.join(f'(x+{n})^{{40}}' for n in range(1, 15))})",
    rf"\boxed{{({', '.join(f'(x^2+{2 * n}x+{n * n})^{{20}}' for n in range(1, 15))})}}",
)
POWER_TOWER = r"\boxed{9^{9^{9^{9^{9}}}}}"


@pytest.fixture(scope="module")
def grader():
    with Grader() as shared:
        yield shared


@pytest.fixture(scope="module")
def lenient():
    with Grader(policy="lenient", workers=1) as shared:
        yield shared


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"so \boxed{72}", ["72"]),
        (r"\boxed{\frac{1}{2}} and \fbox{3}", [r"\frac{1}{2}", "3"]),
        (r"\boxed {4}", ["4"]),
        (r"\boxed{}\boxed{ }", []),
        (r"\boxed{72", []),
        (r"\boxed{\boxed{3}}", [r"\boxed{3}"]),
        (r"\boxed{unclosed and then \boxed{5}", ["5"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\left\{x \mid x > 0\right.}", [r"\left\{x \mid x > 0\right."]),  # an escaped brace closes nothing
        (r"{{ \boxed{6} }", ["6"]),
        (r"} \boxed{7}", ["7"]),
        (r"a line \\{ \boxed{8}", ["8"]),
    ],
)
def test_boxes(text, boxes):
    assert boxes_of(text) == boxes


@pytest.mark.parametrize("bomb", [r"\boxed{" * 200_000, "{" * 1_000_000, r"\boxed{" * 200_000 + "1" + "}" * 200_000])
def test_braces_by_the_hundred_thousand_take_no_time(bomb):
    began = time.process_time()
    boxes_of(bomb)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("text", "policy", "answer"),
    [
        (r"\boxed{1} wait \boxed{ 2 }", "boxed", "2"),
        ("Answer: 5", "boxed", None),
        ("Answer: 4\nno\n**Answer:** 5 \n", "answer_line", "5"),
        ("the answer: 5 is good", "answer_line", None),
        ("Answer:", "answer_line", None),
        ("Answer: $\\frac{1}{2}$.", "answer_line", "$\\frac{1}{2}$."),
        (r"\boxed{3}. Answer: 4", "lenient", "3"),
    ],
)
def test_policies_find_the_last_answer(text, policy, answer):
    assert answer_of(text, policy) == answer


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (72, "72"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("$69$,$84$", "$69$,$84$"),  # two answers: the dollars within stay
        ("so 3.\n#### 1,234", "1,234"),
        (r"Hence $x = \boxed{x^2}$.", "x^2"),
    ],
)
def test_golds_come_in_many_wrappings(gold, text):
    assert bare(gold) == text


@pytest.mark.parametrize(
    ("gold", "completion", "outcome"),
    [
        ("1/2", r"\boxed{0.5}", "correct"),
        (r"\frac{1}{2}", r"\boxed{\frac12}", "correct"),
        ("1,234", r"\boxed{1234}", "correct"),
        ("x=5", r"\boxed{5}", "correct"),
        ("69,84", r"\boxed{84, 69}", "correct"),
        ("69,84", r"\boxed{69}", "wrong"),
        (r"1 - \sqrt{2}", r"\boxed{1}", "wrong"),  # TRL's accuracy_reward reads this gold as 1
        (r"2^{1009}", r"\boxed{2}", "wrong"),
        ("72", r"\boxed{73}", "wrong"),
        ("72", "72", "no_answer"),
        ("", r"\boxed{1}", "error"),
        ("3", r"\boxed{" + "3" * (LONGEST + 1) + "}", "wrong"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", "correct"),
        ("(3, \\frac{\\pi}{2})", r"\boxed{\left( 3, \pi/2 \right)}", "correct"),
    ],
)
def test_verdicts(grader, gold, completion, outcome):
    assert grader.grade([gold], [completion])[0].outcome == outcome


@pytest.mark.parametrize(
    ("gold", "completion", "outcome", "answer"),
    [
        ("5/6", "The answer is $\\frac{5}{6}$", "correct", "\\frac{5}{6}"),
        ("336", "Answer: $336$", "correct", "336"),
        ("4", "The answer is 5", "wrong", "5"),
        ("4", "I do not know", "no_answer", None),
        ("4", "", "no_answer", None),
        ("4", r"4 \boxed{5}", "wrong", "5"),  # a box counts, whatever else there is
        ("4", "4" + " and so on" * 1000, "no_answer", None),  # only the end is looked at
    ],
)
def test_the_lenient_policy(lenient, gold, completion, outcome, answer):
    assert lenient.grade([gold], [completion]) == [Grade(Outcome(outcome), answer)]


def test_grades_come_in_order_are_counted_and_remembered(grader):
    grader.counts.clear()
    golds, texts = [str(n) for n in range(50)], [rf"\boxed{{{n + n % 2}}}" for n in range(50)]
    grades = grader.grade(golds, texts)
    assert [grade.correct for grade in grades] == [n % 2 == 0 for n in range(50)]
    assert grader.counts == Counter(correct=25, wrong=25)
    began = time.process_time()
    assert grader.grade(golds * 100, texts * 100) == grades * 100
    assert time.process_time() - began < 2 and grader.counts["correct"] == 25 * 101


def test_unreadable_golds_are_named(grader):
    readable = ["72", r"\frac{1}{2}", "-3", "#### 5", r"\text{the red one}", "Yes", ["1", "2"], 0.5, "10 cm", "(1, 2)"]
    assert grader.unreadable(readable) == []
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
    assert grader.grade([["1", "2"]], [r"\boxed{2, 1}"])[0].correct


@pytest.mark.parametrize(
    "answer",
    [
        POWER_TOWER,
        r"\boxed{" + "{" * 5000 + "1" + "}" * 5000 + "}",
        r"\boxed{" + r"\frac{" * 2000 + "1" + "}{2}" * 2000 + "}",
        r"\boxed{" + "\udcff\u202e\x00\U0001f4a5ñ़" * 50 + "}",
        "x" * 10_000_000 + r"\boxed{3}",
        r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
        r"\boxed{1000000!!}",
    ],
    ids=["tower", "braces", "fractions", "garbage", "10MB", "parentheses", "factorial"],
)
def test_nothing_hangs_and_nothing_crashes(answer):
    with Grader(workers=1, timeout=1.5) as grader:
        assert grader.grade(["3"], [r"\boxed{3}"])[0].correct
        began = time.monotonic()
        outcome = grader.grade(["2"], [answer])[0].outcome
        assert outcome in ("wrong", "timeout", "error")
        assert time.monotonic() - began < 60  # by the clock, on a machine with other work
        assert grader.grade(["4"], [r"\boxed{4}"])[0].correct and grader.alive == 1


def test_a_timeout_is_no_wrong_answer_and_the_worker_is_replaced():
    with Grader(workers=1, timeout=0.7) as grader:
        grades = grader.grade(["3", "5", "4"], [r"\boxed{3}", POWER_TOWER, r"\boxed{4}"])
        assert [grade.outcome for grade in grades] == ["correct", "timeout", "correct"]
        assert grades[1].answer == "9^{9^{9^{9^{9}}}}" and grader.counts["timeout"] == 1 and grader.alive == 1


def test_a_worker_that_dies_is_replaced_and_the_answer_tried_again(grader):
    grader.grade(["1"], [r"\boxed{1}"])
    for worker in grader._started:
        if worker.child is not None:
            os.kill(worker.child.pid, signal.SIGKILL)
            worker.child.wait()
    assert grader.alive == 0
    grades = grader.grade([str(n) for n in range(600, 660)], [rf"\boxed{{{n}}}" for n in range(600, 660)])
    assert all(grade.correct for grade in grades) and grader.alive == grader.workers


def test_an_answer_that_takes_all_memory_is_an_error(monkeypatch, tmp_path):
    hungry = tmp_path / "hungry.py"
    hungry.write_text(
        "from opefo_trl.grading import worker\n"
        "judge = worker.judge\n"
        "worker.judge = lambda gold, text, boxed: judge(gold, text if text != '7' else bytearray(2**33), boxed)\n"
        "worker.main()\n"
    )
    monkeypatch.setattr("opefo_trl.grading.grader.WORKER", hungry)
    with Grader(workers=1, memory=2) as grader:
        grades = grader.grade(["1", "7", "1/2"], [r"\boxed{1}", r"\boxed{7}", r"\boxed{0.5}"])
        assert [grade.outcome for grade in grades] == ["correct", "error", "correct"] and grader.alive == 1


def test_threads_share_a_grader(grader):
    def of(start):
        numbers = range(start, start + 20)
        return [
            g.correct for g in grader.grade([str(n) for n in numbers], [rf"\boxed{{{n + n % 3}}}" for n in numbers])
        ]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(of, range(1000, 1120, 20)))
    assert found == [[n % 3 == 0 for n in range(start, start + 20)] for start in range(1000, 1120, 20)]


def test_a_process_that_is_forked_has_workers_of_its_own(grader):
    grader.grade(["1"], [r"\boxed{1}"])
    ours = {worker.child.pid for worker in grader._started if worker.child}
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            grades = grader.grade(["1/2", "7"], [r"\boxed{0.5}", r"\boxed{8}"])
            theirs = [worker.child.pid for worker in grader._started if worker.child]
            grader.close()
            os.write(write, json.dumps([[grade.outcome for grade in grades], theirs]).encode())
        finally:
            os._exit(0)
    os.close(write)
    outcomes, theirs = json.loads(os.read(read, 4096))
    os.waitpid(child, 0)
    assert outcomes == ["correct", "wrong"] and not ours & set(theirs)
    assert grader.grade(["3/4"], [r"\boxed{0.75}"])[0].correct and grader.alive >= 1


def test_ranks_that_are_forked_grade_the_same(tmp_path):
    script = Path(__file__).parents[1] / "runs" / "forked_ranks.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("parent", "0", "1")]
    assert found == [[1.0, 0.0, 1.0, 1.0, 0.0]] * 3


def test_workers_end_with_their_owner(tmp_path):
    """Whatever ends it: a kill leaves nobody to close them."""
    script = (
        "import os, sys\n"
        "from opefo_trl.grading import Grader\n"
        "grader = Grader(workers=1)\n"
        "grader.grade(['1'], [chr(92) + 'boxed{1}'])\n"
        "print(grader._started[0].child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    (tmp_path / "plain.py").write_text(
        "print('top')\n"
        "from opefo_trl.grading import Grader\n"
        "print(Grader(workers=1).grade(['2'], [chr(92) + 'boxed{2}'])[0].outcome)\n"
    )
    done = subprocess.run([sys.executable, str(tmp_path / "plain.py")], capture_output=True, text=True)
    assert done.stdout.split() == ["top", "correct"], done.stderr


def test_cores_are_shared_among_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert cores_of_rank() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores_of_rank() == 2 and Grader().workers == 2 and Grader(workers=1).workers == 1
    with pytest.warns(UserWarning, match=r"`workers=5`: this rank has 2 cores"):
        assert Grader(workers=5).workers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cores_of_rank() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "box"}, r"`policy='box'` is unknown.*'boxed', 'answer_line', 'lenient'"),
        ({"timeout": 0}, "`timeout=0` must be a number above 0"),
        ({"timeout": "5"}, "`timeout='5'`"),
        ({"memory": -1}, "`memory=-1`"),
        ({"workers": 0}, "`workers=0` must be a whole number"),
        ({"workers": 1.5}, r"`workers=1\.5`"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Grader(**options)
    with pytest.raises(ValueError, match="2 golds and 1 completions"):
        Grader().grade(["1", "2"], ["1"])


def test_a_worker_that_cannot_start_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("opefo_trl.grading.grader.WORKER", tmp_path / "nowhere.py")
    with Grader(workers=1) as grader:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"could not be started.*To see why.*nowhere"):
                grader.grade(["1"], [r"\boxed{1}"])


# ---- the cases beside the project


@needs("grader_cases.jsonl")
def test_cases(grader, lenient):
    cases = read_lines("grader_cases.jsonl")
    for policy, tiers in {grader: ("core", "safety"), lenient: ("core", "safety", "unboxed")}.items():
        chosen = [case for case in cases if case["tier"] in tiers]
        grades = policy.grade([case["gold"] for case in chosen], [case["prediction"] for case in chosen])
        wrong = [case["id"] for case, grade in zip(chosen, grades, strict=True) if grade.correct != case["expected"]]
        assert not wrong and len(chosen) > 190
        assert policy.alive == policy.workers  # also after those that had to be ended
    for case in cases:
        if case["tier"] == "safety":
            with Grader(workers=1, timeout=2) as own:
                assert not own.grade([case["gold"]], [case["prediction"]])[0].correct and own.alive == 1


@needs("bench")
def test_golds_of_the_benchmarks_match_themselves_and_not_their_neighbours(grader):
    wrong, false = [], []
    for file in sorted((EVAL / "bench").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
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


@needs("grader_cases.jsonl")
def test_verdicts_do_not_depend_on_what_else_the_machine_does():
    """Twelve graders at once, on however few cores, three times."""
    cases = [case for case in read_lines("grader_cases.jsonl") if case["tier"] == "core"][::5]
    golds, texts = [case["gold"] for case in cases], [case["prediction"] for case in cases]
    with Grader(workers=1, timeout=60) as alone:
        alone.grade(["1"], [r"\boxed{1}"])
        began = time.perf_counter()
        assert alone.grade([SLOW[0]], [SLOW[1]])[0].correct
        needs = time.perf_counter() - began
    cases.append({"gold": SLOW[0], "prediction": SLOW[1], "expected": True})
    golds, texts = [*golds, SLOW[0]], [*texts, SLOW[1]]
    # By the clock this would be far too little for twelve on two cores
    graders = [Grader(workers=1, timeout=max(2.5 * needs, 1.0)) for _ in range(12)]
    seen = set()
    with ThreadPoolExecutor(len(graders)) as pool:
        for _ in range(3):
            for grades in pool.map(lambda grader: grader.grade(golds, texts), graders):
                seen.add(tuple(grade.outcome for grade in grades))
            for grader in graders:
                grader._known.clear()  # what it remembers would be no test
    for grader in graders:
        grader.close()
    assert len(seen) == 1 and [outcome == "correct" for outcome in seen.pop()] == [case["expected"] for case in cases]
