"""Where a run's entropy should be: a number of nats, or a multiple of what the first step measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

SWING = 0.5  # of the target, to either side

# How a target may move: its factor at the share t of the run that is done. `linear` and `cosine` go from 1 at the
# first step's entropy to 0 at the target; the others are the target times a factor.
FROM_THE_START: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
AROUND: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "increase_decrease": lambda t: 1 + SWING * math.sin(math.pi * t),
    "decrease_increase_decrease": lambda t: 1 + SWING * math.cos(3 * math.pi * t),
    "oscillating": lambda t: 1 + SWING * (1 - t) * math.cos(6 * math.pi * t),
}
SCHEDULES = ("constant", *FROM_THE_START, *(name for name in AROUND if name != "constant"))


class EntropyTarget:
    """
    Args:
        value (`float` or `str`): nats, or `"0.4x"` for 0.4 times the first step's entropy.
        schedule (`str`): one of `SCHEDULES`.
        name (`str`): what the value is called where it was given.
    """

    def __init__(self, value: float | str, schedule: str = "constant", name: str = "flow_target"):
        self.number, self.relative = parse_target(value, name)
        self.schedule = schedule

    def at(self, anchor: Tensor, step: int, max_steps: int) -> Tensor:
        """The target for this step, in nats; `anchor` is the first step's entropy (NaN: not measured yet)."""
        level = self.number * anchor if self.relative else torch.full_like(anchor, self.number)
        done = min(1.0, step / max(1, max_steps - 1))
        if self.schedule in FROM_THE_START:
            return level + (anchor - level) * FROM_THE_START[self.schedule](done)
        return level * AROUND[self.schedule](done)


def parse_target(value: float | str, name: str = "flow_target") -> tuple[float, bool]:
    """`0.3` -> (0.3, False); `"0.4x"` -> (0.4, True)."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x?)\s*", str(value))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or match is None or not (math.isfinite(number) and number > 0):
        always = ", or None (command line: none; YAML: null) to balance always" if name == "flow_target" else ""
        raise ValueError(
            f"`{name}={value!r}` is not an entropy. Give nats as a positive number (`0.3`), or a fraction of the "
            f'first step\'s entropy (`"0.4x"`){always}.'
        )
    return number, match[2] == "x"


class FirstEntropy:
    """The first entropy that a run measured: what relative targets are relative to."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def seen(self, entropy: Tensor) -> Tensor:
        """It, now that this entropy has been measured; NaN while nothing has."""
        first = entropy if self.value is None else self.value.to(entropy.device)
        self.value = torch.where(first.isnan(), entropy, first)
        return self.value

    def state(self) -> float | None:
        return None if self.value is None or self.value.isnan() else self.value.item()

    def load(self, state: float | None) -> None:
        self.value = None if state is None else torch.tensor(state)
