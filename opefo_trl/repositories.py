"""Names of repositories on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_repo_id(name: str, given: str | None = None) -> str:
    """Return `name` if the Hub accepts it as a repository; `given` tells the error where the name comes from."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        given = given or f"`hub_model_id={name!r}`"
        raise ValueError(f"{given} is no name of a repository. Set `hub_model_id` to USER/NAME. ({error})") from None
    return name


def is_repository(name: Any) -> bool:
    """Return whether `name` can be a repository on the Hub, USER/NAME, and is not a file or folder here."""
    if not isinstance(name, str) or name.endswith(".parquet") or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
