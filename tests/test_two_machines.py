"""multi_node.yaml on two machines that are both this one, with a rank each, over gloo instead of DeepSpeed."""

import random
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from scripts import ROOT

from opefo_trl.cli.run_folder import newest_checkpoint, step_of
from opefo_trl.curves import EntropyCurves

pytestmark = pytest.mark.slow
SMALL = """
    --per_device_train_batch_size 16 --num_generations 4 --eval_prompts 0 --save_steps 2 --logging_steps 1
    --disable_tqdm true --output_dir out
""".split()  # noqa: SIM905


def free_port() -> int:
    """Return a free port below those that the system gives out: it stays free until the launchers have started."""
    while True:
        try:
            with socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as probe:
                return probe.getsockname()[1]
        except OSError:
            continue


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a run on both machines; end what is left of them."""
    recipe = yaml.safe_load((ROOT / "configs" / "accelerate" / "multi_node.yaml").read_text())
    recipe.pop("deepspeed_config")
    recipe |= {"distributed_type": "MULTI_GPU", "use_cpu": True, "mixed_precision": "no", "num_processes": 2}
    (tmp_path / "machine.yaml").write_text(yaml.safe_dump(recipe))
    port = free_port()
    command = [sys.executable, "-m", "opefo_trl.cli.commands", "train", "--accelerate_config", "machine.yaml"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), *SMALL]
    started = []

    def run(*words: str) -> list[subprocess.Popen]:
        for rank in "01":
            log = (tmp_path / f"{rank}.log").open("w")
            machine = [*command, "--machine_rank", rank, *words]
            started.append(subprocess.Popen(machine, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path))
        return started[-2:]

    yield run
    for machine in started:
        if machine.poll() is None:
            for process in (*psutil.Process(machine.pid).children(recursive=True), machine):
                process.kill()


def test_a_killed_rank_ends_both_machines_and_the_run_resumes(start, tmp_path):
    out = tmp_path / "out"
    machines = start("--max_steps", "1000")
    while newest_checkpoint(out) is None:
        assert [machine.poll() for machine in machines] == [None, None], (tmp_path / "0.log").read_text()[-2000:]
        time.sleep(0.05)
    (rank,) = psutil.Process(machines[1].pid).children()
    rank.kill()
    assert [machine.wait(timeout=60) for machine in machines] == [1, 137]
    logs = [(tmp_path / f"{rank}.log").read_text().splitlines()[-1] for rank in "01"]
    assert "Rank 0 ended with status 1" in logs[0] and "another machine's rank" in logs[0]
    assert "Rank 1 was killed by SIGKILL" in logs[1] and all("same command resumes" in line for line in logs)

    begun = newest_checkpoint(out)
    steps = step_of(begun) + 2
    machines = start("--max_steps", str(steps))
    assert [machine.wait(timeout=120) for machine in machines] == [0, 0]
    assert f"Resuming from out/{begun.name}" in (tmp_path / "0.log").read_text()
    assert EntropyCurves.load(out).to_pandas()["step"].tolist() == list(range(1, steps + 1))
