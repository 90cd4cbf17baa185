"""Files that are whole at any moment, whenever the process that writes them dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, and put it in its place when it is done."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)
