"""Micro-batches and flow totals that the tests of controls share."""

import numpy as np
import torch

from opefo_trl.controls import Tokens
from opefo_trl.flow import FlowTotals, token_flow


def random_tokens(seed: int = 0, rows: int = 6, width: int = 9, moved: float = 0.4, vocabulary: int = 7):
    """Tokens drawn from random distributions, and the distributions. `moved` is the distance to the old policy."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64)
    logps_of_all = logits.log_softmax(-1)
    logps = logps_of_all[..., 0]
    entropies = -(logps_of_all.exp() * logps_of_all).sum(-1)
    mask = (torch.rand(rows, width, generator=generator) < 0.8).long()
    old = (logps + moved * torch.randn(rows, width, generator=generator, dtype=torch.float64)).clamp(max=-0.01)
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0, 0.6], dtype=torch.float64)[:rows].unsqueeze(1)
    logps.requires_grad_(), entropies.requires_grad_()
    flow = token_flow(logps, entropies, advantages)
    solved = torch.full((rows, 1), 0.25)
    return Tokens(logps, entropies, advantages, mask, old, flow, solved, advantages > 0), logps_of_all.detach().exp()


def tokens_of(flow: list[list[float]], advantages: list[float]) -> Tokens:
    """Tokens with a given flow."""
    tensor = torch.tensor(flow)
    zeros = torch.zeros_like(tensor)
    return Tokens(zeros, zeros, torch.tensor(advantages).unsqueeze(1), torch.ones_like(tensor), zeros, tensor)


def arrays(tokens: Tokens):
    """logps, advantages (one per token), mask, old logps and entropies as numpy arrays."""
    advantages = tokens.advantages.expand_as(tokens.logps)
    values = (tokens.logps, advantages, tokens.mask, tokens.old_logps, tokens.entropies)
    return [value.detach().numpy() for value in values]


def totals(increase: float = 1.0, decrease: float = 3.0, entropy: float = 1.0, hold: float = 4.0) -> FlowTotals:
    """Totals of two tokens, whose push has size 1 and the flow `hold`; if that is 0 they have none."""
    pushed = 2.0 if hold else 0.0
    return FlowTotals(torch.tensor([increase, decrease, 2 * entropy, 2.0, 0.0, hold, pushed, pushed]))


def close(left, right, tolerance: float = 1e-6) -> None:
    left = left.detach().double().numpy() if isinstance(left, torch.Tensor) else left
    np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)
