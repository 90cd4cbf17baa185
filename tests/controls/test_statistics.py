import math

import pytest
import torch
from control_inputs import close

from opefo_trl.controls.statistics import at_random, covariance, largest, mean, std, token_budget

VALUES, MASK = torch.tensor([[1.0, 5.0, 9.0, 100.0]]), torch.tensor([[1, 1, 1, 0]])


def test_means_are_over_the_trained_tokens():
    assert mean(VALUES, MASK) == 5 and std(VALUES, MASK) == pytest.approx(math.sqrt(32 / 3))
    assert mean(VALUES, torch.zeros(1, 4)) == 0
    # mean log p = 5, mean A = 2
    close(covariance(VALUES, torch.tensor([[2.0]]), MASK), [[0, 0, 0, 0]])
    advantages = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    close(covariance(VALUES, advantages, MASK), [[4, 0, 4, -2 * 95]])


def test_the_largest_are_chosen_among_the_eligible():
    assert token_budget(torch.ones(10, 10), 0.057) == 5 and token_budget(torch.ones(10, 10), 0.0001) == 1
    assert largest(VALUES, MASK.bool(), torch.tensor(2.0)).tolist() == [[False, True, True, False]]
    assert largest(VALUES, MASK.bool(), torch.tensor(9.0)).tolist() == [[True, True, True, False]]
    assert not largest(VALUES, torch.zeros(1, 4, dtype=torch.bool), torch.tensor(1.0)).any()
    ties = torch.zeros(4, 4, dtype=torch.float64)
    assert largest(ties, torch.ones(4, 4, dtype=torch.bool), torch.tensor(3.0)).sum() == 3


def test_random_tokens_are_drawn_uniformly():
    torch.manual_seed(0)
    drawn = torch.stack([at_random(MASK.bool(), torch.tensor(1.0)) for _ in range(600)]).float().mean(0)
    close(drawn, [[1 / 3, 1 / 3, 1 / 3, 0]], 0.08)
