"""Two real processes over gloo, by DDP and by FSDP2: lambda and gradient of one, and a fault on one stops both."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "runs" / "two_processes.py"
RUNS = ["batch", "live", "covariance", "exact", "running", "images", "idle", "idle_running"]
# launch -> (processes, further arguments)
LAUNCHES = {"one": (1, []), "two": (2, []), "sharded": (2, ["fsdp"])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    launches = []
    for name, (processes, arguments) in LAUNCHES.items():
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(SCRIPT)]
        launches.append(
            subprocess.Popen(
                [sys.executable, *command, str(out / name), *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for launch in launches:
        _, errors = launch.communicate(timeout=280)
        assert launch.returncode == 0, errors[-4000:]
    return out


@pytest.fixture(scope="module")
def results(runs) -> dict[str, dict]:
    return {name: json.loads((runs / name / "results.json").read_text()) for name in LAUNCHES}


def test_there_really_are_two_processes_and_shards(results):
    assert [results[name]["world"] for name in LAUNCHES] == [1, 2, 2]
    assert results["two"]["model"] == "Qwen2ForCausalLM" and results["sharded"]["model"].startswith("FSDP")


SHARDED = ["batch", "exact", "idle", "idle_running"]
MANY = [("two", run) for run in RUNS] + [("sharded", run) for run in SHARDED]


@pytest.mark.parametrize(("launch", "run"), MANY)
def test_flow_and_lambda_are_those_of_one_process(launch, run, results):
    one, many = dict(results["one"][run]), dict(results[launch][run])
    if run == "images":  # TRL's micro-batches and TRL's metrics, wherever the images are
        one.pop("entropy"), many.pop("entropy")
    assert ("batching/skipped_rows" in one) == ("batching/skipped_rows" in many) == (run != "images")
    skipped = one.pop("batching/skipped_rows", 0), many.pop("batching/skipped_rows", 0)
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert many[name] == pytest.approx(value, abs=1e-6), name
    assert abs(one["flow/lambda_star"]) > 0.001
    assert one["flow/lambda"] == (0 if "running" in run else one["flow/lambda_star"])
    # A rank without a signal trains two rows all the same, one for each micro-batch
    assert skipped[0] - skipped[1] == pytest.approx(2 / 16 if "idle" in run else 0)
    assert skipped[1] >= (6 / 16 if "idle" in run else 0)


def test_the_report_shows_real_completions_alone(results):
    """A rank that measures nothing, to keep step with one that does, has none to show of it."""
    lengths = [length for run in results["two"]["sampled"].values() for length in run]
    assert len(lengths) > 10 and min(lengths) > 0


@pytest.mark.parametrize(("launch", "run"), MANY)
def test_the_gradient_is_that_of_one_process(launch, run, runs):
    one, many = (torch.load(runs / name / f"{run}.pt") for name in ("one", launch))
    assert one.keys() == many.keys()
    apart = sum((one[name] - many[name]).double().square().sum() for name in one)
    size = sum(one[name].double().square().sum() for name in one)
    assert math.sqrt(apart / size) < 1e-5


@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_a_nan_on_one_rank_stops_both_and_names_it(launch, results, runs):
    for rank, (message, still) in enumerate(results[launch]["loss"]):
        assert message.startswith("NonFiniteError: Step 1: not finite on rank 1.")
        assert "No parameter was updated." in message
        assert ("the rows are in" in message) == (rank == 1)
        assert still
    assert [path.name for path in (runs / launch / "nonfinite").iterdir() if "rank-0" in path.name] == []


@pytest.mark.parametrize("launch", ["two", "sharded"])
def test_a_nan_on_one_rank_is_skipped_on_both(launch, results):
    assert results[launch]["skip"] == [["skipped 1", True], ["skipped 1", True]]


def test_an_infinite_reward_on_one_rank_stops_both(results):
    (first, first_still), (second, second_still) = results["two"]["reward"]
    fault = "reward function 'last_rank_is_infinite' returned NaN or infinity for completion 2 of rank 1"
    assert f"{fault}. No parameter" in first and f"{fault}: '" in second
    assert first_still and second_still
