"""Two processes over gloo, DDP and FSDP2: lambda and gradient are those of one process; a fault stops both."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scripts import python
from tiny import relative_difference

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "runs" / "two_processes.py"
RUNS = ["batch", "live", "covariance", "exact", "running", "images", "idle", "idle_running", "additive", "held"]
# launch -> (processes, further arguments)
LAUNCHES = {"one": (1, []), "two": (2, []), "sharded": (2, ["fsdp"])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]

    def launch(name):
        processes, arguments = LAUNCHES[name]
        python(*torchrun, processes, SCRIPT, out / name, *arguments)

    with ThreadPoolExecutor() as pool:
        list(pool.map(launch, LAUNCHES))
    return out


@pytest.fixture(scope="module")
def results(runs) -> dict[str, dict]:
    return {name: json.loads((runs / name / "results.json").read_text()) for name in LAUNCHES}


def test_two_processes_run_and_shards_exist(results):
    assert [results[name]["world"] for name in LAUNCHES] == [1, 2, 2]
    assert results["two"]["model"] == "Qwen2ForCausalLM" and results["sharded"]["model"].startswith("FSDP")


SHARDED = ["batch", "exact", "idle", "idle_running", "additive", "held"]
MANY = [("two", run) for run in RUNS] + [("sharded", run) for run in SHARDED]


@pytest.mark.parametrize(("launch", "run"), MANY)
def test_flow_and_lambda_are_those_of_one_process(launch, run, results):
    one, many = dict(results["one"][run]), dict(results[launch][run])
    if run == "images":  # TRL's own micro-batches, and so TRL's own mean of the entropy
        one.pop("entropy"), many.pop("entropy")
    assert ("batching/skipped_rows" in one) == ("batching/skipped_rows" in many) == (run != "images")
    skipped = one.pop("batching/skipped_rows", 0), many.pop("batching/skipped_rows", 0)
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert many[name] == pytest.approx(value, abs=1e-6), name
    assert abs(one["flow/lambda_star"]) > 0.001
    if run in ("additive", "held"):
        assert abs(one["flow/lambda"]) > 0.01
    else:
        assert one["flow/lambda"] == (0 if "running" in run else one["flow/lambda_star"])
    # a rank of zero-advantage rows alone trains two all the same, one for each micro-batch; in "held" these are pushed
    assert skipped[0] - skipped[1] == pytest.approx(2 / 16 if "idle" in run else 0)
    assert skipped[1] >= (6 / 16 if "idle" in run or run == "held" else 0)


def test_generation_measures_the_flow_on_all_processes(results):
    for result in results.values():
        assert result["generated"] == {"confirmed": True, "reason": None, "used": True}


def test_the_report_shows_only_completions_with_tokens(results):
    """A rank that trains an empty micro-batch to keep step with the others records no samples of it."""
    lengths = [length for run in results["two"]["sampled"].values() for length in run]
    assert len(lengths) > 10 and min(lengths) > 0


@pytest.mark.parametrize(("launch", "run"), MANY)
def test_the_gradient_is_that_of_one_process(launch, run, runs):
    one, many = (torch.load(runs / name / f"{run}.pt") for name in ("one", launch))
    assert relative_difference(many, one) < 1e-5


@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_a_nan_on_one_rank_stops_both_and_names_it(launch, results, runs):
    for rank, (message, unchanged) in enumerate(results[launch]["loss"]):
        assert message.startswith("NonFiniteError: ") and "Step 1" in message and "rank 1" in message
        assert (str(runs / launch / "nonfinite") in message) == (rank == 1)  # only this rank has rows to show
        assert unchanged
    assert [path.name for path in (runs / launch / "nonfinite").iterdir() if "rank-0" in path.name] == []


@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_a_nan_on_one_rank_is_skipped_on_both(launch, results):
    assert results[launch]["skip"] == [["skipped 1", True], ["skipped 1", True]]


def test_an_infinite_reward_on_one_rank_stops_both(results):
    for rank, (message, unchanged) in enumerate(results["two"]["reward"]):
        assert "'last_rank_is_infinite'" in message and "completion 2 of rank 1" in message
        assert ("of rank 1: '" in message) == (rank == 1)  # only this rank has the text to show
        assert unchanged
