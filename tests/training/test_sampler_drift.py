"""vLLM's ratio and drift, computed in the forward that trains, against TRL's own arithmetic written out by hand."""

import math

import pytest
import torch
from tiny import OneRank, metrics, scripted_rollout, train

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.training.sampler_drift import SamplerDrift, importance_ratio

LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, -9.0]])
SAMPLER = torch.tensor([[-1.5, -2.0, math.nan], [-0.5, -0.25, -1.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
# log-ratios: .5, 0, unknown; 0, -.25, masked


def ratio(mode, low=None, high=None):
    return importance_ratio(LOGPS, SAMPLER, MASK, mode, low, high)


def test_a_ratio_of_tokens_is_clamped_or_masked():
    free = torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 0.0]]).exp()
    torch.testing.assert_close(ratio("token_truncate"), free)
    torch.testing.assert_close(ratio("token_truncate", high=1.2), free.clamp(max=1.2))
    torch.testing.assert_close(ratio("token_truncate", 0.9, 1.2), free.clamp(0.9, 1.2))
    torch.testing.assert_close(ratio("token_mask", 0.9, 1.2), torch.tensor([[0.0, 1, 1], [1, 0, 1]]))
    torch.testing.assert_close(ratio("token_mask"), free)


def test_a_ratio_of_sequences_is_one_number_a_row():
    free = torch.tensor([[0.5], [-0.25]]).exp()
    torch.testing.assert_close(ratio("sequence_truncate", high=1.2), free.clamp(max=1.2))
    torch.testing.assert_close(ratio("sequence_mask", low=0.9), torch.tensor([[math.exp(0.5)], [0.0]]))


class TwoRanks:
    """As if another rank held the same."""

    def gather(self, tensor):
        return torch.cat([tensor, tensor])


@pytest.mark.parametrize("accelerator", [OneRank(), TwoRanks()])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_the_metrics_are_of_all_tokens_however_they_were_divided(mode, accelerator):
    by_row = mode.startswith("sequence")
    halves = slice(0, 1), slice(1, 2)
    parts = [
        SamplerDrift.measure(LOGPS[half], SAMPLER[half], MASK[half], ratio(mode)[half], by_row) for half in halves
    ]
    metrics = (parts[0] + parts[1]).metrics(accelerator)
    ratios = ratio(mode)[MASK.bool()] if mode.startswith("token") else ratio(mode)
    expected = {
        "sampling/sampling_logp_difference/mean": 0.75 / 4,  # NaN is not counted
        "sampling/sampling_logp_difference/max": 0.5,
        "sampling/importance_sampling_ratio/min": ratios.min().item(),
        "sampling/importance_sampling_ratio/mean": ratios.mean().item(),
        "sampling/importance_sampling_ratio/max": ratios.max().item(),
    }
    assert metrics == pytest.approx(expected)


def test_without_a_token_that_trains_there_is_no_drift_and_the_ratio_of_a_sequence_all_the_same():
    nothing = torch.zeros(1, 3)
    drift = SamplerDrift.measure(LOGPS[:1], SAMPLER[:1], nothing, ratio("token_truncate")[:1], per_sequence=False)
    assert set(drift.metrics(OneRank()).values()) == {0.0}
    narrow = torch.zeros(1, 1)  # as wide as a ratio of sequences
    drift = SamplerDrift.measure(narrow, narrow, narrow, torch.ones(1, 1), per_sequence=True)
    assert drift.metrics(OneRank())["sampling/importance_sampling_ratio/mean"] == 1


def test_the_drift_of_a_rollout_func_is_watched_without_vllm(out):
    def remote(prompts, trainer):
        rollout = scripted_rollout(prompts, trainer)
        return {**rollout, "logprobs": [[-0.5] * len(ids) for ids in rollout["completion_ids"]]}

    trainer = train(OPEFOTrainer, OPEFOConfig, out, sampling_drift_max=None, extra={"rollout_func": remote})
    assert all(row["sampling/sampling_logp_difference/mean"] > 0.5 for row in metrics(trainer)[:2])
    silent = train(OPEFOTrainer, OPEFOConfig, out, extra={"rollout_func": scripted_rollout})
    assert not any("sampling" in name for row in metrics(silent) for name in row)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo"])
def test_completions_may_have_no_longest_length(loss_type, out):
    run = {"extra": {"rollout_func": scripted_rollout}, "loss_type": loss_type, "max_completion_length": None}
    trainer = train(OPEFOTrainer, OPEFOConfig, out, flow_target=1.0, **run)
    assert all(math.isfinite(row["loss"]) for row in metrics(trainer)[:2])
