from dataclasses import replace

import numpy as np
import pytest
from control_inputs import arrays, close, random_tokens, totals

from opefo_trl.controls import make_control


def test_aer_pays_for_the_entropy_of_hard_questions():
    tokens, _ = random_tokens()
    control = make_control("aer", target="0.5x", step=0.01, ease=0.5)
    for step, entropy in enumerate([1.0, 0.4, 0.4, 0.6]):  # the first one sets the target to 0.5
        control.observe(totals(entropy=entropy), step, 10)
    assert float(control.coef) == pytest.approx(0.01)  # 0, up, up, down
    close(control.penalty(tokens), -0.01 * (1 - 0.25 / 0.5) * tokens.entropies.detach().numpy())
    assert control.penalty(tokens).requires_grad
    close(control.penalty(replace(tokens, solved=None)), -0.01 * tokens.entropies.detach().numpy())


def test_entropy_advantage_adds_at_most_a_share_of_the_advantage():
    tokens, _ = random_tokens()
    _, advantages, _, _, entropies = arrays(tokens)
    shaped = make_control("entropy_advantage", alpha=0.3, kappa=3).advantages(tokens)
    close(shaped, advantages + np.minimum(0.3 * entropies, np.abs(advantages) / 3))
