"""STEER (arXiv 2510.10150): weight each token by how much its update would change the entropy.

    Omega_t = A_t r_t (1 - p_t) (log p_t + H_t)          p_t of the live policy, r_t = p_t / p_old; on-policy r_t = 1

`exponential`, the main method:  w = exp(-k |Omega|),  k = -ln(w_min) / max(max |Omega|, 0.02), within [w_min, w_max]
`linear`:                        from w_max at the least |Omega| down to w_min at the largest
`asymmetric`:                    w = exp(-k Omega), within [w_min, w_max]: only tokens that lower entropy are damped

Maxima are over the micro-batch, as in the authors' code. The first two maps are verified against that code; the
asymmetric one is second-hand, from notes on a later commit. Has an effect strictly on-policy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.options import choice, number

# (w_min, w_max) of each map, from the authors' run scripts
_BOUNDS = {"exponential": (0.8, 1.0), "linear": (0.8, 1.2), "asymmetric": (0.9, 1.0)}


class STEER(Control):
    """
    Weights tokens less, the more their update would change the entropy.

    Args:
        map (`str`): `exponential`, `linear` or `asymmetric`.
        w_min, w_max (`float`, *optional*): bounds on the weights. The authors' scripts: 0.8 and 1.0, 0.8 and 1.2, 0.9
            and 1.0; their paper's exponential map 0.7.
    """

    def __init__(self, *, map: str = "exponential", w_min: float | None = None, w_max: float | None = None):
        self.map = choice("map", map, tuple(_BOUNDS))
        low, high = _BOUNDS[map]
        self.low = number("w_min", low if w_min is None else w_min, above=0)
        self.high = number("w_max", high if w_max is None else w_max, self.low)
        if map == "asymmetric":
            self.source = "the asymmetric map is second-hand, from notes on the authors' code"

    def advantages(self, tokens: Tokens) -> Tensor:
        logps = tokens.logps.detach().clamp(max=0)
        omega = tokens.advantages * tokens.ratio * -torch.expm1(logps) * (logps + tokens.entropies.detach())
        omega = omega.nan_to_num(0, 0, 0) * tokens.mask
        size = omega.abs()
        if self.map == "linear":
            least = size.masked_fill(tokens.mask == 0, torch.inf).amin().nan_to_num(posinf=0)
            fraction = (size - least) / (size.amax() - least)  # NaN where all are equal
            weights = (self.high - fraction * (self.high - self.low)).nan_to_num((self.high + self.low) / 2)
        else:
            rate = -math.log(self.low) / size.amax().clamp(min=0.02)
            weights = (-rate * (size if self.map == "exponential" else omega)).exp()
        return tokens.advantages * weights.clamp(self.low, self.high)
