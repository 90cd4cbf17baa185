"""Options of controls, refused where they cannot be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: float | None = None
) -> float:
    """A number in [low, high], and above `above`; also one that YAML takes for text (`1e-3`)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}={value!r}` in `control_kwargs` is not a number.") from None
    if math.isnan(result) or not low <= result <= high or (above is not None and result <= above):
        raise ValueError(f"`{name}={value!r}` in `control_kwargs` must be {_bounds(low, high, above)}.")
    return result


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(
            f"`{name}={value!r}` in `control_kwargs` is unknown. Choose one of {', '.join(map(repr, known))}."
        )
    return value


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}={value!r}` in `control_kwargs` must be True or False.")
    return value


def _bounds(low: float, high: float, above: float | None) -> str:
    if above is None and -math.inf < low and high < math.inf:
        return f"in [{low:g}, {high:g}]"
    words = [f"above {above:g}"] if above is not None else [f"{low:g} or more"] if low > -math.inf else []
    return " and ".join([*words, *([f"at most {high:g}"] if high < math.inf else [])]) or "a number"
