"""eval.py as a person runs it: whole, killed and gone on with, in two processes, beside another, watching a run."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from scripts import ROOT, load_script
from shared import EVAL, needs
from transformers import AutoModelForCausalLM

from opefo_trl.curves import EntropyCurves
from opefo_trl.data.benchmarks import BENCHMARKS, SIX
from opefo_trl.evaluation.engines import Decoding, ModelSource, Transformers, seed_of
from opefo_trl.evaluation.results import compare, draws_of, read_results, score
from opefo_trl.evaluation.samples import Evaluation, PlaygroundGrader, Task, load_problems, prompts_of
from opefo_trl.evaluation.watch import collect, has_results
from opefo_trl.grading import Grader
from opefo_trl.playground import MODEL

SMALL = "--benchmarks playground --temperature 1 --top_p 1 --max_new_tokens 12 --batch_size 16 --k 4".split()  # noqa: SIM905


def command(out, *more):
    return [sys.executable, str(ROOT / "eval.py"), "--model", "playground", *SMALL, "--output_dir", str(out), *more]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(out, *more, refused=False):
    """The script in this process, which spares its imports."""
    said, complained, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = command(out, *more)[1:]
    try:
        with redirect_stdout(said), redirect_stderr(complained):
            load_script("eval.py").main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    assert code == (2 if refused else 0), complained.getvalue()
    return Done(code, said.getvalue(), complained.getvalue())


def samples(out, name="playground"):
    return pd.read_parquet(out / "samples" / f"{name}.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    run(out)
    return out


@pytest.fixture(scope="module")
def long_context(tmp_path_factory):
    """The playground's model with room for long prompts: its positions are rotations, which have no end."""
    folder = tmp_path_factory.mktemp("model") / "long"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return folder


# ---- samples


def test_log_probabilities_are_those_of_the_distribution_that_is_sampled_from():
    source = ModelSource("playground")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), source.tokenizer()
    problems = load_problems("playground")
    prompts = prompts_of(problems[:3], tokenizer, "none", None) * 4
    prompts[1] = prompts[1] + prompts[1]  # rows of unlike length
    for decoding in (Decoding(1.0, 1.0, 12), Decoding(0.6, 0.9, 12), Decoding(0.0, 1.0, 12)):
        found = Transformers(source, decoding, tokenizer).sample(prompts, [3] * 12, [12] * 12)
        for prompt, sample in zip(prompts, found, strict=True):
            ids = tokenizer(sample.text)["input_ids"] + ([] if sample.truncated else [tokenizer.eos_token_id])
            assert len(ids) == sample.tokens
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps = (logits / (decoding.temperature or 1.0)).log_softmax(-1)
            if decoding.top_p < 1:  # the fewest tokens that hold so much; the rest has no chance
                ordered, order = logps.exp().sort(descending=True)
                outside = torch.zeros_like(logps, dtype=torch.bool).scatter(
                    1, order, ordered.cumsum(-1) - ordered >= decoding.top_p
                )
                logps = logps.masked_fill(outside, -torch.inf).log_softmax(-1)
            assert float(logps.gather(1, torch.tensor(ids)[:, None]).sum()) == pytest.approx(sample.logp, abs=1e-4)


def test_rows_stop_at_their_own_limit_and_truncation_is_told():
    source = ModelSource("playground")
    tokenizer = source.tokenizer()
    prompts = prompts_of(load_problems("playground")[:2], tokenizer, "none", None)
    engine = Transformers(source, Decoding(1.0, 1.0, 12), tokenizer)
    found = engine.sample(prompts * 6, [0] * 12, [2, 12] * 6)
    assert all(sample.tokens == 2 and sample.truncated for sample in found[::2])
    assert any(sample.tokens > 2 for sample in found[1::2])
    assert not any(sample.truncated for sample in found[1::2] if sample.tokens < 12)


def test_seeds_are_distinct_and_stay():
    seeds = [seed_of(seed, name, sample) for seed in (0, 1) for name in "ab" for sample in range(100)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "aime24", "aime24-60", 3) == 319078851


def test_a_prompt_that_fills_the_context_is_a_sample_without_answer(tmp_path):
    problems = load_problems("playground")
    tokenizer = ModelSource("playground").tokenizer()
    prompts = prompts_of(problems, tokenizer, "none", None)
    prompts[0] = prompts[0] * 10
    task = Task("playground", problems, prompts, 2)
    run = Evaluation(tmp_path, [task], 100, 20, 12, 0)
    engine = Transformers(ModelSource("playground"), Decoding(1.0, 1.0, 12), tokenizer)
    (left,) = run.left()
    frame = run.sample(*left, engine, PlaygroundGrader())
    assert run.without_room() == 1 and len(frame) == 36
    empty = frame[frame["tokens"] == 0]
    assert empty["id"].tolist() == [problems[0]["id"]] * 2 and empty["truncated"].all()
    scores = score(run.gather(task), "x")
    assert scores["problems"] == 18 and scores["outcomes"]["wrong"] + scores["outcomes"]["correct"] == 36


# ---- the script


def test_what_a_run_leaves(whole):
    results = read_results(whole)
    scores = results["benchmarks"]["playground"]
    frame = samples(whole)
    assert len(frame) == 72 and frame["seed"].nunique() == 72 and frame["id"].nunique() == 18
    right = frame.assign(right=frame["outcome"] == "correct").groupby("id", sort=False)["right"].mean()
    assert scores["avg"] == pytest.approx(right.mean()) and scores["by_problem"] == pytest.approx(right.to_dict())
    assert scores["k"] == 4 and list(scores["pass"]) == ["1", "2", "4"]
    assert scores["pass"]["4"] == pytest.approx((right > 0).mean()) and scores["pass"]["1"] == scores["avg"]
    assert scores["interval"][0] < scores["avg"] < scores["interval"][1]
    assert scores["entropy"] == pytest.approx(-frame["logp"].sum() / frame["tokens"].sum())
    assert sum(scores["outcomes"].values()) == 72 and 0 < scores["calibration"] < 1
    assert results["settings"]["engine"].startswith("transformers ") and "math-verify" in results["settings"]["grader"]
    assert (whole / "results.md").read_text().splitlines()[2].startswith("| Playground | 18 | 4 |")
    assert not list((whole / "samples").glob("*/"))


def test_killed_the_same_command_goes_on_to_the_same_results(whole, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(out.glob("samples/playground/*.parquet"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("samples/playground/*.parquet")}
    assert 2 <= len(before) < 5, "it was done before it could be killed"
    done = run(out)
    assert f"{72 - 16 * len(before)}/{72 - 16 * len(before)}" in done.stderr  # only what was left
    assert samples(out).equals(samples(whole))
    assert read_results(out)["benchmarks"] == read_results(whole)["benchmarks"]
    again = run(out)
    assert "sample" not in again.stderr and "Playground" in again.stdout  # nothing left to sample


@needs("bench")
def test_killed_in_a_benchmark_that_is_graded_by_workers(long_context, tmp_path):
    words = ["--benchmarks", "amc23", "--benchmark_source", str(EVAL / "bench"), "--model", str(long_context)]
    words += ["--k", "2", "--batch_size", "8"]
    process = subprocess.Popen(
        command(tmp_path / "killed", *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list(tmp_path.glob("killed/samples/amc23/*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in ("killed", "whole"):
        run(tmp_path / out, *words)
    assert samples(tmp_path / "killed", "amc23").equals(samples(tmp_path / "whole", "amc23"))
    assert read_results(tmp_path / "killed") == read_results(tmp_path / "whole")


def test_other_settings_do_not_mix(whole):
    done = run(whole, "--temperature", "0.5", refused=True)
    assert "holds samples with temperature=1.0 (now 0.5). Set another --output_dir" in done.stderr


def test_other_samples_of_a_benchmark_do_not_mix_and_other_benchmarks_stay_beside(whole, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    for words, message in {
        ("--k", "2"): "playground k=4 (now 2)",
        ("--limit", "3"): "limit=None (now 3)",
    }.items():
        assert f"holds samples with {message}" in run(out, *words, refused=True).stderr
    rows = [{"id": n, "question": f"{n} + 1 = ?", "answer": n + 1} for n in range(40)]
    (tmp_path / "amc23.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(out, "--benchmarks", "AMC-23", "--benchmark_source", str(tmp_path), "--k", "1")
    assert list(read_results(out)["benchmarks"]) == ["playground", "amc23"]  # and what a folder has, stays
    assert read_results(out)["benchmarks"]["playground"] == read_results(whole)["benchmarks"]["playground"]
    assert read_results(out)["settings"]["tasks"]["amc23"]["k"] == 1
    (tmp_path / "amc23.jsonl").write_text("".join(json.dumps({**row, "answer": 0}) + "\n" for row in rows))
    changed = ["--benchmarks", "amc23", "--benchmark_source", str(tmp_path), "--k", "1"]
    assert "amc23 problems=" in run(out, *changed, refused=True).stderr


def test_a_start_that_came_to_nothing_does_not_hold_the_folder(tmp_path):
    (tmp_path / "settings.json").write_text('{"dtype": "float61", "tasks": {}}')
    run(tmp_path, "--limit", "1")


def test_two_processes_share_the_batches(whole, tmp_path):
    out = tmp_path / "two"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, *command(out)[1:]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert samples(out).equals(samples(whole)) and done.stdout.count("Playground") == 1


def test_beside_another_result(whole, tmp_path):
    done = run(tmp_path / "other", "--seed", "1", "--compare", str(whole))
    assert "beside playground" in done.stdout and "Not alike: seed: 0 before, 1 after." in done.stdout
    rows, unlike = compare(read_results(whole), read_results(tmp_path / "other"))
    first, second = (read_results(path)["benchmarks"]["playground"]["avg"] for path in (whole, tmp_path / "other"))
    assert rows[0][:2] == ["Playground", "18"] and rows[0][4] == f"{100 * (second - first):+.1f}"
    same, unlike = compare(read_results(whole), read_results(whole))
    assert same[0][4:] == ["+0.0", "+0.0 to +0.0", "1.000"] and unlike == []


def test_draws():
    assert [draws_of(k) for k in (1, 2, 6, 32)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmarks", "aime23"], "`benchmark='aime23'` is unknown"),
        (["--k", "0"], "`k=0` must be 1 or more"),
        (["--temperature", "0"], "`temperature=0` gives the same sample 4 times"),
        (["--temperature", "-1"], "`temperature=-1.0` must be 0 (greedy) or more"),
        (["--top_p", "0"], "`top_p=0.0` must be in (0, 1]"),
        (["--max_new_tokens", "0"], "`max_new_tokens=0`"),
        (["--policy", "strict"], "`policy='strict'` is unknown"),
        (["--prompt_template", "box"], "`prompt_template='box'` is unknown"),
        (["--engine", "tgi"], "`engine='tgi'` is unknown"),
        (["--model", "./nowhere"], "The model './nowhere' cannot be loaded: there is no such folder"),
        (["--compare", "nowhere.json"], "There are no results at 'nowhere.json'"),
        (["--benchmark_source", "nowhere", "--benchmarks", "aime24"], "There is no file or folder 'nowhere'"),
        (["--watch", "nowhere"], "There is no folder 'nowhere' to watch"),
        (["--benchmark", "aime24"], "There is no option 'benchmark'"),
        (["--grading_timeout", "0"], "`timeout=0.0` must be a number above 0"),
        (["--limit", "0"], "`limit=0`"),
        (["--benchmarks", ","], "There is no benchmark"),
        (["--dtype", "float61"], "`dtype='float61'` is unknown"),
        (["--tensor_parallel_size", "2", "--engine", "transformers"], "`tensor_parallel_size=2` is vLLM's"),
        (["--watch", ".", "--benchmarks", "AIM"], "`benchmark='AIM'` is unknown"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command(tmp_path / "out", *words)[1:])
    with pytest.raises(SystemExit) as caught:
        load_script("eval.py").main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("eval.py: error: ") and error.count("\n") == 1


def test_without_a_model(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit):
        load_script("eval.py").main()
    assert "There is no model. Give --model" in capsys.readouterr().err


def test_nothing_in_common_is_told_before_anything_is_sampled(whole, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"benchmarks": {"aime24": {"by_problem": {"a": 1.0}}}}))
    monkeypatch.setattr(sys, "argv", command(tmp_path / "out", "--compare", str(other))[1:])
    with pytest.raises(SystemExit):
        load_script("eval.py").main()
    assert "have scores of aime24, and of none of these: playground" in capsys.readouterr().err


def test_a_template_that_takes_no_system_message(tmp_path):
    tokenizer = ModelSource("playground").tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match="chat template does not take these messages: no system"):
        prompts_of(load_problems("playground"), tokenizer, "none", "Be brief.")
    tokenizer.chat_template = None
    (prompt, *_) = prompts_of(load_problems("playground"), tokenizer, "none", "Be brief.")
    assert tokenizer.decode(prompt) == "Be brief.\n\nMake 10"


def test_scores_of_checkpoints_are_collected_from_whatever_lies_there(whole, tmp_path):
    collect(tmp_path)  # nothing yet
    for name in ("checkpoint-5", "final", "greedy"):
        shutil.copytree(whole, tmp_path / "eval" / name)
    collect(tmp_path)  # no curves, so nobody knows the step of the final one
    scores = pd.read_parquet(tmp_path / "eval_scores.parquet")
    assert scores["step"].tolist() == [5]
    assert list(scores) == ["step", "eval/playground", "eval/playground/low", "eval/playground/high"]
    assert has_results(tmp_path / "eval" / "final", ["playground"])
    assert not has_results(tmp_path / "eval" / "final", ["playground", "aime24"])


def test_folders(tmp_path, monkeypatch):
    script = load_script("eval.py")
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    for model, folder in {
        "Qwen/Qwen2.5-0.5B": Path("out/eval/Qwen--Qwen2.5-0.5B"),
        "run": Path("run/eval"),
        "run/checkpoint-7": Path("run/eval/checkpoint-7"),
    }.items():
        assert script.folder_of(script.EvalArguments(model=model)) == folder
    assert script.folder_of(script.EvalArguments(model="run", output_dir="there")) == Path("there")
    assert script.EvalArguments(benchmarks=["aime24,amc23", "math500", "aime24"]).benchmarks == [
        "aime24",
        "amc23",
        "math500",
    ]


# ---- the six benchmarks


@needs("bench")
def test_all_six_benchmarks_go_through(long_context, tmp_path):
    out = tmp_path / "six"
    words = ["--model", str(long_context), "--benchmarks", *SIX, "--benchmark_source", str(EVAL / "bench")]
    words += ["--max_new_tokens", "6", "--k", "1", "--batch_size", "16"]
    done = run(out, *words)
    results = read_results(out)
    assert list(results["benchmarks"]) == list(SIX)
    for name, scores in results["benchmarks"].items():
        assert scores["problems"] in BENCHMARKS[name].counts and scores["avg"] < 0.1
        assert sum(scores["outcomes"].values()) == scores["problems"] == len(samples(out, name))
    assert sum(scores["problems"] for scores in results["benchmarks"].values()) == 1547
    assert (samples(out, "aime24")["tokens"] > 0).all()
    assert "OlympiadBench" in done.stdout and "mean" in done.stdout


# ---- a run that is watched


def test_a_watched_run_has_its_scores_beside_its_curves(tmp_path):
    out = tmp_path / "run"
    words = (
        "--max_steps 4 --save_steps 2 --per_device_train_batch_size 32 --num_generations 4 --eval_prompts 0".split()  # noqa: SIM905
    )
    train = [sys.executable, str(ROOT / "train.py"), *words, "--output_dir", str(out), "--disable_tqdm", "true"]
    out.mkdir()
    watching = [sys.executable, str(ROOT / "eval.py"), "--watch", str(out), *SMALL]
    watcher = subprocess.Popen(watching, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    subprocess.run(train, check=True, capture_output=True, cwd=tmp_path)
    said, _ = watcher.communicate(timeout=240)
    assert watcher.returncode == 0 and "The run has ended" in said, said
    frame = EntropyCurves.load(out).to_pandas()
    scored = frame[frame["eval/playground"].notna()]
    assert frame["step"].tolist() == [1, 2, 3, 4] and scored["step"].tolist() == [2, 4]
    for step in (2, 4):
        scores = read_results(out / "eval" / f"checkpoint-{step}")["benchmarks"]["playground"]
        assert scored.set_index("step").loc[step, "eval/playground"] == scores["avg"]
    assert (out / "eval_curves.png").stat().st_size > 10_000
    again = subprocess.run(watching, capture_output=True, text=True, cwd=tmp_path)  # nothing is done twice
    assert again.returncode == 0 and "Playground" not in again.stdout
    facts = json.loads((out / "run.json").read_text())
    assert facts["ended"] is True
    mistaken = subprocess.run([*watching, "--model", "playground"], capture_output=True, text=True, cwd=tmp_path)
    assert mistaken.returncode == 2 and "leave out --model" in mistaken.stderr


def test_grading_is_the_same_from_a_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    code = (
        "from opefo_trl.grading import Grader\n"
        "with Grader(workers=1) as grader:\n"
        "    print([str(g.outcome) for g in grader.grade(['1/2', '3', '4'], "
        "[r'\\boxed{0.5}', r'\\boxed{4}', 'none'])])"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert "['correct', 'wrong', 'no_answer']" in notebook.cells[0].outputs[0]["text"]
    with Grader(workers=1) as grader:
        grades = grader.grade(["1/2", "3", "4"], [r"\boxed{0.5}", r"\boxed{4}", "none"])
    assert [grade.outcome for grade in grades] == ["correct", "wrong", "no_answer"]
