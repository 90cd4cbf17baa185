"""Which entropy control helps? All of them on one task, side by side, over seeds.

    make compare                                             # four settings, two seeds: about six minutes on two cores
    python benchmarks/compare_controls.py --group controls   # every control, three seeds
    python benchmarks/compare_controls.py --group tracking   # what holds a target, and the steps of the adaptive bonus
    python benchmarks/compare_controls.py --settings none clip_cov "opefo, target" -- --learning_rate 3e-4

Each run is a process of its own (`train.py` on configs/quickstart.yaml, or on another `--config`), one thread each, as
many at a time as there are cores. A run that is finished is not run again, one that was interrupted goes on: give the
same command once more. What follows `--` is handed to train.py.

Settings that need several updates to a rollout get four, with twice the optimizer steps, which is half the rollouts;
`none` is there in both ways. Where a method takes a target entropy, it is given `--target`. On the playground the
trained models are then asked 64 times for each of 18 held-out questions:

    avg@16      share of right answers
    pass@16     questions with a right answer among 16 samples, unbiased estimate of 64
    end         of the last ten optimizer steps; the least is that of a mean of ten
    distinct    different right answers of 64, mean over the questions
    off target  root mean square distance to a target entropy, in nats, from where it is first reached
    calibration expected calibration error: |share right - confidence| over ten bins of the confidence, which is the
                mean probability of a completion's tokens (of the whole completion it would measure diversity)
    step time   beside `none`, at the fastest tenth: the others waited for the machine's other work. It has the length
                of the completions in it; `benchmarks/overhead.py --controls` measures the control alone

Writes controls.md (the table), controls.parquet (a row a run), curves.parquet (a row a step), and two figures.
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
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from opefo_trl.cli.progress import EDGE
from opefo_trl.curves import EntropyCurves
from opefo_trl.curves.plot import RUNS, Picture, curve, finish
from opefo_trl.evaluation.metrics import avg_at_k, calibration_error, pass_at_k
from opefo_trl.files import write_whole
from opefo_trl.playground import is_right, playground_dataset

ROOT = Path(__file__).parents[1]
SAMPLES, SHOWN = 64, 16
# Of the settings that hold a target, those that stand beside the other controls
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
    control: str
    kwargs: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    updates: int = 1  # to a rollout

    def arguments(self, options: argparse.Namespace) -> list[str]:
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
    """The same rollout in several updates."""
    config = yaml.safe_load(options.config.read_text())
    given = dict(zip(options.more[::2], options.more[1::2], strict=False))
    rows, parts = (
        int(given.get(f"--{name}", config.get(name, default)))
        for name, default in {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}.items()
    )
    if parts % updates == 0:
        return {"steps_per_generation": parts, "gradient_accumulation_steps": parts // updates}
    if parts == 1 and rows % updates == 0:
        return {"steps_per_generation": updates, "per_device_train_batch_size": rows // updates}
    raise SystemExit(
        f"A rollout of {parts} micro-batches of {rows} rows cannot be trained on in {updates} updates: let the first "
        "number, or of one micro-batch the second, be a multiple of it."
    )


def settings(target: float) -> dict[str, Setting]:
    held = {"flow_target": target}
    constant = {"lr_scheduler_type": "constant_with_warmup"}  # a rate that goes to 0 follows nothing
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


def groups(known: dict[str, Setting]) -> dict[str, list[str]]:
    tracking = [name for name in known if name.startswith(("opefo, target", "adaptive_entropy", "none"))]
    return {
        "reduced": ["none", "opefo, target", "opefo, target, sign", "adaptive_entropy, step 0.005"],
        "tracking": [name for name in tracking if "updates" not in name],
        "controls": [name for name in known if name not in tracking or name in COMPARED],
        "all": list(known),
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
    known = settings(options.target)
    names = options.settings or groups(known)[options.group]
    for name in names:
        if name not in known:
            raise SystemExit(f"The setting {name!r} is unknown. Choose of: {', '.join(map(repr, known))}.")
    jobs = [(name, seed) for seed in options.seeds for name in names]
    progress = Progress(len(jobs))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: progress.of(job, train(*job, known[job[0]], options)), jobs))
    rows = pd.DataFrame([measure(name, seed, options) for name, seed in jobs])
    write(rows, names, options)


def parse() -> argparse.Namespace:
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", default="reduced", choices=["reduced", "controls", "tracking", "all"])
    parser.add_argument("--settings", nargs="+", help="by name, instead of a group")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.4, help="nats, for what takes a target")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "controls")
    options = parser.parse_args(sys.argv[1:place])
    options.more = sys.argv[place + 1 :]
    return options


class Progress:
    """A line for every run that ends: how many there are, and how long the rest will take."""

    def __init__(self, total: int):
        self.total, self.done, self.trained, self.begun = total, 0, 0, time.monotonic()
        self.lock = threading.Lock()

    def of(self, job: tuple[str, int], trained: bool) -> None:
        with self.lock:
            self.done += 1
            self.trained += trained
            elapsed = time.monotonic() - self.begun
            rest = elapsed / max(1, self.trained) * (self.total - self.done) / 60
            what = "done" if trained else "was done"
            print(f"[{self.done:3}/{self.total}] {job[0]}, seed {job[1]}: {what}; {rest:.0f} min to go", flush=True)


def place(name: str, seed: int, options: argparse.Namespace) -> Path:
    return options.folder / name.replace(", ", "-").replace(" ", "-") / str(seed)


def train(name: str, seed: int, setting: Setting, options: argparse.Namespace) -> bool:
    """Whether there was anything left to do."""
    out = place(name, seed, options)
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


def check_same(out: Path, what: list[str]) -> None:
    """A run that was begun with other settings is neither gone on with nor taken for this one."""
    path = out.with_suffix(".json")
    if path.exists() and json.loads(path.read_text()) != what:
        raise SystemExit(
            f"{out} was run with other settings ({path} has them). Choose another --folder, or delete it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what))


@torch.no_grad()
def held_out(out: Path) -> dict[str, float]:
    """Questions of the playground that were never trained on; nothing of another task."""
    if "playground" not in (out / "run.json").read_text():
        return {}
    disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    generator = torch.Generator().manual_seed(0)
    right, confidence, distinct = [], [], []
    for row in playground_dataset("test"):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        ids = ids if torch.is_tensor(ids) else ids["input_ids"]
        answers, probabilities = sample(model, ids.expand(SAMPLES, -1), tokenizer, generator)
        correct = [is_right(answer.strip(), row["target"]) for answer in answers]
        right.append(correct)
        confidence.append(probabilities)
        distinct.append(len({answer for answer, good in zip(answers, correct, strict=True) if good}))
    return {
        "avg16": avg_at_k(right),
        "pass16": pass_at_k(right, SHOWN),
        "distinct": sum(distinct) / len(distinct),
        "calibration": calibration_error(np.ravel(confidence), np.ravel(right)),
    }


def sample(model, ids: torch.Tensor, tokenizer, generator: torch.Generator) -> tuple[list[str], list[float]]:
    """Completions at temperature 1, and of each the mean probability of its tokens (geometric), its end included."""
    done = torch.zeros(len(ids), dtype=torch.bool)
    total, count, tokens, cache = torch.zeros(len(ids)), torch.zeros(len(ids)), [], None
    for _ in range(12):
        output = model(ids if cache is None else tokens[-1].unsqueeze(1), past_key_values=cache, use_cache=True)
        cache, logps = output.past_key_values, output.logits[:, -1].float().log_softmax(-1)
        drawn = torch.multinomial(logps.exp(), 1, generator=generator).squeeze(1)
        total += logps.gather(1, drawn.unsqueeze(1)).squeeze(1).masked_fill(done, 0)
        count += ~done
        tokens.append(drawn.masked_fill(done, tokenizer.pad_token_id))
        done |= drawn == tokenizer.eos_token_id
        if done.all():
            break
    return tokenizer.batch_decode(torch.stack(tokens, 1), skip_special_tokens=True), (total / count).exp().tolist()


def measure(name: str, seed: int, options: argparse.Namespace) -> dict:
    out, setting = place(name, seed, options), settings(options.target)[name]
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
    """Root mean square, in nats, from where entropy first reaches its target; NaN of what has none to hold."""
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
        EntropyCurves.load(place(name, seed, options)).to_pandas().assign(setting=name, seed=seed)
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
        of = rows[rows["setting"] == name]
        cells = []
        for measure in measures:
            digits = 1 if measure == "distinct" else 3 if measure in ("calibration", "off") else 2
            known = of[measure].dropna()
            spread = f" \N{PLUS-MINUS SIGN} {known.std():.{digits}f}" if len(known) > 1 else ""
            count = f" ({len(known)} of {len(of)})" if len(known) < len(of) else ""
            cells.append(f"{known.mean():.{digits}f}{spread}{count}" if len(known) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(names: list[str], options: argparse.Namespace) -> None:
    """Entropy of every setting, each in a small panel over those of GRPO."""
    columns = min(4, len(names))
    count = math.ceil(len(names) / columns)
    figure = Picture(figsize=(2.9 * columns, 2.3 * count + 0.3), layout="constrained")
    panels = figure.subplots(count, columns, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        plain = "none, 4 updates" if "4 updates" in name else "none"
        for setting, color in ((plain, "#8a8a8a"), (name, RUNS[1])):
            for seed in options.seeds:
                if setting in names:
                    frame = EntropyCurves.load(place(setting, seed, options)).to_pandas()
                    curve(axes, frame, "entropy", 10, color, None)
        finish(axes, textwrap.fill(name, 28), "", floor=0, legend=False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supylabel("entropy, nats per token (grey: GRPO)", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(options.folder / "curves.png", dpi=110)


def draw_plane(rows: pd.DataFrame, names: list[str], options: argparse.Namespace) -> None:
    """Held-out reward beside diversity: mean and standard deviation of each setting."""
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
