"""Child processes: deadlines, memory, deaths, forks, and owners of every kind."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from material import read_lines
from scripts import python

from opefo_trl.grading import Grade, Grader, Outcome

pytestmark = pytest.mark.slow
TOWER = "9^{9^{9^{9^{9}}}}"
# Right, and half a second's work
LONG_WORK = (
    f"({', '.join(f'(x+{n})^{{40}}' for n in range(1, 15))})",
    rf"\boxed{{({', '.join(f'(x^2+{2 * n}x+{n * n})^{{20}}' for n in range(1, 15))})}}",
)


@pytest.mark.parametrize(
    "answer",
    [
        r"\boxed{" + "{" * 5000 + "1" + "}" * 5000 + "}",
        r"\boxed{" + r"\frac{" * 2000 + "1" + "}{2}" * 2000 + "}",
        r"\boxed{" + "\udcff\u202e\x00\U0001f4a5ñ़" * 50 + "}",
        "x" * 10_000_000 + r"\boxed{3}",
        r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
        r"\boxed{1000000!!}",
        rf"\boxed{{{TOWER}}}",
    ],
    ids=["braces", "fractions", "garbage", "10MB", "parentheses", "factorial", "tower"],
)
def test_nothing_hangs_and_nothing_crashes(answer):
    with Grader(workers=1, timeout=1.5) as grader:
        grades = [grader.grade([gold], [text])[0] for gold, text in (("3", r"\boxed{3}"), ("2", answer))]
        assert grades[0].correct and grades[1].outcome in ("wrong", "timeout", "error")
        if TOWER in answer:  # a timeout is no wrong answer
            assert grades[1] == Grade(Outcome("timeout"), TOWER) and grader.counts["timeout"] == 1
        assert grader.grade(["4"], [r"\boxed{4}"])[0].correct and grader.alive == 1


def test_a_worker_that_dies_is_replaced_and_the_answer_tried_again(grader):
    grader.grade(["1"], [r"\boxed{1}"])
    for worker in grader._workers:
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


def test_a_worker_that_cannot_start_says_how_to_see_why(monkeypatch, tmp_path):
    monkeypatch.setattr("opefo_trl.grading.grader.WORKER", tmp_path / "nowhere.py")
    with Grader(workers=1) as grader:
        for _ in range(2):
            with pytest.raises(ChildProcessError, match=r"nowhere\.py"):
                grader.grade(["1"], [r"\boxed{1}"])


def test_a_process_that_is_forked_has_workers_of_its_own(grader):
    grader.grade(["1"], [r"\boxed{1}"])
    ours = {worker.child.pid for worker in grader._workers if worker.child}
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            grades = grader.grade(["1/2", "7"], [r"\boxed{0.5}", r"\boxed{8}"])
            pids = [worker.child.pid for worker in grader._workers if worker.child]
            grader.close()
            os.write(write, json.dumps([[grade.outcome for grade in grades], pids]).encode())
        finally:
            os._exit(0)
    os.close(write)
    outcomes, pids = json.loads(os.read(read, 4096))
    os.waitpid(child, 0)
    assert outcomes == ["correct", "wrong"] and not ours & set(pids)
    assert grader.grade(["3/4"], [r"\boxed{0.75}"])[0].correct and grader.alive >= 1


def test_workers_end_with_their_owner_even_if_it_is_killed():
    script = (
        "import os\n"
        "from opefo_trl.grading import Grader\n"
        "grader = Grader(workers=1)\n"
        "grader.grade(['1'], [chr(92) + 'boxed{1}'])\n"
        "print(grader._workers[0].child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9
    for _ in range(100):
        try:
            if psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    (tmp_path / "plain.py").write_text(
        "print('top')\n"
        "from opefo_trl.grading import Grader\n"
        "print(Grader(workers=1).grade(['2'], [chr(92) + 'boxed{2}'])[0].outcome)\n"
    )
    assert python(tmp_path / "plain.py").split() == ["top", "correct"]


def test_verdicts_do_not_depend_on_what_else_the_machine_does():
    """Twelve graders at once, on however few cores, three times."""
    cases = [case for case in read_lines("grader_cases.jsonl") if case["tier"] == "core"][::5]
    cases.append({"gold": LONG_WORK[0], "prediction": LONG_WORK[1], "expected": True})
    golds, texts = [case["gold"] for case in cases], [case["prediction"] for case in cases]
    with Grader(workers=1, timeout=60) as alone:
        alone.grade(["1"], [r"\boxed{1}"])
        began = time.perf_counter()
        assert alone.grade([LONG_WORK[0]], [LONG_WORK[1]])[0].correct
        needs = time.perf_counter() - began
    # By the clock this deadline would be far too short for twelve on two cores
    graders = [Grader(workers=1, timeout=max(2.5 * needs, 1.0)) for _ in range(12)]
    verdicts = set()
    with ThreadPoolExecutor(len(graders)) as pool:
        for _ in range(3):
            for grades in pool.map(lambda grader: grader.grade(golds, texts), graders):
                verdicts.add(tuple(grade.outcome for grade in grades))
            for grader in graders:
                grader._verdicts.clear()  # remembered verdicts would be no test
    for grader in graders:
        grader.close()
    (outcomes,) = verdicts
    assert [outcome == "correct" for outcome in outcomes] == [case["expected"] for case in cases]
