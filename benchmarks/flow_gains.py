"""How far do flows move entropy? A least-squares fit to runs with a target, beside what the controller believed.

    python benchmarks/flow_gains.py benchmarks/results/words_cpu.jsonl --setting opefo
    python benchmarks/flow_gains.py out/quickstart

A run is an output folder, or in the results of benchmarks/smollm2.py. Its log has every number that the controller was
given but one, the flow of the push, and that follows from the lambda it led to. So the controller runs again on the
log. Its estimates of entropy are those that were logged, except after a step whose lambda was cut: a large gap says
that the log is of another version, which wanted another flow. The fit is

    entropy = first + sum over the updates (g_n u_n + g_c u_c) + scatter

on the first sixty steps from the landing on, with u_n and u_c as in `opefo_trl.controls.tracker`. Prints a line a run.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from comparison.statistics import landing
from smollm2_tables import read

from opefo_trl.controls.tracker import EntropyTracker
from opefo_trl.curves import EntropyCurves

MOMENTUM = 0.9  # Adam's first beta in the recipes
STEPS = 60


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="output folders, or results of benchmarks/smollm2.py")
    parser.add_argument("--setting", help="in results, one with a `flow_target`")
    options = parser.parse_args(arguments)
    for path in options.paths:
        for name, frame in runs_of(path, options.setting):
            print(f"{name}: {described(frame)}")


def runs_of(path: Path, setting: str | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the runs of a path, each with its curves."""
    if path.is_dir():
        yield path.name, EntropyCurves.load(path).to_pandas()
        return
    if setting is None:
        raise SystemExit(f"{path} has several settings: name one with --setting.")
    for seed, run in read(path, [setting])[setting].items():
        yield f"{setting}, seed {seed}", run["frame"]


def described(frame: pd.DataFrame) -> str:
    target = frame["flow/target"].iloc[-1]
    lands = landing(frame["entropy"], target)
    if math.isinf(lands):
        return "never reaches its target"
    flows, believed, gap = run_again(frame, target)
    lands = int(lands) - 1  # index of the step
    held = slice(lands, lands + STEPS)
    (natural, pushed), (natural_error, pushed_error) = fit(frame["entropy"].to_numpy()[held], flows[held])
    end = min(lands + STEPS, len(frame)) - 1
    return (
        f"in steps {lands + 1} to {end + 1} rewards {natural:.2f} ± {natural_error:.2f}, push {pushed:.2f} ± "
        f"{pushed_error:.2f} nats for a unit of flow; the controller at the first {believed[lands][0]:.2f} and "
        f"{believed[lands][1]:.2f}, at the last {believed[end][0]:.2f} and {believed[end][1]:.2f}; its estimates "
        f"differ from the log by {gap:.3f} nats at most"
    )


def run_again(frame: pd.DataFrame, target: float) -> tuple[np.ndarray, list[tuple[float, float]], float]:
    """Return u_n and u_c of each update and the gains believed, both for the largest learning rate, and the widest gap
    to the logged estimates. Where lambda was cut, the flow of lambda = 1 is taken to be its median so far."""
    law, peak, reaches, flows, gains, gap = EntropyTracker(), frame["learning_rate"].max(), [], [], [], 0.0
    for row in frame.to_dict("records"):
        rate, natural, lam = row["learning_rate"], row["flow/net"], row["flow/lambda"]
        law.measure(row["entropy"])
        gap = max(gap, abs(law.entropy - row["flow/estimate"]))
        wanted = law.aim(natural, target, 0.0, rate, MOMENTUM)
        pushed = 0.0
        if lam and wanted is not None:
            if not row["flow/bounded"] and wanted / lam > 0:
                reaches.append(wanted / lam)
            pushed = lam * (statistics.median(reaches) if row["flow/bounded"] and reaches else wanted / lam)
        law.record_update(natural, pushed, rate, MOMENTUM)
        flows.append(law._moved[:2])
        gains.append(tuple(peak * gain for gain in law._gains()))
    return np.array(flows) / peak, gains, gap


def fit(entropy: np.ndarray, flows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both gains and their standard errors."""
    moved = np.vstack([np.zeros(2), np.cumsum(flows[:-1], axis=0)])
    columns = np.column_stack([moved, np.ones(len(entropy))])
    solution = np.linalg.lstsq(columns, entropy, rcond=None)[0]
    scatter = entropy - columns @ solution
    variance = scatter @ scatter / (len(entropy) - 3)
    return solution[:2], np.sqrt(variance * np.diag(np.linalg.inv(columns.T @ columns)))[:2]


if __name__ == "__main__":
    main()
