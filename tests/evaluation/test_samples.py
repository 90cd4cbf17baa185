"""Samples of a benchmark in a folder: what they hold, and which settings may join them."""

import pandas as pd
import pytest

from opefo_trl.evaluation.engines import Sample
from opefo_trl.evaluation.model_source import ModelSource
from opefo_trl.evaluation.results import score
from opefo_trl.evaluation.samples import (
    Evaluation,
    Task,
    TaskGrader,
    check_same_settings,
    load_problems,
    tokenize_problems,
)
from opefo_trl.playground import TASKS


class Echo:
    """An engine whose completions are their seeds."""

    def sample(self, prompts, seeds, limits):
        assert all(limit > 0 for limit in limits)
        return [Sample(str(seed), 3, False, -1.5) for seed in seeds]


def evaluation(folder, context=20, ks=(2,)):
    problems = load_problems("playground")
    prompts = [[5] * (6 + index % 5) for index in range(len(problems))]
    prompts[0] = [5] * 30
    return Evaluation(folder, [Task(f"task{k}", problems, prompts, k) for k in ks], 10, context, 12, 0)


def test_a_prompt_that_fills_the_context_is_a_sample_without_answer(tmp_path):
    run = evaluation(tmp_path)
    (task,) = run.tasks
    for remaining in run.remaining():
        run.sample(*remaining, Echo(), TaskGrader(TASKS["playground"]))
    frame = run.gather(task)
    assert run.problems_without_room() == 1 and run.longest_sample() == 20 and len(frame) == 72
    empty = frame[frame["tokens"] == 0]
    assert empty["id"].tolist() == [task.problems[0]["id"]] * 2 and empty["truncated"].all()
    scores = score(frame, "x")
    assert scores["problems"] == 36 and scores["outcomes"]["wrong"] + scores["outcomes"]["correct"] == 72


def test_ranks_share_the_batches_and_the_samples_are_the_same(tmp_path):
    one, two = evaluation(tmp_path / "one", ks=(2, 3)), evaluation(tmp_path / "two", ks=(2, 3))
    shares = [two.remaining(rank, 2) for rank in (0, 1)]
    assert len(shares[0]) + len(shares[1]) == len(one.remaining()) == 8 + 11
    for evaluated, remaining in ((one, one.remaining()), (two, shares[1]), (two, shares[0])):
        for batch in remaining:
            evaluated.sample(*batch, Echo(), TaskGrader(TASKS["playground"]))
    assert not two.remaining()
    for task in one.tasks:
        frame = one.gather(task)
        assert frame.equals(two.gather(task)) and frame["seed"].nunique() == len(frame) == 36 * task.k
        assert frame["id"].unique().tolist() == [row["id"] for row in task.problems]
    assert not list((tmp_path / "one" / "samples").glob("*/"))


def test_batches_have_prompts_of_similar_length(tmp_path):
    (task,) = evaluation(tmp_path).tasks
    lengths = [len(task.prompts[problem]) for batch in task.batches(10) for problem, _ in batch]
    assert lengths == sorted(lengths)


def test_samples_of_another_folder_are_not_gathered(tmp_path):
    run = evaluation(tmp_path)
    (task,) = run.tasks
    for remaining in run.remaining():
        frame = run.sample(*remaining, Echo(), TaskGrader(TASKS["playground"]))
    frame.to_parquet(run._batch_file(task, 0))
    with pytest.raises(RuntimeError, match=str(tmp_path)):
        run.gather(task)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.5}, "temperature=1.0 .*0.5"),
        ({"k": 3}, "amc23 k=2 .*3"),
        ({"problem": "another?"}, "amc23 problems="),
        ({"prompt": [1]}, "amc23 problems="),
    ],
)
def test_other_settings_do_not_mix(tmp_path, change, named):
    def check(name="amc23", temperature=1.0, k=2, problem="?", prompt=(1, 2)):
        task = Task(name, [{"id": "a", "problem": problem, "answer": "1"}], [prompt], k)
        return check_same_settings(tmp_path, {"temperature": temperature}, [task])

    check(temperature=2.0)  # no samples yet, so it does not hold the folder
    check()
    (tmp_path / "samples" / "amc23").mkdir(parents=True)
    pd.DataFrame({"id": []}).to_parquet(tmp_path / "samples" / "amc23" / "00000.parquet")
    check()
    with pytest.raises(ValueError, match=f"{named}.*--output_dir"):
        check(**change)
    assert set(check("math500")["tasks"]) == {"amc23", "math500"}


def test_an_embedded_task_stands_beside_maths_benchmarks(tmp_path):
    def check(name, **settings):
        task = Task(name, [{"id": "a", "problem": "?", "answer": "1"}], [(1, 2)], 2)
        content = check_same_settings(tmp_path, {"temperature": 1.0, **settings}, [task])
        (tmp_path / "samples").mkdir(exist_ok=True)
        pd.DataFrame({"id": []}).to_parquet(tmp_path / "samples" / f"{name}.parquet")
        return content

    maths = {"policy": "lenient", "prompt_template": "boxed", "grader": "g 1"}
    check("words", grader=None)
    for content in (check("math500", **maths), check("sentences", grader=None)):
        assert {name: content[name] for name in maths} == maths
    with pytest.raises(ValueError, match="policy='lenient'.*boxed"):
        check("amc23", **{**maths, "policy": "boxed"})


def test_a_chat_template_may_be_missing_or_refuse_a_system_message():
    tokenizer = ModelSource("playground").tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match="chat template.*no system"):
        tokenize_problems(load_problems("playground"), tokenizer, "none", "Be brief.")
    tokenizer.chat_template = None
    prompt = tokenize_problems(load_problems("playground"), tokenizer, "none", "Be brief.")[0]
    assert tokenizer.decode(prompt) == "Be brief.\n\nMake 10"
