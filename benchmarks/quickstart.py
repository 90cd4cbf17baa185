"""The result of the quickstart over seeds: plain GRPO and OPEFO, by `python train.py` itself.

    python benchmarks/quickstart.py            # ten seeds, half an hour on two cores: `make quickstart-seeds`

Each run is a process of its own with one thread; as many run at a time as there are cores. The table describes the end
of the runs: reward and entropy are means of the last ten steps, distinct right answers are counted among 64 samples
for each of 36 held-out questions. Writes benchmarks/results/quickstart.json and docs/images/quickstart.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comparison.statistics import longest_run, track

from opefo_trl.cli.progress import EDGE
from opefo_trl.curves import EntropyCurves
from opefo_trl.curves.plot import Picture, curve, finish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"
FIGURE = ROOT / "docs" / "images" / "quickstart.png"
CONTROLS = {"none": "GRPO", "opefo": "OPEFO, flow_target 0.5"}
COLORS = {"none": "#8a8a8a", "opefo": "#2166ac"}
MEASURES = {
    "reward": "reward",
    "entropy": "entropy, nats",
    "held_out_reward": "held-out reward",
    "held_out_distinct": "distinct right answers of 64",
    "seconds": "seconds",
}


def train(control: str, seed: int, folder: Path, more: list[str]) -> Path:
    """Run train.py, with its output in a log, and return its output folder."""
    out = folder / f"{control}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # or train.py would resume the run in it
    command = [sys.executable, str(ROOT / "train.py"), "--control", control, "--seed", str(seed), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder / f"{control}-{seed}.log"
    with log.open("w") as file:
        subprocess.run([*command, "--output_dir", str(out)], check=True, env=environment, stdout=file, stderr=file)
    print(f"{control}, seed {seed}: done", flush=True)
    return out


def measure(out: Path) -> dict[str, float]:
    frame = EntropyCurves.load(out).to_pandas()
    held_out = json.loads((out / "eval_results.json").read_text())
    held = {}
    if "flow/target" in frame:
        held["furthest"] = track(frame["entropy"], frame["flow/target"]).furthest
        held["at_bound"] = longest_run(frame["flow/bounded"])
    return {
        "reward": frame["reward"].tail(EDGE).mean(),
        "entropy": frame["entropy"].tail(EDGE).mean(),
        "held_out_reward": held_out["eval_reward"],
        "held_out_distinct": held_out["eval_answers/distinct"],
        "seconds": frame["time"].iloc[-1] - frame["time"].iloc[0],
        **held,
    }


def draw(folder: Path, seeds: list[int]) -> None:
    figure = Picture(figsize=(10.0, 3.1), layout="constrained")
    panels = {
        "entropy": ("Entropy of the policy", "nats per token"),
        "answers/distinct": ("Distinct right answers", "of 8 per question"),
        "reward": ("Reward", "share that is right"),
    }
    for axes, (column, (title, unit)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for control, label in CONTROLS.items():
            for seed in seeds:
                frame = EntropyCurves.load(folder / f"{control}-{seed}").to_pandas()
                curve(axes, frame, column, 10, COLORS[control], label if seed == seeds[0] else None)
        finish(axes, title, unit, floor=0, legend=False)
        axes.set_xlabel("optimizer step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a table of medians and ranges over the seeds."""
    lines = [f"| | {' | '.join(MEASURES.values())} |", "|---" * (len(MEASURES) + 1) + "|"]
    for control, label in CONTROLS.items():
        cells = []
        for name in MEASURES:
            values = [result[name] for result in results[control].values()]
            digits = 0 if name == "seconds" else 2
            low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
            cells.append(f"{middle} ({low} to {high})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "compare")
    options, more = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(control, seed) for seed in options.seeds for control in CONTROLS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: train(*job, options.folder, more), jobs))
    results = {
        control: {str(seed): measure(options.folder / f"{control}-{seed}") for seed in options.seeds}
        for control in CONTROLS
    }
    print(f"\nMedian (range) over seeds {', '.join(map(str, options.seeds))}:\n\n{table(results)}\n")
    for seed in map(str, options.seeds):
        plain, ours = results["none"][seed], results["opefo"][seed]
        ratio = ours["held_out_distinct"] / plain["held_out_distinct"]
        more_entropy = ours["entropy"] - plain["entropy"]
        print(f"seed {seed}: {ratio:.1f} times the distinct answers, {more_entropy:+.2f} nats", end="; ")
        print(f"reward {ours['reward']:.2f} (GRPO {plain['reward']:.2f})", end="; ")
        if "furthest" in ours:  # other arguments may have taken the target away
            print(f"within {ours['furthest']:.3f} nats from the landing on", end="; ")
        print(f"{ours.get('at_bound', 0)} steps in a row with lambda at its bound")
    slower = [ours["seconds"] / results["none"][seed]["seconds"] for seed, ours in results["opefo"].items()]
    print(f"OPEFO takes {statistics.median(slower):.2f} times as long ({min(slower):.2f} to {max(slower):.2f})")
    if not more:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        draw(options.folder, options.seeds)
        print(f"Wrote {RESULTS.relative_to(ROOT)} and {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
