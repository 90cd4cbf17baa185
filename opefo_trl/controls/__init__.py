"""All entropy controls by name. A new one takes a class here, a line in `CONTROLS`, and a row in docs/controls.md."""

from __future__ import annotations

import inspect
from typing import Any

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.clipping import BAPO, CEGPPO, DCPO, ClipHigher, ClipLow, DynamicClip
from opefo_trl.controls.covariance import ClipCov, CovarianceKernel, KLCov
from opefo_trl.controls.entropy import AER, AdaptiveEntropy, EntropyAdvantage, EntropyBonus, HighEntropyTokens
from opefo_trl.controls.opefo import OPEFO
from opefo_trl.controls.positive_advantage import (
    AdvantageSign,
    NegativeReinforcement,
    PositiveAdvantage,
    RandomPositiveClip,
)
from opefo_trl.controls.sign_balance import AsymGRPO, Entrocraft, EntroPIC
from opefo_trl.controls.steer import STEER
from opefo_trl.controls.token_selection import REPO, STARE, EntropyDynamics
from opefo_trl.validation import check_choice, did_you_mean

__all__ = ["CONTROLS", "Control", "Tokens", "control_options", "make_control"]

CONTROLS: dict[str, type[Control]] = {
    "none": Control,  # plain GRPO; the flows are still measured and logged, so that a collapse is visible
    "opefo": OPEFO,
    "steer": STEER,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "covariance_kernel": CovarianceKernel,
    "positive_advantage": PositiveAdvantage,
    "random_positive_clip": RandomPositiveClip,
    "advantage_sign": AdvantageSign,
    "negative_reinforcement": NegativeReinforcement,
    "entropy_bonus": EntropyBonus,
    "adaptive_entropy": AdaptiveEntropy,
    "aer": AER,
    "clip_higher": ClipHigher,
    "clip_low": ClipLow,
    "dynamic_clip": DynamicClip,
    "ce_gppo": CEGPPO,
    "bapo": BAPO,
    "dcpo": DCPO,
    "entropy_advantage": EntropyAdvantage,
    "high_entropy_tokens": HighEntropyTokens,
    "stare": STARE,
    "repo": REPO,
    "entropy_dynamics": EntropyDynamics,
    "entropic": EntroPIC,
    "entrocraft": Entrocraft,
    "asym_grpo": AsymGRPO,
}


def control_options(name: str) -> list[str]:
    """Return the names of the keyword arguments that a control takes."""
    constructor = CONTROLS[check_choice("control", name, CONTROLS)].__init__
    return [] if constructor is object.__init__ else list(inspect.signature(constructor).parameters)[1:]


def make_control(name: str, **kwargs: Any) -> Control:
    """Build a control. An unknown name or option raises a `ValueError` that lists the known ones."""
    options = control_options(name)
    for key in kwargs:
        if key not in options:
            known = f"It takes {', '.join(map(repr, options))}." if options else "It takes no options."
            raise ValueError(f"`control={name!r}` has no option {key!r}.{did_you_mean(key, options)} {known}")
    return CONTROLS[name](**kwargs)
