"""Entropy-flow control for GRPO: see policy entropy collapse, stop it, prove that it helped.

Importing this package costs nothing: torch and trl load when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {"OPEFOConfig": "opefo_trl.config", "OPEFOTrainer": "opefo_trl.trainer"}

__all__ = ["OPEFOConfig", "OPEFOTrainer", "__version__"]

if TYPE_CHECKING:
    from opefo_trl.config import OPEFOConfig
    from opefo_trl.trainer import OPEFOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
