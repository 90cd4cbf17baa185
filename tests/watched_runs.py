"""Runs of the tiny model that remember their parameters at every step, and a control that breaks them."""

import math

import pytest
import torch
from tiny import digit_reward, tiny_model, train
from transformers import TrainerCallback

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS, Control


class Snapshots(TrainerCallback):
    """The parameters at the beginning of every optimizer step."""

    def __init__(self):
        self.before: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step + 1] = {name: p.detach().clone() for name, p in model.named_parameters()}


class Poison(Control):
    """Breaks the advantages of one row at some steps, as an overflow would."""

    def __init__(self, *, steps: list, value: float = math.nan):
        self.steps, self.value, self.step = steps, value, 0

    def observe(self, totals, step, max_steps):
        self.step = step + 1

    def advantages(self, tokens):
        advantages = tokens.advantages.clone()
        if self.step in self.steps:
            advantages[1] = self.value
        return advantages


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setitem(CONTROLS, "poison", Poison)


def run(out, *, reward=digit_reward, model=None, callbacks=(), rollout_func=None, **overrides):
    """Train, and return (trainer or error, parameters at the beginning of every step, parameters at the end)."""
    snapshots, model = Snapshots(), tiny_model() if model is None else model
    extra = {"callbacks": [snapshots, *callbacks], "reward_funcs": reward, "rollout_func": rollout_func}
    try:
        result = train(OPEFOTrainer, OPEFOConfig, out, model=model, extra=extra, **{"max_steps": 4, **overrides})
    except Exception as error:
        result = error
    return result, snapshots.before, {name: p.detach() for name, p in model.named_parameters()}


def assert_same(left, right):
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
