"""Checks of single values that users give. Each error names the field, its value and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: Any, choices: Iterable[str], *, where: str = "", otherwise: str = "") -> str:
    """
    Return `value` if it is one of `choices`.

    Args:
        name (`str`): the field, as the error calls it.
        where (`str`): how the field was given, such as " in `control_kwargs`".
        otherwise (`str`): an alternative to the choices, such as ", or give a dotted path".
    """
    names = list(choices)
    if isinstance(value, str) and value in names:
        return value
    raise ValueError(
        f"`{name}={value!r}`{where} is unknown.{did_you_mean(value, names)} "
        f"Choose one of {', '.join(map(repr, names))}{otherwise}."
    )


def did_you_mean(value: Any, names: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" with the name that is closest to `value`, or "" if none is close."""
    close = difflib.get_close_matches(str(value).lower(), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    whole: bool = False,
    where: str = "",
    why: str = "",
) -> float:
    """
    Return `value` as a float if it is in [low, high] and above `above`, and has no fraction if `whole`. Text is
    converted, since YAML reads `1e-3` as text. `why` is a sentence that the error adds to the bounds.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or not low <= number <= high or (above is not None and number <= above):
        raise ValueError(f"`{name}={value!r}`{where} must be {_bounds(low, high, above)}.{why and ' ' + why}")
    if whole and number % 1:
        raise ValueError(f"`{name}={value!r}`{where} must be a whole number.{why and ' ' + why}")
    return number


def check_map(name: str, value: Any, example: str) -> dict[str, Any]:
    """Return a field's map of names: a dict, JSON from the command line such as `example`, or nothing."""
    if value is None or value == "":
        return {}
    options = value
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            options = json.loads(value)
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(
            f"`{name}={value!r}` is not a map. Give a YAML map in a config file, a dict in Python, or JSON on the "
            f"command line: --{name} '{example}'."
        )
    return options


def check_bool(name: str, value: Any, *, where: str = "") -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}={value!r}`{where} must be True or False.")
    return value


def _bounds(low: float, high: float, above: float | None) -> str:
    if above is None and -math.inf < low and high < math.inf:
        return f"a number in [{low:g}, {high:g}]"
    bounds = [f"above {above:g}"] if above is not None else [f"of at least {low:g}"] if low > -math.inf else []
    bounds += [f"at most {high:g}"] if high < math.inf else []
    return " ".join(["a number", " and ".join(bounds)]).strip()
