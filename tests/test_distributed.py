"""Two real processes over gloo: the same lambda and gradient as one, and a fault on one rank stops both."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "runs" / "two_processes.py"
RUNS = ["batch", "live", "covariance", "running"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    launches = []
    for processes in (1, 2):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(SCRIPT)]
        launches.append(
            subprocess.Popen(
                [sys.executable, *command, str(out / str(processes))],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for launch in launches:
        _, errors = launch.communicate(timeout=250)
        assert launch.returncode == 0, errors[-4000:]
    return out


@pytest.fixture(scope="module")
def results(runs) -> dict[int, dict]:
    return {processes: json.loads((runs / str(processes) / "results.json").read_text()) for processes in (1, 2)}


def test_there_really_are_two_processes(results):
    assert (results[1]["world"], results[2]["world"]) == (1, 2)


@pytest.mark.parametrize("run", RUNS)
def test_flow_and_lambda_are_those_of_one_process(run, results):
    one, two = results[1][run], results[2][run]
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-6), name
    assert abs(one["flow/lambda_star"]) > 0.001
    assert one["flow/lambda"] == (0 if run == "running" else one["flow/lambda_star"])


@pytest.mark.parametrize("run", RUNS)
def test_the_gradient_is_that_of_one_process(run, runs):
    one, two = (torch.load(runs / str(processes) / f"{run}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    apart = sum((one[name] - two[name]).double().square().sum() for name in one)
    size = sum(one[name].double().square().sum() for name in one)
    assert math.sqrt(apart / size) < 1e-5


def test_a_nan_on_one_rank_stops_both_and_names_it(results, runs):
    for rank, (message, still) in enumerate(results[2]["loss"]):
        assert message.startswith("NonFiniteError: Step 1: not finite on rank 1.")
        assert "No parameter was updated." in message
        assert ("the rows are in" in message) == (rank == 1)
        assert still
    assert [path.name for path in (runs / "2" / "nonfinite").iterdir() if "rank-0" in path.name] == []


def test_a_nan_on_one_rank_is_skipped_on_both(results):
    assert results[2]["skip"] == [["skipped 1", True], ["skipped 1", True]]


def test_an_infinite_reward_on_one_rank_stops_both(results):
    (first, first_still), (second, second_still) = results[2]["reward"]
    fault = "reward function 'last_rank_is_infinite' returned NaN or infinity for completion 2 of rank 1"
    assert f"{fault}. No parameter" in first and f"{fault}: '" in second
    assert first_still and second_still
