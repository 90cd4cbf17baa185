"""Entropy flow: how much each token's update is about to change the policy's entropy.

OPEFO (arXiv 2605.11491) estimates, for every generated token t with advantage A_t, probability p_t and conditional
entropy H_t, the first-order change that one policy-gradient step makes to the entropy at that position:

    d_t = -A_t (1 - p_t)^2 (log p_t + H_t)                   in units of the step size

It sums the raising and the lowering part over the batch, E+ and E-, and rescales the two groups by 1 + lambda and
1 - lambda so that they cancel:

    (1 + lambda) E+ = (1 - lambda) E-      =>      lambda* = (E- - E+) / (E- + E+)

Everything here is a pure function of tensors: fp32, detached, and free of host synchronisation. A token whose numbers
are not finite has an unknown flow: it is left out of the sums, counted, and keeps weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from opefo_trl.validation import check_choice

if TYPE_CHECKING:
    from accelerate import Accelerator

ESTIMATORS = ("sampled", "steer", "own_logit", "covariance", "expected", "exact")
# These need a sum over the whole vocabulary at every position, see `vocabulary_score`.
VOCABULARY_ESTIMATORS = ("expected", "exact")
SIDES = ("both", "increase", "decrease")
_SCORE_MAX = 4.0  # nats


@torch.no_grad()
def token_flow(
    logps: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    estimator: str = "sampled",
    *,
    mask: Tensor | None = None,
    vocabulary: Tensor | None = None,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """
    Return the first-order entropy change of each token's update, per unit step.

    Args:
        logps (`Tensor`): log-probability of each sampled token, (B, T).
        entropies (`Tensor`): entropy of the distribution that it was sampled from, in nats, (B, T).
        advantages (`Tensor`): (B,), (B, 1) or (B, T).
        estimator (`str`): one of `ESTIMATORS`.
        mask (`Tensor`, *optional*): 1 on the trained tokens, (B, T). `covariance` takes its means over them.
        accelerator (`Accelerator`, *optional*): takes these means over all ranks.
        vocabulary (`Tensor`, *optional*): `vocabulary_score` of the same estimator, (B, T); needed by `exact` and
            `expected`.

    Returns:
        `Tensor`: (B, T), positive where the update raises entropy; not finite where an input was not.
    """
    logps, entropies, advantages = logps.float(), entropies.float(), advantages.float()
    if advantages.dim() == logps.dim() - 1:
        advantages = advantages.unsqueeze(-1)
    if estimator == "covariance":
        finite = logps.isfinite() & advantages.isfinite()
        if mask is not None:
            finite &= mask.bool()
        summed = [torch.where(finite, values, 0).sum() for values in (advantages.expand_as(logps), logps)]
        sums = torch.stack([*summed, finite.sum().float()])
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        mean_advantage, mean_logp = sums[:2] / sums[2].clamp(min=1)
        return -(advantages - mean_advantage) * (logps - mean_logp)
    return -advantages * flow_score(logps, entropies, estimator, vocabulary)


@torch.no_grad()
def flow_score(logps: Tensor, entropies: Tensor, estimator: str, vocabulary: Tensor | None = None) -> Tensor:
    """
    Return the factor S_t in d_t = -A_t S_t, (B, T): positive on tokens that are more likely than is typical.

    `covariance` has none; the arguments are those of `token_flow`.
    """
    if estimator in VOCABULARY_ESTIMATORS and vocabulary is None:
        raise ValueError(
            f"The {estimator!r} estimator sums over the vocabulary: pass `vocabulary=vocabulary_score(hidden, weight, "
            f"estimator={estimator!r})`, or use one of "
            f"{', '.join(repr(name) for name in ESTIMATORS if name not in VOCABULARY_ESTIMATORS)}."
        )
    # Rounding can give a certain token a probability above 1
    logps, entropies = logps.float().clamp(max=0), entropies.float()
    likely = logps + entropies  # log p + H, above 0 for tokens more likely than exp(-H)
    p, rest = logps.exp(), -torch.expm1(logps)  # rest = 1 - p, without cancellation near 1
    if estimator == "sampled":
        return rest.square() * likely
    if estimator == "steer":
        return rest * likely
    if estimator == "own_logit":
        return p * rest * likely
    if estimator == "exact" and vocabulary is not None:
        return p * likely - vocabulary
    if estimator == "expected" and vocabulary is not None:
        return vocabulary
    check_choice("estimator", estimator, ESTIMATORS)
    raise ValueError(f"The {estimator!r} estimator has no factor for a single token: it compares tokens of a batch.")


@torch.no_grad()
def vocabulary_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    estimator: str = "exact",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    budget: int = 2**24,
) -> Tensor:
    """
    Return the vocabulary sums of the `exact` and `expected` estimators, from hidden states and the LM head.

        exact:     sum_j p_j^2 (log p_j + H)
        expected:  sum_j p_j (1 - p_j)^2 (log p_j + H)

    Logits are computed for `budget // V` positions at a time, never for all at once.

    Args:
        hidden (`Tensor`): last hidden states, (..., D).
        weight, bias (`Tensor`): the LM head, (V, D) and (V,).
        temperature, logit_scale, softcap (`float`): logits = softcap tanh(scale z / softcap) / temperature.
        budget (`int`): logits held at once; 2**24 are 64 MiB in fp32.

    Returns:
        `Tensor`: fp32, (...).
    """
    if estimator not in VOCABULARY_ESTIMATORS:
        raise ValueError(f"{estimator!r} has no vocabulary sum; only {' and '.join(VOCABULARY_ESTIMATORS)} have.")
    scores = []
    for rows in hidden.reshape(-1, hidden.size(-1)).split(max(1, budget // weight.size(0))):
        logits = F.linear(rows, weight, bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logp = F.log_softmax(logits / temperature, dim=-1)
        p = logp.exp()
        scores.append(vocabulary_sum(p, logp - (p * logp).sum(-1, keepdim=True), estimator))
    return torch.cat(scores).view(hidden.shape[:-1])


def vocabulary_sum(p: Tensor, likely: Tensor, estimator: str) -> Tensor:
    """Return the sum of `vocabulary_score` from the probabilities p_j of the vocabulary, (..., V), and log p_j + H."""
    # (1 - p)^2 = 1 + p (p - 2), and the 1 contributes nothing: sum_j p_j (log p_j + H) = 0
    spread = p * p if estimator == "exact" else p * p * (p - 2)
    return (spread * likely).sum(-1)  # not `vecdot`, which autocast would run in 16 bits


@torch.no_grad()
def entropy_score(logps: Tensor, entropies: Tensor) -> Tensor:
    """
    Return log p + H of each token, within -4 and 4 nats, (B, T); 0 where it is not finite.

    In expectation over the sampled token, its policy gradient is minus the gradient of the entropy: an entropy bonus
    of mu changes the advantages by -mu (log p + H), on average, which gives the flow of the bonus without a sum over
    the vocabulary. The bounds keep a single improbable token from outweighing a batch.
    """
    score = logps.float().clamp(max=0) + entropies.float()
    return torch.where(score.isfinite(), score.clamp(-_SCORE_MAX, _SCORE_MAX), 0.0)


@dataclass(frozen=True)
class FlowTotals:
    """
    Both flows of a set of tokens. Totals of micro-batches and of ranks add; all sums travel as one stacked tensor.

    Attributes:
        sums (`Tensor`): [E+, E-, summed entropy, tokens, tokens with unknown flow, hold, summed square of the push,
            pushed tokens], fp32, (8,).
    """

    sums: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        flow: Tensor,
        mask: Tensor,
        entropies: Tensor,
        push: Tensor | None = None,
        push_flow: Tensor | None = None,
    ) -> FlowTotals:
        """
        Return the totals of the tokens where `mask` is 1; all tensors are (B, T).

        `push` is `Control.push`, the change of the advantages per unit of the control's coefficient, 0 where it makes
        none, and `push_flow` the flow of that change. Without them, hold and the sums of the push are 0.
        """
        trained = mask.bool()
        finite = trained & flow.isfinite() & entropies.isfinite()
        flow = flow.float().masked_fill(~finite, 0)
        entropies = entropies.float().masked_fill(~finite, 0)
        pushes = [flow.new_zeros(())] * 3
        if push is not None and push_flow is not None:
            finite_push = finite & push_flow.isfinite()
            pushed = push.float().masked_fill(~finite_push, 0)
            hold = push_flow.float().masked_fill(~finite_push, 0)
            pushes = [hold.sum(), pushed.square().sum(), (pushed != 0).sum().float()]
        return cls(
            torch.stack(
                [
                    flow.clamp(min=0).sum(),
                    flow.neg().clamp(min=0).sum(),
                    entropies.sum(),
                    finite.sum().float(),
                    (trained & ~finite).sum().float(),
                    *pushes,
                ]
            )
        )

    @classmethod
    def load(cls, sums: list[float], device: torch.device) -> FlowTotals:
        """Return the totals that a checkpoint holds; the sixth of six is a sum that is no longer used."""
        if len(sums) == 6:
            sums = [*sums[:5], 0.0, 0.0, 0.0]
        if len(sums) != 8:
            raise ValueError(f"{len(sums)} totals where 8 are expected: it was written by another version")
        return cls(torch.tensor(sums, device=device))

    def __add__(self, other: FlowTotals) -> FlowTotals:
        return FlowTotals(self.sums + other.sums)

    @cached_property
    def on_host(self) -> FlowTotals:
        """The same totals on the CPU, transferred once however often they are asked for."""
        return self if self.sums.device.type == "cpu" else FlowTotals(self.sums.cpu())

    def reduce(self, accelerator: Accelerator) -> FlowTotals:
        """Return the totals over all ranks: one all-reduce of eight numbers."""
        return FlowTotals(accelerator.reduce(self.sums, reduction="sum"))

    def metrics(self) -> dict[str, Tensor]:
        """Return the metrics to log: flows per token, so that batches of different sizes can be compared."""
        tokens = self.tokens.clamp(min=1)
        return {
            "flow/increase": self.increase / tokens,
            "flow/decrease": self.decrease / tokens,
            "flow/net": self.net / tokens,
            "flow/increase_share": self.increase / (self.increase + self.decrease).clamp(min=1e-30),
            "flow/lambda_star": balance(self),
            "guard/unknown_tokens": self.unknown,
        }

    def with_entropy(self, entropy: Tensor) -> FlowTotals:
        """Return the same flows with another mean entropy."""
        sums = self.sums.clone()
        sums[2] = entropy * self.tokens
        return FlowTotals(sums)

    @property
    def increase(self) -> Tensor:
        """E+, the flow of the tokens whose update raises entropy."""
        return self.sums[0]

    @property
    def decrease(self) -> Tensor:
        """E-, the size of the flow of the tokens whose update lowers entropy; positive."""
        return self.sums[1]

    @property
    def net(self) -> Tensor:
        """E+ - E-, the predicted change of entropy."""
        return self.increase - self.decrease

    @property
    def tokens(self) -> Tensor:
        """Tokens in the sums."""
        return self.sums[3]

    @property
    def unknown(self) -> Tensor:
        """Tokens left out because a number was not finite."""
        return self.sums[4]

    @property
    def hold(self) -> Tensor:
        """The flow of the control's push, per unit of its coefficient."""
        return self.sums[5]

    @property
    def push_size(self) -> Tensor:
        """The root mean square of the push over the tokens that have one; 0 if there are none."""
        return (self.sums[6] / self.sums[7].clamp(min=1)).sqrt()

    @property
    def pushed(self) -> Tensor:
        """Tokens that have a push."""
        return self.sums[7]

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the tokens, in nats; NaN if there are none."""
        return self.sums[2] / self.tokens


def balance(totals: FlowTotals) -> Tensor:
    """
    Return lambda* = (E- - E+) / (E- + E+), a 0-d tensor in [-1, 1]; 0 when either side is empty, since 1 or -1 would
    then switch the whole update off.
    """
    both = (totals.increase > 0) & (totals.decrease > 0)
    lambda_star = (totals.decrease - totals.increase) / (totals.decrease + totals.increase)
    return torch.where(both, lambda_star, torch.zeros_like(lambda_star))


def flow_weights(flow: Tensor, lam: Tensor | float, sides: str = "both") -> Tensor:
    """
    Return 1 + lam where flow > 0, 1 - lam where flow < 0, and 1 elsewhere and where it is not finite, (B, T). `sides`
    restricts this to one of the groups.
    """
    check_choice("sides", sides, SIDES)
    finite = flow.isfinite()
    weights = torch.ones_like(flow, dtype=torch.float32)
    if sides != "decrease":
        weights = torch.where(finite & (flow > 0), 1 + lam, weights)
    if sides != "increase":
        weights = torch.where(finite & (flow < 0), 1 - lam, weights)
    return weights
