import math

import numpy as np
import pytest
import torch
from control_inputs import arrays, close, random_tokens, totals

from opefo_trl.controls import make_control


def weights_over_a_run(control, entropies):
    tokens, _ = random_tokens()
    weights = []
    for step, entropy in enumerate(entropies):
        for _ in range(2):  # the second micro-batch of a step changes nothing
            control.observe(totals(entropy=entropy), step, len(entropies))
        shaped = control.advantages(tokens)
        assert torch.equal(shaped[tokens.advantages < 0], tokens.advantages[tokens.advantages < 0])
        weights.append(float(shaped[0, 0] / tokens.advantages[0, 0]))
    return weights


def test_schedules_of_the_positive_advantage():
    guided = make_control("positive_advantage", target=0.2, step=0.3)
    weights = weights_over_a_run(guided, [0.5, 0.5, math.nan, 0.1, 0.1, 0.1])
    assert weights == pytest.approx([0.3, 0.6, 0.6, 0.3, 0, 0], abs=1e-6)
    stage = weights_over_a_run(make_control("positive_advantage", schedule="stage"), [1.0] * 8)
    assert stage == pytest.approx([0, 0, 0, 0, 0, 0.25, 0.5, 0.75])
    epoch = make_control("positive_advantage", schedule="epoch", num_train_epochs=3.0)
    assert weights_over_a_run(epoch, [1.0] * 6) == pytest.approx([0, 0, 0.5, 0.5, 1, 1])
    many = make_control("positive_advantage", schedule="epoch", num_train_epochs=22.0)  # 15 / 22 * 22 is below 15
    assert weights_over_a_run(many, [1.0] * 22) == pytest.approx([step / 21 for step in range(22)])


def test_an_epoch_schedule_without_epochs_is_refused():
    with pytest.raises(ValueError, match=r"'epoch'.*`num_train_epochs=1`.* 2 or more.*'stage'"):
        make_control("positive_advantage", schedule="epoch")
    with pytest.raises(ValueError, match=r"'epoch'.*`max_steps=300`.*`num_train_epochs`.*'stage'"):
        make_control("positive_advantage", schedule="epoch", num_train_epochs=3.0, max_steps=300)


def test_random_positive_clip_takes_out_positive_tokens_only():
    tokens, _ = random_tokens()
    _, advantages, mask, *_ = arrays(tokens)
    removed = make_control("random_positive_clip", ratio=0.1).advantages(tokens).numpy() != advantages
    assert removed.sum() == int(0.1 * mask.sum()) and (advantages[removed] > 0).all() and (mask[removed] == 1).all()


def test_signs_and_weights_of_the_advantage():
    tokens, _ = random_tokens()
    a = tokens.advantages.numpy()
    close(make_control("advantage_sign").advantages(tokens), np.maximum(a, 0))
    close(make_control("advantage_sign", keep="negative").advantages(tokens), np.minimum(a, 0))
    close(make_control("negative_reinforcement").advantages(tokens), np.where(a > 0, 0.1 * a, a))
