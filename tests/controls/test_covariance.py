import math
from dataclasses import replace

import literature
import numpy as np
import pytest
import torch
from control_inputs import arrays, close, random_tokens

from opefo_trl.controls import make_control


def test_clip_cov_draws_among_tokens_of_high_covariance():
    tokens, _ = random_tokens()
    logps, advantages, mask, old, _ = arrays(tokens)
    cov, r = literature.covariances(logps, advantages, mask), np.exp(logps - old)
    clipped = ((r < 0.8) & (advantages < 0)) | ((r > 1.2) & (advantages > 0))
    eligible = (cov > 0.2) & (cov < 2.0) & (mask == 1) & ~clipped
    assert eligible.sum() > 3
    control = make_control("clip_cov", ratio=0.05, low=0.2, high=2.0)
    changed = control.advantages(tokens).detach().numpy() != advantages
    assert changed.sum() == max(1, int(0.05 * mask.sum())) and (eligible | ~changed).all()
    everything = make_control("clip_cov", ratio=1.0, low=0.2, high=2.0).advantages(tokens)
    close(everything, np.where(eligible, 0, advantages))


def test_kl_cov_penalises_the_tokens_of_highest_covariance_and_clips_nothing():
    tokens, _ = random_tokens()
    logps, advantages, mask, old, _ = arrays(tokens)
    cov = np.where(mask == 1, literature.covariances(logps, advantages, mask), -np.inf)
    top = np.argsort(cov, axis=None)[-4:]
    expected = np.zeros(cov.size)
    expected[top] = 0.5 * np.abs(logps - old).ravel()[top]
    control = make_control("kl_cov", ratio=4.2 / mask.sum(), coef=0.5)
    close(control.penalty(tokens), expected.reshape(cov.shape))
    assert control.penalty(tokens).requires_grad and control.clip_range(tokens) == (1.0, math.inf)
    assert not control.uses_clip_range


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_kl_cov_has_no_gradient_strictly_on_policy(noise):
    tokens, _ = random_tokens()
    old_logps = tokens.logps.detach() + noise * torch.randn(tokens.logps.shape)  # the live ones, but for rounding
    make_control("kl_cov", ratio=0.5).penalty(replace(tokens, old_logps=old_logps)).sum().backward()
    assert (tokens.logps.grad == 0).all()


def test_the_covariance_kernel_is_a_gaussian_of_standard_deviations():
    tokens, _ = random_tokens()
    logps, advantages, mask, *_ = arrays(tokens)
    cov = literature.covariances(logps, advantages, mask)
    kept = cov[mask == 1]
    z = (cov - kept.mean()) / kept.std()
    close(make_control("covariance_kernel", width=1.5).advantages(tokens), advantages * np.exp(-(z**2) / (2 * 1.5**2)))
