"""Exact micro-batching in whole runs: the same learning curve as with TRL's micro-batches, in less time.

    python benchmarks/whole_loop.py            # about ten minutes

Trains the playground for 100 steps of four micro-batches, generation and rewards included, with `exact` and with `trl`
micro-batching, and a third time with `trl` in eight micro-batches of half the size. The gradients of all three are
equal up to rounding, until rounding flips the first sampled token. From then on the curves drift apart; the distance
between the two `trl` runs is the yardstick for `exact`. One process at a time, with one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from quickstart import ROOT, train

from opefo_trl.curves import EntropyCurves

RESULTS = ROOT / "benchmarks" / "results" / "whole_loop.json"


def arguments(micro_batching: str, micro_batches: int) -> list[str]:
    sizes = {"per_device_train_batch_size": 256 // micro_batches, "gradient_accumulation_steps": micro_batches}
    return [f"--{name}={value}" for name, value in {"micro_batching": micro_batching, **sizes}.items()]


RUNS = {"trl": arguments("trl", 4), "exact": arguments("exact", 4), "halves": arguments("trl", 8)}
SMOOTH = 10  # steps


def compare(theirs: EntropyCurves, ours: EntropyCurves) -> dict[str, float]:
    """Return the number of equal first steps, the largest distances of the smoothed curves, and the speed-up."""
    a, b = theirs.to_pandas(), ours.to_pandas()
    differs = (a["reward"] - b["reward"]).abs() > 1e-6
    smooth = [frame[["reward", "entropy"]].rolling(SMOOTH).mean() for frame in (a, b)]
    apart = (smooth[0] - smooth[1]).abs().max()
    return {
        "equal": int(differs.argmax()) if differs.any() else len(a),
        "reward": float(apart["reward"]),
        "entropy": float(apart["entropy"]),
        "faster": seconds(theirs) / seconds(ours),
    }


def seconds(curves: EntropyCurves) -> float:
    """Return the median time of a step, generation and rewards included."""
    return float(curves.to_pandas()["time"].diff().median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "whole_loop")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {"exact": {}, "halves": {}}
    for seed in options.seeds:
        curves = {}
        for name, settings in RUNS.items():
            folder = options.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            fixed = ["--max_steps", str(options.steps), "--eval_prompts", "0", "--save_strategy", "no"]
            curves[name] = EntropyCurves.load(train("opefo", seed, folder, [*settings, *fixed]))
        for name, of_seed in results.items():
            of_seed[str(seed)] = compare(curves["trl"], curves[name])
    print(f"\n{options.steps} steps beside `micro_batching: trl` in 4 micro-batches, seeds {options.seeds}:\n")
    print(f"{'':28} {'first steps equal':>18} {'reward apart':>13} {'entropy apart':>14} {'times faster':>13}")
    for name, label in {"exact": "exact, 4 micro-batches", "halves": "trl, 8 micro-batches"}.items():
        rows = results[name].values()
        equal, *numbers = ([row[key] for row in rows] for key in ("equal", "reward", "entropy", "faster"))
        reward, entropy, faster = (f"{statistics.median(values):.3f}" for values in numbers)
        print(f"{label:28} {' '.join(map(str, equal)):>18} {reward:>13} {entropy:>14} {faster:>13}")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
