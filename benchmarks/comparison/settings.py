"""Settings that are compared: controls with their options, the points where targets are held, and groups of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from opefo_trl.controls import CONTROLS
from opefo_trl.controls.target import SCHEDULES

MAIN_SEEDS, OTHER_SEEDS = 10, 3
TARGETS = (0.25, 0.6)  # nats, beside the main one
RATES = (0.5, 2.0)  # factors of the learning rate, beside 1
BONUS_STEPS = (0.001, 0.005, 0.01, 0.02, 0.05)  # 0.005 is TRL's
MOVED_RIVALS = ("entropic", "entrocraft")  # whose target may follow a schedule
MOVING = tuple(name for name in SCHEDULES if name not in ("constant", "linear", "cosine"))
COUNTS = ("gradient_accumulation_steps", "steps_per_generation")  # of micro-batches
PASS_RATES = (
    "benchmarks/results/playground-train.jsonl"  # `opefo-trl eval --model playground --dataset_name playground`
)
BONUS_STEPS_AWAY = (0.005, 0.05)  # at other targets and rates


@dataclass(frozen=True)
class Setting:
    """
    A control and all that is set with it.

    Args:
        control (`str`): name of the control.
        kwargs (`dict`): its options.
        fields (`dict`): other fields of the configuration.
        updates (`int`): optimizer steps for each rollout.
        rate (`float`): factor of the config's learning rate.
        target (`float`, *optional*): entropy to hold, in nats; where a run logs its target, that counts instead.
        plain (`str`): the setting without a control that this one is compared with.
        point (`str`): where it stands. Settings are compared with the bonuses of the same point.
    """

    control: str
    kwargs: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    updates: int = 1
    rate: float = 1.0
    target: float | None = None
    plain: str = "none"
    point: str = ""


def holding(target: float, bonus_steps: Iterable[float] = BONUS_STEPS) -> dict[str, Setting]:
    """Return the settings that hold an entropy of so many nats."""
    by_name = {
        "opefo, target": Setting("opefo", fields={"flow_target": target}),
        "opefo, target, sign": Setting("opefo", fields={"flow_target": target, "flow_shape": "sign"}),
        **{
            f"adaptive_entropy, step {step:g}": Setting("adaptive_entropy", {"target": target, "step": step})
            for step in bonus_steps
        },
        "entropic": Setting("entropic", {"target": target}),
        "entrocraft": Setting("entrocraft", {"low": round(target - 0.05, 4), "high": round(target + 0.05, 4)}),
        "asym_grpo": Setting("asym_grpo"),  # has no target; it stands beside those that have
    }
    known = {name: setting for name, setting in by_name.items() if setting.control in CONTROLS}
    return {name: replace(setting, target=target) for name, setting in known.items()}


def settings(target: float) -> dict[str, Setting]:
    """Return all settings by name; `target` is the main one."""
    by_name = {"none": Setting("none"), **holding(target)}
    for other in TARGETS:
        for name, setting in holding(other, BONUS_STEPS_AWAY).items():
            if replace(setting, target=target) != by_name[name]:  # else it has no target: the same run again
                by_name[f"{name} at {other:g} nats"] = replace(setting, point=f"target {other:g}")
    for rate in RATES:
        point = f"rate x{rate:g}"
        for name, setting in {"none": Setting("none"), **holding(target, BONUS_STEPS_AWAY)}.items():
            by_name[f"{name} at {point}"] = replace(setting, rate=rate, plain=f"none at {point}", point=point)
    return {**by_name, **moving(target), **signal(target), **others(target)}


def moving(target: float) -> dict[str, Setting]:
    """Return settings whose target moves. A learning rate near 0 could not follow it, so the rate stays constant."""
    constant = {"lr_scheduler_type": "constant_with_warmup"}
    plain = Setting("none", fields=constant, plain="none, constant rate", point="moving")
    by_name = {plain.plain: plain}
    for schedule in MOVING:
        for name, setting in holding(target).items():
            if setting.control == "opefo":
                fields, kwargs = {**constant, **setting.fields, "flow_schedule": schedule}, {}
            elif setting.control in MOVED_RIVALS:
                fields, kwargs = constant, {**setting.kwargs, "schedule": schedule}
            else:
                continue
            by_name[f"{name}, {schedule}"] = replace(plain, control=setting.control, kwargs=kwargs, fields=fields)
    return by_name


def signal(target: float) -> dict[str, Setting]:
    """Return settings that differ in what is done about groups without a signal."""
    ways = {
        "fresh groups": {"resample_rounds": 3},
        "left out": {"zero_advantage_tokens": "leave_out"},
        "filtered": {"pass_rates": PASS_RATES},
    }
    every = {name: value for fields in ways.values() for name, value in fields.items()}
    return {
        **{f"none, {name}": Setting("none", fields=fields) for name, fields in ways.items()},
        "none, all three": Setting("none", fields=every),
        "opefo, target, all three": Setting("opefo", fields={**every, "flow_target": target}, target=target),
    }


def others(target: float) -> dict[str, Setting]:
    """Return the settings that hold no target exactly, and those with several updates to a rollout."""
    held = {"flow_target": target}
    off: dict[str, Any] = {"updates": 4, "plain": "none, 4 updates", "point": "4 updates"}
    return {
        "opefo": Setting("opefo"),
        "opefo, literal": Setting("opefo", fields={"flow_lambda_max": 1.0}),
        "opefo, target, exact": Setting("opefo", fields={**held, "flow_estimator": "exact"}, target=target),
        "steer": Setting("steer"),
        "clip_cov": Setting("clip_cov"),
        "covariance_kernel": Setting("covariance_kernel"),
        "positive_advantage": Setting("positive_advantage", {"target": target}, target=target),
        "positive_advantage, stage": Setting("positive_advantage", {"schedule": "stage"}),
        "random_positive_clip": Setting("random_positive_clip"),
        "advantage_sign, positive": Setting("advantage_sign", {"keep": "positive"}),
        "advantage_sign, negative": Setting("advantage_sign", {"keep": "negative"}),
        "negative_reinforcement": Setting("negative_reinforcement"),
        "entropy_bonus": Setting("entropy_bonus", {"coef": 0.01}),
        "aer": Setting("aer", {"target": target}, target=target),
        "entropy_advantage": Setting("entropy_advantage"),
        "high_entropy_tokens": Setting("high_entropy_tokens"),
        "stare": Setting("stare", {"target": target}, target=target),
        "repo": Setting("repo"),
        "entropy_dynamics": Setting("entropy_dynamics"),
        "entropy_dynamics, vocabulary": Setting("entropy_dynamics", {"variant": "vocabulary"}),
        "none, 4 updates": Setting("none", **off),
        "opefo, target, 4 updates": Setting("opefo", fields=held, target=target, **off),
        "kl_cov, 4 updates": Setting("kl_cov", **off),
        "clip_higher, 4 updates": Setting("clip_higher", **off),
        "clip_low, 4 updates": Setting("clip_low", **off),
        "dynamic_clip, 4 updates": Setting("dynamic_clip", **off),
        "ce_gppo, 4 updates": Setting("ce_gppo", **off),
        "bapo, 4 updates": Setting("bapo", **off),
        "dcpo, 4 updates": Setting("dcpo", **off),
    }


def groups(by_name: Mapping[str, Setting], target: float) -> dict[str, dict[str, int]]:
    """Return for each `--group` its settings, with the number of seeds of each."""
    rest = others(target)
    main = {"none": MAIN_SEEDS, **dict.fromkeys(holding(target), MAIN_SEEDS)}
    learning = signal(target)
    away = [name for name in by_name if name not in main and name not in rest and name not in learning]
    reduced = ["none", "opefo, target", "opefo, target, sign", "adaptive_entropy, step 0.005"]
    tracking = {**main, **dict.fromkeys(away, OTHER_SEEDS)}
    controls = dict.fromkeys([*reduced, "adaptive_entropy, step 0.05", *rest], OTHER_SEEDS)
    seen = dict.fromkeys(["none", "opefo, target", *learning], MAIN_SEEDS)
    return {
        "reduced": dict.fromkeys(reduced, 2),
        "controls": controls,
        "tracking": tracking,
        "signal": seen,
        "all": {**controls, **seen, **tracking},
    }


@cache
def read_config(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def fields_of(
    setting: Setting, seed: int, steps: int, config: Path, more: Iterable[str] = (), split: int = 1
) -> dict[str, Any]:
    """Return the fields that a run sets on top of the config. Those of the setting win over `more`."""
    given = {"seed": seed, "eval_prompts": 0, "save_total_limit": 1, **parse_words(more)}
    given |= {"control": setting.control, "control_kwargs": setting.kwargs, "flow_target": "none", **setting.fields}
    base = {**read_config(config), **given}
    if setting.rate != 1:
        given["learning_rate"] = float(base.get("learning_rate", 1e-6)) * setting.rate
    given["max_steps"] = steps if setting.updates == 1 else 2 * steps
    if setting.updates > 1:
        given |= {"strict_on_policy": False, **several(setting.updates, base)}
    return given | (smaller(split, {**base, **given}) if split > 1 else {})


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """Return options of train.py (`--name value`, `--name=value`, `--name one two`) as fields."""
    given: dict[str, list] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = given[name] = [_value(value)] if equals else []
        elif not given:
            raise SystemExit(f"After -- come options of train.py, which begin with --; {word!r} does not.")
        else:
            values.append(_value(word))
    return {name: values[0] if len(values) == 1 else values or True for name, values in given.items()}


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def words_of(fields: Mapping[str, Any]) -> list[str]:
    """Return fields as options of train.py."""
    words = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in values)]
    return words


def smaller(split: int, fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields of micro-batches that are `split` times as many and as small, with the same rollouts."""
    rows = int(fields.get("per_device_train_batch_size", 8))
    if rows % split:
        raise SystemExit(f"Micro-batches of {rows} rows cannot be split in {split}. Lower --jitter.")
    counts = {"gradient_accumulation_steps": 1, **{name: fields[name] for name in COUNTS if name in fields}}
    return {"per_device_train_batch_size": rows // split, **{name: n * split for name, n in counts.items()}}


def several(updates: int, fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields that train on the same rollout in several updates."""
    rows = int(fields.get("per_device_train_batch_size", 8))
    micro_batches = int(fields.get("gradient_accumulation_steps", 1))
    if micro_batches % updates == 0:
        return {"steps_per_generation": micro_batches, "gradient_accumulation_steps": micro_batches // updates}
    if micro_batches == 1 and rows % updates == 0:
        return {"steps_per_generation": updates, "per_device_train_batch_size": rows // updates}
    raise SystemExit(
        f"A rollout of {micro_batches} micro-batches of {rows} rows cannot be trained on in {updates} updates. Use a "
        f"multiple of {updates} micro-batches, or one micro-batch with a multiple of {updates} rows."
    )
