"""TRL's private names that this package relies on, all in one place.

TRL may rename or change any of them in a minor release. tests/test_trl_compat.py holds each one: when TRL moves it,
that test fails first and says where. Nothing else in the package imports from inside TRL.
"""

from __future__ import annotations

from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, is_async_callable, maybe_gather_lm_head_ctx

__all__ = ["disable_gradient_checkpointing", "get_config_model_id", "is_async_callable", "maybe_gather_lm_head_ctx"]
