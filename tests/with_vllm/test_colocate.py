import gc
from pathlib import Path

import pytest
import torch
from tiny import settings, train
from trl import GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import playground_dataset, playground_reward

VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 64}


def run(model_path: str, out: Path, **overrides):
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    common = {**VLLM, **batch, "max_steps": 4, "flow_lambda_max": 1.0}
    return train(OPEFOTrainer, OPEFOConfig, out, model=model_path, **{**common, **overrides})


@pytest.fixture(autouse=True)
def release():
    yield
    gc.collect()


@pytest.mark.parametrize("scope", ["batch", "running"])
def test_a_colocated_run_trains_on_what_vllm_sampled(scope, model_path, tmp_path, monkeypatch):
    calls = []
    score = GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, *args, **kwargs: calls.append(1) or score(self, *args, **kwargs),
    )
    trainer = run(model_path, tmp_path, flow_scope=scope)
    rows = trainer.state.log_history[:4]
    # the weights are synchronised: vLLM's log-probabilities stay those of the policy while it moves
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows)
    assert any(row["flow/lambda"] != 0 for row in rows)
    # one scoring pass a step, TRL's own, which the batch scope shares; and two micro-batches to train
    assert len(calls) == 4 * (1 + 2)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_tokens_that_importance_sampling_masks_out_carry_no_flow(model_path, tmp_path):
    trainer = run(
        model_path,
        tmp_path,
        max_steps=1,
        vllm_importance_sampling_mode="token_mask",
        vllm_importance_sampling_clip_min=1.0 - 1e-9,  # about half of the ratios fall below by rounding
    )
    inputs = trainer._buffered_inputs[0]
    masked = (inputs["importance_sampling_ratio"] == 0) & inputs["completion_mask"].bool()
    assert masked.any()
    assert (inputs["token_flow"][masked] == 0).all()
    assert (inputs["token_flow"][~masked & inputs["completion_mask"].bool()] != 0).any()


def test_exact_flow_of_a_colocated_run(model_path, tmp_path):
    trainer = run(model_path, tmp_path, max_steps=2, flow_estimator="exact")
    assert all(row["flow/increase"] > 0 < row["flow/decrease"] for row in trainer.state.log_history[:2])
    assert torch.isfinite(trainer._last_totals.sums).all()


def test_the_playground_is_served_by_vllm(tmp_path):
    trainer = OPEFOTrainer(
        "playground",
        playground_reward,
        OPEFOConfig(
            **settings(tmp_path, **VLLM, per_device_train_batch_size=32, num_generations=8, learning_rate=1e-4)
        ),
        train_dataset=playground_dataset("train"),
    )
    trainer.train()
    frame = trainer.curves.to_pandas()
    assert (frame["sampling/sampling_logp_difference/mean"] < 1e-5).all()
    assert frame["step"].tolist() == [1, 2] and frame["reward"].between(0.02, 0.6).all()
    assert {len(sample["tokens"]) for sample in trainer.curves.samples} <= set(range(1, 13))
