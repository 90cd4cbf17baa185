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
        if schedule not in SCHEDULES:
            raise ValueError(
                f"`flow_schedule={schedule!r}` is unknown. Choose one of {', '.join(map(repr, SCHEDULES))}."
            )
        self.schedule = schedule
        self.anchor: Tensor | None = None  # the first step's entropy

    def at(self, entropy: Tensor, step: int, max_steps: int) -> Tensor:
        """The target for this step, in nats, given the entropy measured last (NaN: none yet)."""
        if not self.relative:
            return torch.full_like(entropy, self.number)
        anchor = entropy if self.anchor is None else self.anchor.to(entropy.device)
        self.anchor = torch.where(anchor.isnan(), entropy, anchor)
        return self.number * self.anchor

    def state_dict(self) -> dict[str, float | None]:
        known = self.anchor is not None and not math.isnan(self.anchor.item())
        return {"anchor": self.anchor.item() if known and self.anchor is not None else None}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.anchor = None if state.get("anchor") is None else torch.tensor(state["anchor"])


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
            f'first step\'s entropy (`"0.4x"`), or None to balance always, as in the paper.'
        )
    return number, match[2] == "x"
