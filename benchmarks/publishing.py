"""What pushing costs a training: the same run with a slow Hub, with a fast one, and without any.

    python benchmarks/publishing.py --json benchmarks/results/publishing.json

Each pair is two processes one after the other, in the order A B B A. The Hub is that of the tests, on loopback, in a
process of its own; the slow one takes half a second for each request and one second for each megabyte. Time is that of
`train()`, with a save every ten steps; the rest of what is on its way is not waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
HUBS = {"none": None, "fast": (0.0, None), "slow": (0.5, 1e6)}


def serve(latency: float, bandwidth: float | None) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import HubServer

    with HubServer(latency=latency, bandwidth=bandwidth) as hub:
        print(json.dumps(hub.environment(home=Path(tempfile.mkdtemp()))), flush=True)
        sys.stdin.read()


def one_run(steps: int, push: bool) -> None:
    from opefo_trl import OPEFOConfig, OPEFOTrainer
    from opefo_trl.playground import playground_dataset, playground_reward

    with tempfile.TemporaryDirectory() as out:
        args = OPEFOConfig(
            f"{out}/model", per_device_train_batch_size=256, num_generations=8, max_completion_length=12,
            learning_rate=4e-4, max_steps=steps, save_steps=10, save_total_limit=2, use_cpu=True, bf16=False,
            report_to=[], disable_tqdm=True, push_to_hub=push, hub_strategy="all_checkpoints",
        )  # fmt: skip
        trainer = OPEFOTrainer("playground", playground_reward, args, train_dataset=playground_dataset())
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        weights = sum(float(value.double().sum()) for value in trainer.model.state_dict().values())
        print(json.dumps({"seconds": seconds, "weights": weights}), flush=True)
        if trainer.publisher is not None:
            trainer.publisher.stop()


def timed(steps: int, kind: str) -> dict[str, float]:
    words = [sys.executable, __file__, "--steps", str(steps)]
    environment, server = {**os.environ, "OMP_NUM_THREADS": "1"}, None
    if HUBS[kind] is not None:
        server = subprocess.Popen(
            [*words, "--serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        environment.update(json.loads(server.stdout.readline()))
    try:
        run = subprocess.run(
            [*words, "--run", "push" if server else "plain"], capture_output=True, text=True, env=environment
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout.strip().splitlines()[-1])
    finally:
        if server is not None:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="for each Hub (default: 8)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--serve", choices=HUBS, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=("push", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(*HUBS[options.serve])
    if options.run:
        return one_run(options.steps, options.run == "push")
    found: dict[str, object] = {"steps": options.steps, "pairs": options.pairs}
    for kind in ("slow", "fast"):
        ratios, seconds, weights = [], [], set()
        for pair in range(options.pairs):
            times = {name: timed(options.steps, name) for name in (("none", kind), (kind, "none"))[pair % 2]}
            ratios.append(times[kind]["seconds"] / times["none"]["seconds"])
            seconds.append(times["none"]["seconds"])
            weights |= {run["weights"] for run in times.values()}
            print(f"{kind} {pair + 1}: {ratios[-1]:.3f}", file=sys.stderr, flush=True)
        assert len(weights) == 1, "pushing changed the run"
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        found[kind] = {"ratio": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
        found[kind] |= {"seconds": round(float(np.median(seconds)), 1)}
        print(f"{kind} Hub: {median:.3f} of the time without ({low:.3f} to {high:.3f}); the same parameters")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
