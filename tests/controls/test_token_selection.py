import math
from dataclasses import replace

import literature
import numpy as np
import pytest
import torch
from control_inputs import arrays, close, random_tokens, totals

from opefo_trl.controls import make_control
from opefo_trl.flow import token_flow


def test_stare_weights_surprising_tokens_while_entropy_is_below_the_target():
    tokens, _ = random_tokens()
    logps, advantages, mask, *_ = arrays(tokens)
    expected = advantages.copy()
    for side, weight in ((advantages > 0, 1.1), (advantages < 0, 0.9)):
        surprise = np.where(side & (mask == 1), -logps, -np.inf)
        top = np.argsort(surprise, axis=None)[-math.ceil(0.1 * (side & (mask == 1)).sum() - 1e-9) :]
        expected.ravel()[top] *= weight
    control = make_control("stare", variant="both")
    assert torch.equal(control.advantages(tokens), tokens.advantages.expand_as(tokens.logps))
    control.observe(totals(entropy=0.2), 0, 10)
    close(control.advantages(tokens), expected)
    control.observe(totals(entropy=0.4), 1, 10)
    assert torch.equal(control.advantages(tokens), tokens.advantages.expand_as(tokens.logps))


def test_adaptive_stare_moves_its_weights_within_their_bounds():
    control = make_control("stare", variant="both", adaptive=True)
    for step in range(60):
        control.observe(totals(entropy=0.1), step, 100)
    assert (float(control.up), float(control.down)) == pytest.approx((1.5, 0.5))


def test_repo_scales_by_the_log_probability_and_its_zeta_follows_the_entropy():
    tokens, _ = random_tokens()
    logps, advantages, *_, entropies = arrays(tokens)
    expected = [literature.repo(x, a, 0.04) for x, a in zip(logps.ravel(), advantages.ravel(), strict=True)]
    close(make_control("repo", zeta=0.04).advantages(tokens), np.array(expected).reshape(logps.shape))
    zetas, control = [], make_control("repo", zeta=2e-4)
    for step, entropy in enumerate([1.0, 0.9, 1.1, 1.1, 1.1, 0.9, 0.9]):
        control.observe(totals(entropy=entropy), step, 10)
        zetas.append(float(control.coef))
    # halved at the first (not below itself), doubled, halved twice across 0, grown, then back
    assert zetas == pytest.approx([1e-4, 2e-4, 1e-4, -1e-4, -2e-4, -1e-4, 1e-4])
    additive = make_control("repo", variant="additive", beta=0.1).advantages(tokens)
    close(additive, advantages - 0.1 * (logps + entropies))


def test_entropy_dynamics_masks_negative_tokens_that_lower_entropy_most():
    tokens, p = random_tokens(vocabulary=5)
    logps, advantages, mask, _, entropies = arrays(tokens)
    score = np.exp(logps) * (logps + entropies)
    kept = score[mask == 1]
    outliers = (advantages < 0) & (mask == 1) & (score - kept.mean() < -0.8 * kept.std())
    assert outliers.any()
    close(make_control("entropy_dynamics", mu=0.8).advantages(tokens), np.where(outliers, 0, advantages))

    p = p.numpy()
    vocabulary = (p**2 * (np.log(p) + entropies[..., None])).sum(-1)
    x = vocabulary - score
    outliers = (advantages < 0) & (mask == 1) & (x > 0.5 * x[(mask == 1) & (advantages != 0)].std())
    sums = torch.tensor(vocabulary)
    exact = replace(
        tokens, flow=token_flow(tokens.logps, tokens.entropies, tokens.advantages, "exact", vocabulary=sums)
    )
    control = make_control("entropy_dynamics", variant="vocabulary", mu=0.5, share=1.0)
    assert control.estimator == "exact" and outliers.any()
    close(control.advantages(exact), np.where(outliers, 0, advantages))
    one = make_control("entropy_dynamics", variant="vocabulary", mu=0.5).advantages(exact)
    assert int((one != tokens.advantages).sum()) == 1
