"""Where a run's entropy should be: a number of nats, or a multiple of what the first step measured."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

# How a target may move over a run. One entry here and one branch in `EntropyTarget.at` make another.
SCHEDULES = ("constant",)


class EntropyTarget:
    """
    Args:
        value (`float` or `str`): nats, or `"0.4x"` for 0.4 times the first step's entropy.
        schedule (`str`): one of `SCHEDULES`.
    """

    def __init__(self, value: float | str, schedule: str = "constant"):
        self.number, self.relative = parse_target(value)
        self.schedule = schedule

    def at(self, anchor: Tensor, step: int, max_steps: int) -> Tensor:
        """The target for this step, in nats; `anchor` is the first step's entropy (NaN: not measured yet)."""
        return self.number * anchor if self.relative else torch.full_like(anchor, self.number)


def parse_target(value: float | str) -> tuple[float, bool]:
    """`0.3` -> (0.3, False); `"0.4x"` -> (0.4, True)."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x?)\s*", str(value))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or match is None or not (math.isfinite(number) and number > 0):
        raise ValueError(
            f"`flow_target={value!r}` is not an entropy. Give nats as a positive number (`0.3`), a fraction of the "
            f'first step\'s entropy (`"0.4x"`), or None (command line: none; YAML: null) to balance always.'
        )
    return number, match[2] == "x"
