"""Controls that pick tokens by how surprising they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opefo_trl.controls.base import Control, Tokens
from opefo_trl.controls.entropy import EntropyControl, toward
from opefo_trl.controls.options import choice, number, switch
from opefo_trl.controls.statistics import largest, mean, spread


class STARE(EntropyControl):
    """
    Weigh surprising tokens (STARE, arXiv 2606.19236), while the last entropy is below a target.

    `reinforce`: the tenth with the largest -log p among tokens of positive advantage counts `up` times. `both`: and
    the same tenth among those of negative advantage `down` times. The tenths are of the micro-batch, as in the
    authors' code, which was read directly. (There the weight multiplies the clipped loss, here the advantage; strictly
    on-policy they are one.)

    Args:
        variant (`str`): `reinforce` (the authors' O1) or `both` (C2).
        target (`float`): nats. The authors', 0.3.
        share (`float`): the authors', 0.1.
        up, down (`float`): the authors', 1.1 and 0.9 (for 14B and 32B 1.05 and 0.95).
        adaptive (`bool`): move both by 0.01 a step, up to 1.5 and 0.5, further apart below the target. The authors'
            option.
    """

    keeps_zeros = True

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
        self.adaptive = switch("adaptive", adaptive)
        self.up: Tensor | float = number("up", up, 1)
        self.down: Tensor | float = number("down", down, 0, 1)
        super().__init__(0.0)  # 1 while the gate is open

    def moved(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        low = entropy < self.target
        if self.adaptive:
            up, down = (torch.as_tensor(value, device=entropy.device) for value in (self.up, self.down))
            self.up = torch.where(entropy.isnan(), up, toward(up, low, 0.01, 1.0, 1.5))
            self.down = torch.where(entropy.isnan(), down, toward(down, low, -0.01, 0.5, 1.0))
        return low.to(entropy.dtype)

    def advantages(self, tokens: Tokens) -> Tensor:
        surprise, trained = -tokens.logps.detach(), tokens.mask.bool()
        weights = torch.ones_like(surprise)
        sides = [(tokens.advantages > 0, self.up)]
        if self.variant == "both":
            sides.append((tokens.advantages < 0, self.down))
        for side, weight in sides:
            among = trained & side
            count = (among.sum() * self.share - 1e-4).ceil().clamp(min=1)  # 30 * 0.1 is a hair more than 3
            weights = torch.where(largest(surprise, among, count), weight, weights)
        return tokens.advantages * (1 + (weights - 1) * self.coef)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "up": float(self.up), "down": float(self.down)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.up, self.down = state["up"], state["down"]


class REPO(EntropyControl):
    """
    Regulated policy entropy (REPO, arXiv 2603.11682): lower the advantage of likely tokens. L = log p + H.

    `rescaled`:  A > 0: max(A (1 - zeta log p), 0),  A < 0: min(A (1 + zeta log p), 0), so that no sign changes
    `additive`:  A - beta L

    zeta doubles when the last entropy is below the first one and halves when it is not; at its least size it changes
    sign. From a third party's port.

    Args:
        variant (`str`): `rescaled` (REPO-R) or `additive`.
        zeta (`float`): to begin with. The port's, 0.001, within 0.0001 and 0.05.
        beta (`float`): not known; 0.01 is ours.
    """

    LEAST, MOST = 1e-4, 0.05

    def __init__(self, *, variant: str = "rescaled", zeta: float = 1e-3, beta: float = 0.01):
        self.variant = choice("variant", variant, ("rescaled", "additive"))
        self.beta = number("beta", beta)
        super().__init__(number("zeta", zeta, self.LEAST, self.MOST))
        self.by_row, self.keeps_zeros = True, variant == "rescaled"

    def moved(self, coef: Tensor, entropy: Tensor, first: Tensor, step: int, max_steps: int) -> Tensor:
        if self.variant == "additive":
            return torch.full_like(entropy, self.beta)
        # On one axis: ... -2 x least, -least | least, 2 x least ...; one place up, or one down
        wanted = torch.where(entropy < first, 1.0, -1.0)
        grown = (coef * 2).clamp(-self.MOST, self.MOST)
        shrunk = torch.where(coef.abs() / 2 < self.LEAST, self.LEAST * wanted, coef / 2)
        return torch.where(coef.sign() == wanted, grown, shrunk)

    def advantages(self, tokens: Tokens) -> Tensor:
        logps, advantages = tokens.logps.detach(), tokens.advantages
        if self.variant == "additive":
            return advantages - self.beta * (logps + tokens.entropies.detach())
        weights = 1 - self.coef * logps * advantages.sign()
        return advantages * weights.clamp(min=0)


class EntropyDynamics(Control):
    """
    Take tokens of negative advantage that lower entropy most out of the loss (arXiv 2602.03392). S = p (log p + H).

    `batch` (Clip_B): those with S - mean S < -mu std S.
    `vocabulary` (Clip_V): those with x > mu std x, x = sum_j p_j^2 (log p_j + H) - S, and at most a share of all
    tokens. It needs the `exact` estimator, whose flow is A x.

    Means over the micro-batch. Formulas from the authors' code. Acts strictly on-policy.

    Args:
        variant (`str`): `batch` or `vocabulary`.
        mu (`float`, *optional*): the authors', 2.5 and 8.5.
        share (`float`): for `vocabulary`. The authors', 0.0001; one token at least.
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
            removed = score - mean(score, tokens.mask) < -self.mu * spread(score, tokens.mask)
        else:
            known = tokens.mask.bool() & (tokens.advantages != 0)
            x = torch.where(known, tokens.flow / tokens.advantages, 0)
            far = negative & (x > self.mu * spread(x, known))
            removed = largest(x, far, (tokens.mask.sum() * self.share).ceil().clamp(min=1))
        return tokens.advantages.expand_as(tokens.logps).masked_fill(removed & negative, 0)
