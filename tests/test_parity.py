"""Without a control, and with lambda 0, a run in TRL's micro-batches is GRPOTrainer's bit for bit."""

import pytest
from tiny import assert_all_moved, assert_equal_runs, train
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer

MORE_LOSSES = ["grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"]
LOSSES = ["dapo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in MORE_LOSSES)]
OFF = {"strict_on_policy": False}
TRL = {"micro_batching": "trl"}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_none_and_lambda_zero_are_bitwise_grpo(loss_type, accumulation, beta, model_path, out):
    run = {
        "model": model_path,
        "max_steps": 4,
        "loss_type": loss_type,
        "beta": beta,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    theirs = train(GRPOTrainer, GRPOConfig, out, **run)
    assert_all_moved(theirs)
    assert_equal_runs(train(OPEFOTrainer, OPEFOConfig, out, control="none", **TRL, **run), theirs)
    zero = {"control_kwargs": {"static_lambda": 0}}
    assert_equal_runs(train(OPEFOTrainer, OPEFOConfig, out, **zero, **TRL, **run), theirs)


@pytest.mark.filterwarnings("ignore:`off_policy_mask_threshold")
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_parity_holds_with_several_updates_per_rollout(loss_type, out):
    run = {"max_steps": 4, "num_iterations": 2, "loss_type": loss_type, "off_policy_mask_threshold": 0.5}
    theirs = train(GRPOTrainer, GRPOConfig, out, **run)
    assert_equal_runs(train(OPEFOTrainer, OPEFOConfig, out, control="none", **run, **TRL, **OFF), theirs)
    zero = {"control_kwargs": {"static_lambda": 0}}
    assert_equal_runs(train(OPEFOTrainer, OPEFOConfig, out, **zero, **run, **TRL, **OFF), theirs)
