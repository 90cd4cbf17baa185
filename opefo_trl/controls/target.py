"""Entropy targets: a number of nats or a multiple of the first step's entropy, constant or moved over the run.

`hold_then_anneal` holds the target for the first half of the run and lowers it linearly to half of itself in the
second, after Entropy Scheduling (ACL 2026 Findings 206): entropy held early and annealed late trained best there. The
two halves are our choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

__all__: list[str] = []  # of use inside this package only

_MOST_NATS = 12.5  # the entropy of a uniform choice among 268,000 tokens, a large vocabulary
_SWING = 0.5  # largest distance from the target, as a fraction of it

# Schedules as functions of t, the completed share of the run. The first two blend the start (1), by default the first
# step's entropy, into the target (0); the others give the factor on the target.
FROM_START: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
_AROUND_TARGET: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "increase_decrease": lambda t: 1 + _SWING * math.sin(math.pi * t),
    "decrease_increase_decrease": lambda t: 1 + _SWING * math.cos(3 * math.pi * t),
    "oscillating": lambda t: 1 + _SWING * (1 - t) * math.cos(6 * math.pi * t),
    "hold_then_anneal": lambda t: 1 - _SWING * max(0.0, 2 * t - 1),
}
SCHEDULES = ("constant", *FROM_START, *(name for name in _AROUND_TARGET if name != "constant"))


class EntropyTarget:
    """
    A target entropy, and its schedule over the run.

    Args:
        value (`float` or `str`): nats, or `"0.4x"` for 0.4 times the first step's entropy.
        schedule (`str`): one of `SCHEDULES`.
        name (`str`): field or option that the value was given as, for the error message.
        start (`EntropyTarget`, *optional*): where `linear` and `cosine` begin, by default at the first step's entropy.
    """

    def __init__(
        self,
        value: float | str,
        schedule: str = "constant",
        name: str = "flow_target",
        start: EntropyTarget | None = None,
    ):
        self.number, self.relative = _parse_target(value, name)
        self.schedule, self.start = schedule, start

    def at(self, anchor: Tensor, step: int, max_steps: int) -> Tensor:
        """Return the target of this step, in nats; `anchor` is the first step's entropy (NaN: not measured yet)."""
        level = self.number * anchor if self.relative else torch.full_like(anchor, self.number)
        done = min(1.0, step / max(1, max_steps - 1))
        if self.schedule in FROM_START:
            start = anchor if self.start is None else self.start.at(anchor, 0, 1)
            return level + (start - level) * FROM_START[self.schedule](done)
        return level * _AROUND_TARGET[self.schedule](done)


def _parse_target(value: float | str, name: str = "flow_target") -> tuple[float, bool]:
    """Return the number and whether it is relative: `0.3` -> (0.3, False); `"0.4x"` -> (0.4, True)."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x?)\s*", str(value))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or match is None or not (math.isfinite(number) and number > 0):
        always = ", or None (command line: none; YAML: null) to always balance" if name == "flow_target" else ""
        raise ValueError(
            f"`{name}={value!r}` is not an entropy. Give nats as a positive number (`0.3`), or a fraction of the "
            f'first step\'s entropy (`"0.4x"`){always}.'
        )
    if not match[2] and number > _MOST_NATS:
        raise ValueError(
            f"`{name}={value!r}` nats is more than a policy over a large vocabulary can have ({_MOST_NATS}). For half "
            'of the first step\'s entropy: `"0.5x"`.'
        )
    return number, match[2] == "x"


class FirstEntropy:
    """The first entropy that a run measured, which relative targets refer to."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def record(self, entropy: Tensor) -> Tensor:
        """Record `entropy` if none was seen yet; return the first one (NaN until then)."""
        first = entropy if self.value is None else self.value.to(entropy.device)
        self.value = torch.where(first.isnan(), entropy, first)
        return self.value

    def state(self) -> float | None:
        return None if self.value is None or self.value.isnan() else self.value.item()

    def load(self, state: float | None) -> None:
        self.value = None if state is None else torch.tensor(state)
