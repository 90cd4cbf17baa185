"""Does the predicted flow say what a real optimizer step then does to the entropy?"""

import pytest
import torch
from tiny import tiny_model

from opefo_trl.flow import FlowTotals, token_flow, vocabulary_score

ROWS, LENGTH, BATCHES = 16, 12, 40


def log_probabilities(model, ids):
    return model(ids).logits[:, :-1].log_softmax(-1)


@torch.no_grad()
def sample(model, generator):
    ids = torch.randint(2, 23, (ROWS, 3), generator=generator)
    for _ in range(LENGTH):
        probabilities = model(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return ids


@pytest.mark.parametrize("estimator", ["sampled", "steer", "exact"])
def test_the_sign_of_a_large_predicted_flow_is_right(estimator):
    hits, large = 0, 0
    for seed in range(BATCHES):
        generator = torch.Generator().manual_seed(seed)
        model = tiny_model(seed % 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        ids = sample(model, generator)
        tokens, kept = ids[:, 1:], torch.zeros_like(ids[:, 1:])
        kept[:, 2:] = 1

        logp = log_probabilities(model, ids)
        logps = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        entropies = -(logp.exp() * logp).sum(-1).detach()
        # Rewards that favour what is likely already, or what is not: advantages that carry a large net flow.
        confidence = (logps.detach() * kept).sum(-1)
        advantages = (confidence - confidence.mean()) / confidence.std() * (1 if seed % 2 else -1)
        advantages = advantages + 0.5 * torch.randn(ROWS, generator=generator)
        vocabulary = None
        if estimator == "exact":
            vocabulary = vocabulary_score(model.model(ids).last_hidden_state[:, :-1], model.lm_head.weight)
        flow = token_flow(logps, entropies, advantages, estimator, mask=kept, vocabulary=vocabulary)
        totals = FlowTotals.of(flow, kept, entropies)

        (-(advantages.unsqueeze(1) * logps * kept).sum() / kept.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            after = log_probabilities(model, ids)
        change = ((-(after.exp() * after).sum(-1) - entropies) * kept).sum()
        if totals.net.abs() > 0.25 * (totals.increase + totals.decrease):
            large += 1
            hits += bool(totals.net.sign() == change.sign())
    assert large >= 10
    assert hits >= 0.9 * large
