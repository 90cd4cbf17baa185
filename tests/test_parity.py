"""Without a control, and with lambda 0, a run in TRL's micro-batches is GRPOTrainer's bit for bit."""

import pytest
from tiny import assert_all_moved, assert_equal_runs, train
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer

MORE_LOSSES = ["grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"]
LOSSES = ["dapo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in MORE_LOSSES)]


def assert_parity(out, run):
    """Compare `control="none"`, and OPEFO with lambda 0, with GRPOTrainer."""
    theirs = train(GRPOTrainer, GRPOConfig, out, **run)
    assert_all_moved(theirs)
    updates = {"micro_batching": "trl", "strict_on_policy": "num_iterations" not in run}
    for control in ({"control": "none"}, {"control_kwargs": {"static_lambda": 0}}):
        assert_equal_runs(train(OPEFOTrainer, OPEFOConfig, out, **control, **updates, **run), theirs)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_none_and_lambda_zero_are_bitwise_grpo(loss_type, accumulation, beta, model_path, out):
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    assert_parity(out, {"model": model_path, "max_steps": 4, "loss_type": loss_type, "beta": beta, **sizes})


@pytest.mark.filterwarnings("ignore:`off_policy_mask_threshold")
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_parity_holds_with_several_updates_per_rollout(loss_type, out):
    assert_parity(out, {"max_steps": 4, "num_iterations": 2, "loss_type": loss_type, "off_policy_mask_threshold": 0.5})
