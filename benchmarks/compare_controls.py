"""Which entropy control helps? All of them on one task, side by side, over seeds.

    make compare                                             # four settings, two seeds: about six minutes on two cores
    python benchmarks/compare_controls.py --group controls   # every control, three seeds
    python benchmarks/compare_controls.py --group tracking   # targets, and step sizes of the adaptive bonus
    python benchmarks/compare_controls.py --settings none clip_cov "opefo, target" -- --learning_rate 3e-4

Each run is a process of its own (`train.py` on configs/quickstart.yaml, or on another `--config`) with one thread; as
many run at a time as there are cores. The same command resumes interrupted runs and leaves finished ones as they are.
Arguments after `--` are passed to train.py.

Settings that need several updates per rollout get four, with twice the optimizer steps, which is half the rollouts;
`none` is there in both ways. Methods with a target entropy get `--target`. On the playground each trained model then
answers 18 held-out questions 64 times, with the sampler and the grader of eval.py:

    avg@16      share of right answers
    pass@16     questions with a right answer among 16 samples, unbiased estimate from 64
    end         mean of the last ten optimizer steps; the least is the least mean of ten steps
    distinct    distinct right answers of 64, mean over the questions
    off target  root mean square distance to a target entropy, in nats, from where it is first reached
    calibration expected calibration error: |share right - confidence| over ten bins of the confidence, which is the
                geometric mean of the probabilities of a completion's tokens
    step time   relative to `none`, at the fastest tenth of the steps, since the others may have waited for other
                processes. It depends on the length of the completions; `benchmarks/overhead.py --controls` measures
                the control alone

The committed tables were sampled with one random state for all questions; now each question has a seed of its own. A
repetition therefore agrees with their held-out columns within sampling noise, not to the digit.

Writes controls.md (the table), controls.parquet (a row per run), curves.parquet (a row per step), and two figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch
import yaml
from transformers.utils.logging import disable_progress_bar

from opefo_trl.cli.progress import EDGE
from opefo_trl.curves import EntropyCurves
from opefo_trl.curves.plot import RUNS, Picture, curve, finish
from opefo_trl.evaluation.engines import Decoding, ModelSource, Transformers
from opefo_trl.evaluation.metrics import avg_at_k, calibration_error, pass_at_k
from opefo_trl.evaluation.samples import TaskGrader
from opefo_trl.files import write_whole
from opefo_trl.grading import Outcome
from opefo_trl.playground import PLAYGROUND, TASKS, playground_dataset

ROOT = Path(__file__).parents[1]
SAMPLES, K = 64, 16
LONGEST = 12  # tokens of an answer
# Settings with a target that are compared with the other controls too
COMPARED = (
    "none",
    "none, 4 updates",
    "opefo, target",
    "opefo, target, sign",
    "opefo, target, 4 updates",
    "adaptive_entropy, step 0.005",
)


@dataclass(frozen=True)
class Setting:
    """A control with its options, other fields of the configuration, and the number of updates per rollout."""

    control: str
    kwargs: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    updates: int = 1

    def arguments(self, options: argparse.Namespace) -> list[str]:
        """Return the setting as arguments of train.py."""
        fields: dict = {
            "flow_target": "none",
            **self.fields,
            "max_steps": options.steps * (1 if self.updates == 1 else 2),
        }
        if self.updates > 1:
            fields |= {"strict_on_policy": "false", **several(self.updates, options)}
        words = ["--control", self.control, "--control_kwargs", json.dumps(self.kwargs)]
        return [*words, *(part for name, value in fields.items() for part in (f"--{name}", str(value)))]


def several(updates: int, options: argparse.Namespace) -> dict[str, int]:
    """Return the fields that train on the same rollout in several updates."""
    config = yaml.safe_load(options.config.read_text())
    passed = dict(zip(options.more[::2], options.more[1::2], strict=False))
    rows, micro_batches = (
        int(passed.get(f"--{name}", config.get(name, default)))
        for name, default in {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}.items()
    )
    if micro_batches % updates == 0:
        return {"steps_per_generation": micro_batches, "gradient_accumulation_steps": micro_batches // updates}
    if micro_batches == 1 and rows % updates == 0:
        return {"steps_per_generation": updates, "per_device_train_batch_size": rows // updates}
    raise SystemExit(
        f"A rollout of {micro_batches} micro-batches of {rows} rows cannot be trained on in {updates} updates. Use a "
        f"multiple of {updates} micro-batches, or one micro-batch with a multiple of {updates} rows."
    )


def settings(target: float) -> dict[str, Setting]:
    """Return all settings by name."""
    held = {"flow_target": target}
    constant = {"lr_scheduler_type": "constant_with_warmup"}  # a learning rate near 0 could not follow a target
    off = {"updates": 4}
    return {
        "none": Setting("none"),
        "opefo": Setting("opefo"),
        "opefo, literal": Setting("opefo", fields={"flow_lambda_max": 1.0}),
        "opefo, target": Setting("opefo", fields=held),
        "opefo, target, sign": Setting("opefo", fields={**held, "flow_shape": "sign"}),
        **{
            f"opefo, target, {estimator}": Setting("opefo", fields={**held, "flow_estimator": estimator})
            for estimator in ("exact", "expected")
        },
        **{
            f"opefo, target, {schedule}": Setting("opefo", fields={**held, **constant, "flow_schedule": schedule})
            for schedule in ("increase_decrease", "decrease_increase_decrease", "oscillating")
        },
        "steer": Setting("steer"),
        "clip_cov": Setting("clip_cov"),
        "covariance_kernel": Setting("covariance_kernel"),
        "positive_advantage": Setting("positive_advantage", {"target": target}),
        "positive_advantage, stage": Setting("positive_advantage", {"schedule": "stage"}),
        "random_positive_clip": Setting("random_positive_clip"),
        "advantage_sign, positive": Setting("advantage_sign", {"keep": "positive"}),
        "advantage_sign, negative": Setting("advantage_sign", {"keep": "negative"}),
        "negative_reinforcement": Setting("negative_reinforcement"),
        "entropy_bonus": Setting("entropy_bonus", {"coef": 0.01}),
        **{
            f"adaptive_entropy, step {step:g}": Setting("adaptive_entropy", {"target": target, "step": step})
            for step in (0.001, 0.005, 0.01, 0.02, 0.05)  # 0.005 is TRL's
        },
        "aer": Setting("aer", {"target": target}),
        "entropy_advantage": Setting("entropy_advantage"),
        "high_entropy_tokens": Setting("high_entropy_tokens"),
        "stare": Setting("stare", {"target": target}),
        "repo": Setting("repo"),
        "entropy_dynamics": Setting("entropy_dynamics"),
        "entropy_dynamics, vocabulary": Setting("entropy_dynamics", {"variant": "vocabulary"}),
        "none, 4 updates": Setting("none", **off),
        "opefo, target, 4 updates": Setting("opefo", fields=held, **off),
        "kl_cov, 4 updates": Setting("kl_cov", **off),
        "clip_higher, 4 updates": Setting("clip_higher", **off),
        "clip_low, 4 updates": Setting("clip_low", **off),
        "dynamic_clip, 4 updates": Setting("dynamic_clip", **off),
        "ce_gppo, 4 updates": Setting("ce_gppo", **off),
        "bapo, 4 updates": Setting("bapo", **off),
        "dcpo, 4 updates": Setting("dcpo", **off),
    }


def groups(by_name: dict[str, Setting]) -> dict[str, list[str]]:
    """Return the names of the settings in each `--group`."""
    tracking = [name for name in by_name if name.startswith(("opefo, target", "adaptive_entropy", "none"))]
    return {
        "reduced": ["none", "opefo, target", "opefo, target, sign", "adaptive_entropy, step 0.005"],
        "tracking": [name for name in tracking if "updates" not in name],
        "controls": [name for name in by_name if name not in tracking or name in COMPARED],
        "all": list(by_name),
    }


MEASURES = {
    "entropy": "end entropy",
    "entropy_min": "least",
    "entropy_mean": "mean",
    "reward": "reward",
    "avg16": "avg@16",
    "pass16": "pass@16",
    "distinct": "distinct of 64",
    "calibration": "calibration error",
    "off": "off target",
    "step": "step time",
}


def main() -> None:
    options = parse()
    by_name = settings(options.target)
    names = options.settings or groups(by_name)[options.group]
    for name in names:
        if name not in by_name:
            raise SystemExit(f"The setting {name!r} is unknown. Choose of: {', '.join(map(repr, by_name))}.")
    jobs = [(name, seed) for seed in options.seeds for name in names]
    progress = Progress(len(jobs))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: progress.report(job, train(*job, by_name[job[0]], options)), jobs))
    rows = pd.DataFrame([measure(name, seed, options) for name, seed in jobs])
    write(rows, names, options)


def parse() -> argparse.Namespace:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", default="reduced", choices=["reduced", "controls", "tracking", "all"])
    parser.add_argument("--settings", nargs="+", help="names of settings, in place of a group")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.4, help="nats, for methods with a target entropy")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "controls")
    options = parser.parse_args(sys.argv[1:end])
    options.more = sys.argv[end + 1 :]
    return options


class Progress:
    """Prints a line for every run that ends: how many have, and how long the others will take."""

    def __init__(self, total: int):
        self.total, self.done, self.trained, self.begun = total, 0, 0, time.monotonic()
        self.lock = threading.Lock()

    def report(self, job: tuple[str, int], trained: bool) -> None:
        with self.lock:
            self.done += 1
            self.trained += trained
            elapsed = time.monotonic() - self.begun
            rest = elapsed / max(1, self.trained) * (self.total - self.done) / 60
            state = "done" if trained else "was done"
            print(f"[{self.done:3}/{self.total}] {job[0]}, seed {job[1]}: {state}; {rest:.0f} min to go", flush=True)


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    return options.folder / name.replace(", ", "-").replace(" ", "-") / str(seed)


def train(name: str, seed: int, setting: Setting, options: argparse.Namespace) -> bool:
    """Train and evaluate a setting, unless that has been done. Return whether there was anything left to do."""
    out = folder_of(name, seed, options)
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(options.config), "--seed", str(seed)]
    command += ["--eval_prompts", "0", "--save_total_limit", "1", "--output_dir", str(out)]
    command += [*options.more, *setting.arguments(options)]
    check_same(out, [*command[2:], options.config.read_text()])
    if (out / "held_out.json").exists():
        return False
    with out.with_suffix(".log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{name}, seed {seed}, ended with {code}: see {out.with_suffix('.log')}")
    scores = json.dumps(held_out(out))
    write_whole(out / "held_out.json", lambda part: part.write_text(scores))
    return True


def check_same(out: Path, command: list[str]) -> None:
    """Refuse to resume, or to count as done, a run that was started with another command."""
    path = out.with_suffix(".json")
    if path.exists() and json.loads(path.read_text()) != command:
        raise SystemExit(
            f"{out} was run with other settings ({path} has them). Choose another --folder, or delete it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(command))


def held_out(out: Path) -> dict[str, float]:
    """Return the scores on the held-out questions of the playground; nothing for another task."""
    if "playground" not in (out / "run.json").read_text():
        return {}
    disable_progress_bar()
    torch.set_num_threads(1)
    source = ModelSource(str(out))
    tokenizer, grader = source.tokenizer(), TaskGrader(TASKS[PLAYGROUND])
    engine = Transformers(source, Decoding(temperature=1.0, top_p=1.0, max_new_tokens=LONGEST), tokenizer)
    right, confidence, distinct = [], [], []
    for seed, row in enumerate(playground_dataset("test")):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        samples = engine.sample([prompt] * SAMPLES, [seed] * SAMPLES, [LONGEST] * SAMPLES)
        grades = grader.grade([row["target"]] * SAMPLES, [sample.text for sample in samples])
        right.append([grade.outcome == Outcome.CORRECT for grade in grades])
        confidence.append([math.exp(sample.logp / sample.tokens) for sample in samples])
        distinct.append(len({grade.answer for grade in grades if grade.outcome == Outcome.CORRECT}))
    return {
        "avg16": avg_at_k(right),
        "pass16": pass_at_k(right, K),
        "distinct": sum(distinct) / len(distinct),
        "calibration": calibration_error(np.ravel(confidence), np.ravel(right)),
    }


def measure(name: str, seed: int, options: argparse.Namespace) -> dict:
    out, setting = folder_of(name, seed, options), settings(options.target)[name]
    frame, updates = EntropyCurves.load(out).to_pandas(), setting.updates
    return {
        "setting": name,
        "seed": seed,
        "entropy": frame["entropy"].tail(EDGE).mean(),
        "entropy_min": frame["entropy"].rolling(EDGE).mean().min(),
        "entropy_mean": frame["entropy"].mean(),
        "reward": frame["reward"].tail(EDGE).mean(),
        "seconds": frame["time"].diff().rolling(updates, min_periods=1).mean().quantile(0.1),  # over whole rollouts
        "off": off_target(frame, setting, options.target),
        **json.loads((out / "held_out.json").read_text()),
    }


def off_target(frame: pd.DataFrame, setting: Setting, target: float) -> float:
    """Return the root mean square distance, in nats, from where entropy first reaches its target; NaN without one."""
    if "flow/target" in frame:
        wanted = frame["flow/target"]
    elif "target" in setting.kwargs:
        wanted = pd.Series(target, frame.index)
    else:
        return math.nan
    reached = (frame["entropy"] <= wanted).cummax()
    return math.sqrt((frame["entropy"] - wanted)[reached].pow(2).mean()) if reached.any() else math.nan


def write(rows: pd.DataFrame, names: list[str], options: argparse.Namespace) -> None:
    plain = rows["setting"].map(lambda name: "none, 4 updates" if "4 updates" in name else "none")
    base = rows[rows["setting"].isin(plain)].groupby("setting")["seconds"].median()
    rows["step"] = rows["seconds"] / plain.map(base)
    curves = [
        EntropyCurves.load(folder_of(name, seed, options)).to_pandas().assign(setting=name, seed=seed)
        for name in names
        for seed in options.seeds
    ]
    rows.to_parquet(options.folder / "controls.parquet")
    pd.concat(curves).to_parquet(options.folder / "curves.parquet")
    command = " ".join(["python benchmarks/compare_controls.py", *map(shlex.quote, sys.argv[1:])])
    seeds = ", ".join(map(str, options.seeds))
    text = f"`{command}`: mean \N{PLUS-MINUS SIGN} standard deviation over seeds {seeds}.\n\n"
    text += table(rows, names)
    (options.folder / "controls.md").write_text(text)
    draw_curves(names, options)
    draw_plane(rows, names, options)
    print(f"\n{text}\nWrote controls.md, controls.parquet, curves.parquet and two figures to {options.folder}")


def table(rows: pd.DataFrame, names: list[str]) -> str:
    measures = {name: label for name, label in MEASURES.items() if name in rows and rows[name].notna().any()}
    lines = [f"| | {' | '.join(measures.values())} |", "|---" * (len(measures) + 1) + "|"]
    for name in names:
        runs = rows[rows["setting"] == name]
        cells = []
        for measure in measures:
            digits = 1 if measure == "distinct" else 3 if measure in ("calibration", "off") else 2
            values = runs[measure].dropna()
            spread = f" \N{PLUS-MINUS SIGN} {values.std():.{digits}f}" if len(values) > 1 else ""
            count = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
            cells.append(f"{values.mean():.{digits}f}{spread}{count}" if len(values) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(names: list[str], options: argparse.Namespace) -> None:
    """Draw the entropy of every setting in a small panel, over that of GRPO."""
    columns = min(4, len(names))
    count = math.ceil(len(names) / columns)
    figure = Picture(figsize=(2.9 * columns, 2.3 * count + 0.3), layout="constrained")
    panels = figure.subplots(count, columns, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        plain = "none, 4 updates" if "4 updates" in name else "none"
        for setting, color in ((plain, "#8a8a8a"), (name, RUNS[1])):
            for seed in options.seeds:
                if setting in names:
                    frame = EntropyCurves.load(folder_of(setting, seed, options)).to_pandas()
                    curve(axes, frame, "entropy", 10, color, None)
        finish(axes, textwrap.fill(name, 28), "", floor=0, legend=False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supylabel("entropy, nats per token (grey: GRPO)", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(options.folder / "curves.png", dpi=110)


def draw_plane(rows: pd.DataFrame, names: list[str], options: argparse.Namespace) -> None:
    """Draw held-out reward over diversity: mean and standard deviation of each setting."""
    if "avg16" not in rows:
        return
    figure = Picture(figsize=(9.5, max(5.2, 1 + 0.16 * len(names))), layout="constrained")
    axes = figure.subplots()
    means = rows.groupby("setting")[["avg16", "distinct"]].mean()
    spreads = rows.groupby("setting")[["avg16", "distinct"]].std().fillna(0)
    for number, name in enumerate(names, 1):
        x, y = means.loc[name, "distinct"], means.loc[name, "avg16"]
        better = (means["distinct"] >= x) & (means["avg16"] >= y) & (means.index != name)
        color = RUNS[2] if not better.any() else "#8a8a8a"  # on the front, or behind it
        across, up = spreads.loc[name, "distinct"], spreads.loc[name, "avg16"]
        axes.errorbar(x, y, up, across, "o", color=color, elinewidth=0.7, alpha=0.9, label=f"{number}  {name}")
        axes.annotate(str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=9, fontweight="bold")
    finish(axes, "Right and diverse, on held-out questions", "avg@16", legend=False)
    axes.set_xlabel("distinct right answers of 64")
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False, title="orange: none is better in both")
    figure.savefig(options.folder / "plane.png", dpi=130)


if __name__ == "__main__":
    main()
