"""Metrics over uneven micro-batches keep TRL's meaning: means over all tokens or rows of all ranks."""

import pytest
import torch
from tiny import OneRank

from opefo_trl.training.metric_means import MetricMeans


class TwoRanks(OneRank):
    """Another rank has twice the weight, and values that are higher by 1."""

    def gather(self, tensor):
        return torch.cat([tensor, torch.stack([tensor[..., 0] + 1, 2 * tensor[..., 1]], dim=-1)])


@pytest.mark.parametrize(("ranks", "more", "lowest"), [(OneRank(), 0, 0.1), (TwoRanks(), 2 / 3, 0.1)])
def test_means_are_over_all_tokens_and_extremes_are_extremes(ranks, more, lowest):
    means, logged = MetricMeans({"kl"}), {"entropy": [9.0], "kl": [9.0], "clip_ratio/low_min": [9.0], "other": [1.0]}
    for entropy, kl, low, rows, tokens in [
        (1.0, 1.0, 0.2, 1, 30),
        (2.0, 4.0, 0.1, 2, 10),
        (9.9, 9.9, 0.0, 0, 0),  # a row to keep step with other ranks
        (1.25, 3.0, float("nan"), 1, 1),  # completions without a token
    ]:
        logged["entropy"].append(entropy)
        logged["kl"].append(kl)
        logged["clip_ratio/low_min"].append(low)
        means.take(logged, rows, tokens)
    means.log_to(logged, ranks)
    assert logged == {
        "entropy": [9.0, pytest.approx(1.25 + more)],
        "kl": [9.0, pytest.approx(3.0 + more)],
        "clip_ratio/low_min": [9.0, pytest.approx(lowest)],
        "other": [1.0],
    }
    assert means.values == {}
