import literature
import numpy as np
import pytest
from control_inputs import arrays, close, random_tokens

from opefo_trl.controls import make_control


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("exponential", 0.8, 1.0), ("linear", 0.8, 1.2), ("asymmetric", 0.9, 1.0)]
)
def test_steer_weights_by_the_size_of_the_change(kind, low, high):
    tokens, _ = random_tokens()
    logps, advantages, mask, old, entropies = arrays(tokens)
    weights = literature.steer(np.exp(logps), np.exp(old), entropies, advantages, mask, kind, low, high)
    shaped = make_control("steer", map=kind).advantages(tokens).detach().numpy()
    assert np.ptp(weights[mask == 1]) > 0.05
    close(shaped * mask, advantages * weights * mask)
