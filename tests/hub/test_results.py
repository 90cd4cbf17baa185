"""Results of eval.py on their way to a card and a repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import problems_of
from huggingface_hub import ModelCard
from material import MATERIAL

from opefo_trl.hub import NotPushedError, Target
from opefo_trl.hub.card_blocks import join
from opefo_trl.hub.results import check_target, push_results, results_target, with_results

RESULTS = json.loads((MATERIAL / "results.json").read_text())
ROOT = Path(__file__).parents[2]


def test_results_are_read_by_the_hubs_own_classes():
    text = with_results("", RESULTS, "my-model")
    assert problems_of(text) == []
    results = ModelCard(text).data.eval_results
    assert [(result.dataset_type, result.metric_name, result.metric_value) for result in results] == [
        ("math-ai/aime24", "avg@32", 12.5),
        ("math-ai/aime24", "pass@32", 40.0),
        ("playground", "avg@1", 50.0),
    ]
    args = results[0].metric_args
    assert args["k"] == 32 and args["interval_95"] == [7.0, 19.0] and args["problems"] == 30
    assert args["temperature"] == 0.6 and args["grader"] == "math-verify 0.9" and "limit" not in args
    assert "| AIME 2024 | 30 | 32 | 12.5% | 7.0 to 19.0 | 40.0% |" in text and "math-verify 0.9" in text

    mine = with_results(join({"license": "mit"}, "# Mine\n\nwords\n"), RESULTS, "m")
    assert "words" in mine and ModelCard(mine).data.license == "mit"
    assert with_results(mine, RESULTS, "m") == mine and mine.count("## Evaluation") == 1


def test_where_results_go(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    Target("alice/run", revision="try").write(run)
    assert results_target(str(run), None, None) == Target("alice/run", revision="try")
    assert results_target(str(run / "checkpoint-2"), None, True) == Target("alice/run", True, "try")
    assert results_target(str(run), "alice/other", None) == Target("alice/other")
    assert results_target("Qwen/Qwen3-0.6B", None, None) == Target("Qwen/Qwen3-0.6B")
    with pytest.raises(ValueError, match="playground.*--hub_model_id"):
        results_target("playground", None, None)


@pytest.fixture
def evaluated(tmp_path):
    folder = tmp_path / "evaluated"
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "samples" / "aime24.parquet").write_bytes(b"samples")
    return folder


@pytest.mark.slow
def test_results_of_a_run_go_into_both_cards_and_those_of_a_checkpoint_into_none(hub, run, evaluated):
    Target("alice/model").write(run)
    checkpoint = str(run / "checkpoint-2")
    push_results(results_target(checkpoint, None, None), evaluated, checkpoint)
    files = hub.files("alice/model")
    assert "eval/checkpoint-2/results.json" in files and "README.md" not in files
    hub.write("alice/model", "README.md", "---\nlicense: mit\n---\n# By hand\n")
    assert "http" in push_results(results_target(str(run), None, None), evaluated, str(run))
    files = hub.files("alice/model")
    assert files["eval/samples/aime24.parquet"] == b"samples" and "eval/results.json" in files
    pushed, local = ModelCard(files["README.md"].decode()), ModelCard((run / "README.md").read_text())
    assert len(pushed.data.eval_results) == len(local.data.eval_results) == 3
    assert pushed.data.license == "mit" and "# By hand" in pushed.text and "# model" in pushed.text


@pytest.mark.slow
def test_a_card_is_read_and_written_as_utf_8_in_any_locale(hub, run, evaluated):
    Target("alice/model").write(run)
    (run / "README.md").unlink()
    hub.write("alice/model", "README.md", "# Müller – 模型\n".encode())
    code = "import sys; from pathlib import Path; from opefo_trl.hub.results import push_results, results_target\n"
    code += "push_results(results_target(sys.argv[1], None, None), Path(sys.argv[2]), sys.argv[1])"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(run), str(evaluated)], check=True, env=plain)
    assert "# Müller – 模型" in hub.files("alice/model")["README.md"].decode()


@pytest.mark.slow
def test_a_repository_that_cannot_be_written_is_named_before_and_after_sampling(hub, run, evaluated):
    with pytest.raises(ValueError, match="bob/model.*403"):
        check_target(Target("bob/model"))
    with pytest.raises(NotPushedError, match=r"AIME 2024.*403.*without sampling"):
        push_results(Target("bob/model"), evaluated, str(run))
    hub.fault("create", status=502)
    check_target(Target("alice/model"))  # may be gone when there is something to push


# ---- the script


def evaluate(*options):
    words = ["--benchmarks", "playground", "--temperature", "1", "--max_new_tokens", "12", "--push_to_hub", *options]
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *words], capture_output=True, text=True)


@pytest.mark.slow
def test_a_script_pushes_what_it_sampled(hub, out):
    options = ["--model", "playground", "--hub_model_id", "alice/model", "--output_dir", str(out), "--k", "2"]
    done = evaluate(*options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "On the Hub: " in done.stdout
    files = hub.files("alice/model")
    for path in ("results.json", "samples/playground.parquet"):
        assert files[f"eval/{path}"] == (out / path).read_bytes()
    card = ModelCard(files["README.md"].decode())
    average = json.loads(files["eval/results.json"])["benchmarks"]["playground"]["avg"]
    assert card.data.eval_results[0].metric_value == round(100 * average, 2) and "## Evaluation" in card.text

    hub.fault("preupload", status=403, times=float("inf"))  # later, without the right to write
    refused = evaluate(*options)
    assert refused.returncode == 1 and "NOT on the Hub" in refused.stderr and "403" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "'playground'.*--hub_model_id"),
        ("--hub_model_id a/b/c", "hub_model_id.*a/b/c"),
        ("--hub_model_id a/b --watch x", "--push_to_hub"),
        ("--revision step-100", "'step-100'.*main branch.*--hub_model_id"),
    ],
)
def test_mistakes_of_the_script(hub, options, reason):
    done = evaluate("--model", "playground", *options.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(reason, done.stderr) and not hub.requests
