"""Controls that select or weight tokens by how surprising they are. All have an effect strictly on-policy."""

from __future__ import annotations

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.entropy import EntropyControl, toward
from opefo_trl.controls.options import boolean, choice, number
from opefo_trl.controls.statistics import largest, mean, std

__all__: list[str] = []  # of use inside this package only


class STARE(EntropyControl):
    """
    Weight surprising tokens (STARE, arXiv 2606.19236) while the last entropy is below a target.

    `reinforce`: of the tokens of positive advantage, the `share` with the largest -log p counts `up` times.
    `both`: in addition, of those of negative advantage, the same share counts `down` times.

    Verified against the authors' code, where the weight multiplies the clipped loss, which is the same strictly
    on-policy. Shares are of the micro-batch.

    Args:
        variant (`str`): `reinforce` (the authors' O1) or `both` (C2).
        target (`float`): nats. The authors', 0.3.
        share (`float`): the authors', 0.1.
        up, down (`float`): the authors', 1.1 and 0.9 (for 14B and 32B 1.05 and 0.95).
        adaptive (`bool`): move both weights by 0.01 a step, up to 1.5 and 0.5, further apart while entropy is below
            the target. The authors' option.
    """

    keeps_zeros = True
    state_fields = ("coef", "up", "down")

    def __init__(
        self,
        *,
        variant: str = "reinforce",
        target: float = 0.3,
        share: float = 0.1,
        up: float = 1.1,
        down: float = 0.9,
        adaptive: bool = False,
    ):
        self.variant = choice("variant", variant, ("reinforce", "both"))
        self.target, self.share = number("target", target, above=0), number("share", share, 0, 1)
        self.adaptive = boolean("adaptive", adaptive)
        self.up: Tensor | float = number("up", up, 1)
        self.down: Tensor | float = number("down", down, 0, 1)
        super().__init__(0.0)  # 1 while the gate is open

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        below = entropy < self.target
        if self.adaptive:
            up, down = (torch.as_tensor(value, device=entropy.device) for value in (self.up, self.down))
            self.up = torch.where(entropy.isnan(), up, toward(up, below, 0.01, 1.0, 1.5))
            self.down = torch.where(entropy.isnan(), down, toward(down, below, -0.01, 0.5, 1.0))
        return below.to(entropy.dtype)

    def advantages(self, tokens: Tokens) -> Tensor:
        surprise, trained = -tokens.logps.detach(), tokens.mask.bool()
        weights = torch.ones_like(surprise)
        sides = [(tokens.advantages > 0, self.up)]
        if self.variant == "both":
            sides.append((tokens.advantages < 0, self.down))
        for side, weight in sides:
            eligible = trained & side
            count = (eligible.sum() * self.share - 1e-4).ceil().clamp(min=1)  # in fp32 30 * 0.1 is a hair above 3
            weights = torch.where(largest(surprise, eligible, count), weight, weights)
        return tokens.advantages * (1 + (weights - 1) * self.coef)


_ZETA_MIN, _ZETA_MAX = 1e-4, 0.05


class REPO(EntropyControl):
    """
    Lower the advantage of likely tokens (REPO, arXiv 2603.11682). L = log p + H.

    `rescaled`:  A > 0: max(A (1 - zeta log p), 0),  A < 0: min(A (1 + zeta log p), 0), so that no sign changes
    `additive`:  A - beta L

    zeta doubles when the last entropy is below the first one and halves when it is not; at its smallest size it
    changes sign. Second-hand, from a third party's port.

    Args:
        variant (`str`): `rescaled` (REPO-R) or `additive`.
        zeta (`float`): the initial value. The port's, 0.001, with bounds of 0.0001 and 0.05.
        beta (`float`): our choice, 0.01; no value of the paper is known.
    """

    source = "formula and defaults are second-hand, from a third party's port"

    def __init__(self, *, variant: str = "rescaled", zeta: float = 1e-3, beta: float = 0.01):
        self.variant = choice("variant", variant, ("rescaled", "additive"))
        self.beta = number("beta", beta)
        super().__init__(number("zeta", zeta, _ZETA_MIN, _ZETA_MAX))
        self.by_row, self.keeps_zeros = True, variant == "rescaled"
        if variant == "additive":
            self.source = "the formula is second-hand, and the default of `beta` is our choice"

    def next_coef(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        if self.variant == "additive":
            return torch.full_like(entropy, self.beta)
        # zeta moves one place up or down on the axis ..., -2 min, -min | min, 2 min, ...
        wanted_sign = torch.where(entropy < first, 1.0, -1.0)
        doubled = (coef * 2).clamp(-_ZETA_MAX, _ZETA_MAX)
        halved = torch.where(coef.abs() / 2 < _ZETA_MIN, _ZETA_MIN * wanted_sign, coef / 2)
        return torch.where(coef.sign() == wanted_sign, doubled, halved)

    def advantages(self, tokens: Tokens) -> Tensor:
        logps, advantages = tokens.logps.detach(), tokens.advantages
        if self.variant == "additive":
            return advantages - self.beta * (logps + tokens.entropies.detach())
        weights = 1 - self.coef * logps * advantages.sign()
        return advantages * weights.clamp(min=0)


class EntropyDynamics(Control):
    """
    Zero the advantage of the negative-advantage tokens that lower entropy most (arXiv 2602.03392). S = p (log p + H).

    `batch` (Clip_B): those with S - mean S < -mu std S.
    `vocabulary` (Clip_V): those with x > mu std x, x = sum_j p_j^2 (log p_j + H) - S, at most a share of all tokens.
    Requires the `exact` estimator, whose flow is A x.

    Means are over the micro-batch. Verified against the authors' code.

    Args:
        variant (`str`): `batch` or `vocabulary`.
        mu (`float`, *optional*): the authors', 2.5 for `batch` and 8.5 for `vocabulary`.
        share (`float`): for `vocabulary`. The authors', 0.0001, at least one token.
    """

    keeps_zeros = True

    def __init__(self, *, variant: str = "batch", mu: float | None = None, share: float = 1e-4):
        self.variant = choice("variant", variant, ("batch", "vocabulary"))
        self.mu = number("mu", {"batch": 2.5, "vocabulary": 8.5}[variant] if mu is None else mu, 0)
        self.share = number("share", share, 0, 1)
        if variant == "vocabulary":
            self.estimator = "exact"

    def advantages(self, tokens: Tokens) -> Tensor:
        negative = (tokens.advantages < 0) & tokens.mask.bool()
        if self.variant == "batch":
            logps = tokens.logps.detach()
            score = logps.exp() * (logps + tokens.entropies.detach())
            removed = score - mean(score, tokens.mask) < -self.mu * std(score, tokens.mask)
        else:
            with_advantage = tokens.mask.bool() & (tokens.advantages != 0)
            x = torch.where(with_advantage, tokens.flow / tokens.advantages, 0)
            outliers = negative & (x > self.mu * std(x, with_advantage))
            removed = largest(x, outliers, (tokens.mask.sum() * self.share).ceil().clamp(min=1))
        return tokens.advantages.expand_as(tokens.logps).masked_fill(removed & negative, 0)
