import gc
import json
import random
import shutil
from pathlib import Path

import pytest
from pandas import read_parquet
from peft import LoraConfig
from scripts import python
from tiny import build, recorded, settings, tiny_dataset, train
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.playground import playground_dataset, playground_reward
from opefo_trl.rewards import math_reward
from opefo_trl.training.guards import StaleWeightsError

BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 64}


def run(model_path: str, out: Path, **overrides):
    common = {**VLLM, **BATCH, "max_steps": 4, "flow_lambda_max": 1.0}
    return train(OPEFOTrainer, OPEFOConfig, out, model=model_path, **{**common, **overrides})


@pytest.fixture(autouse=True)
def release():
    yield
    gc.collect()


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 0.05, "extra": {"peft_config": LORA}}])
@pytest.mark.parametrize("scope", ["batch", "running"])
def test_a_colocated_run_trains_on_what_vllm_sampled(scope, settings, model_path, tmp_path):
    trainer = run(model_path, tmp_path, flow_scope=scope, **settings)
    rows = trainer.state.log_history[:4]
    # the weights are synchronised: vLLM's log-probabilities stay those of the policy while it moves
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in rows)
    assert abs(rows[-1]["entropy"] - rows[0]["entropy"]) > 1e-3  # it moves
    assert any(row["flow/lambda"] != 0 for row in rows)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_fresh_groups_are_sampled_with_the_same_weights(model_path, tmp_path):
    def half_flat(completions, number, **_):
        return [float(index % 2) if prompt % 2 else 1.0 for index, prompt in enumerate(number)]

    rows = tiny_dataset().add_column("number", list(range(64)))
    extra = {"reward_funcs": half_flat, "train_dataset": rows}
    trainer = run(model_path, tmp_path, resample_rounds=4, extra=extra)
    logs = trainer.state.log_history[:4]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in logs)
    assert any(row["batching/resampled_groups"] for row in logs)
    assert sum(row["batching/signal_share"] for row in logs) / 4 > 0.8


def test_answers_are_graded_beside_the_engine(model_path, tmp_path):
    def boxed(completions, **columns):
        return math_reward([rf"\boxed{{{completion}}}" for completion in completions], **columns)

    rows = tiny_dataset()
    rows = rows.add_column("answer", [str(index % 10) for index in range(len(rows))])
    trainer = run(model_path, tmp_path, max_steps=1, extra={"reward_funcs": boxed, "train_dataset": rows})
    shares = {key: value for key, value in trainer.state.log_history[0].items() if key.startswith("grading/")}
    assert sum(shares.values()) == pytest.approx(1) and shares["grading/no_answer"] < 1
    assert math_reward.grader.counts and math_reward.grader.alive >= 1


def rising_reward(completions, **_):
    """Reward no two completions alike, so that no row has zero advantage, which would cost a forward of its own."""
    return [float(index) for index in range(len(completions))]


def test_the_running_scope_takes_one_forward_less(model_path, tmp_path, monkeypatch):
    calls = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    common = {**VLLM, "model": model_path, "max_steps": 3, "extra": {"reward_funcs": rising_reward}}
    train(GRPOTrainer, GRPOConfig, tmp_path, **common)
    assert len(calls) == 2 * 3
    for scope, forwards in (("batch", 2), ("running", 1)):
        calls.clear()
        train(OPEFOTrainer, OPEFOConfig, tmp_path, flow_scope=scope, **common)
        assert len(calls) == forwards * 3


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_live_ratio_and_its_metrics_are_trls(mode, model_path, tmp_path, monkeypatch):
    """Add noise to vLLM's log-probabilities, so that the ratio has something to correct."""
    generate = GRPOTrainer._generate_single_turn

    def noisy(self, *args, **kwargs):
        completions, logps = generate(self, *args, **kwargs)
        gauss = random.Random(0).gauss
        return completions, [[logp + gauss(0, 0.1) for logp in row] for row in logps]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", noisy)
    bounds = {"vllm_importance_sampling_clip_min": 0.9, "vllm_importance_sampling_clip_max": 1.1}
    settings = {**VLLM, **bounds, "vllm_importance_sampling_mode": mode, "max_steps": 1, "seed": 0}
    settings.update(model=model_path, **BATCH)
    theirs = train(GRPOTrainer, GRPOConfig, tmp_path, **settings)
    ours = train(OPEFOTrainer, OPEFOConfig, tmp_path, control="none", flow_scope="running", **settings)
    wanted = {name: value for name, value in theirs.state.log_history[0].items() if name.startswith("sampling/")}
    assert len(wanted) == 5 and wanted["sampling/importance_sampling_ratio/min"] < 0.95
    for name, value in wanted.items():
        assert ours.state.log_history[0][name] == pytest.approx(value, abs=1e-5), name
    assert ours.state.log_history[0]["grad_norm"] == pytest.approx(theirs.state.log_history[0]["grad_norm"], rel=1e-4)
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-3, name  # Adam's first step is the sign of the gradient times 0.01


@pytest.mark.parametrize("correction", ["batch", "running", "off"])
def test_weights_that_do_not_reach_vllm_stop_the_run(correction, model_path, tmp_path, caplog):
    settings = {"vllm_importance_sampling_correction": False} if correction == "off" else {"flow_scope": correction}
    trainer = build(OPEFOTrainer, OPEFOConfig, tmp_path, model=model_path, **VLLM, max_steps=20, **settings)
    trainer.vllm_generation.sync_weights = lambda: None
    with pytest.raises(StaleWeightsError, match="5th rollout"):
        trainer.train()
    assert caplog.text.count("`sampling_drift_max=0.1`") == 4
    assert trainer.state.global_step < 19


def completions(folder: Path) -> list[str]:
    return [row for path in sorted((folder / "completions").iterdir()) for row in read_parquet(path)["completion"]]


def test_the_seed_and_a_resume_change_what_vllm_samples(model_path, tmp_path):
    """vLLM seeds the process with its rank; unless we seed it, every run would sample the same."""
    save = {"save_strategy": "steps", "save_steps": 2, "log_completions": True}
    for seed in (1, 2):
        run(model_path, tmp_path / str(seed), seed=seed, learning_rate=1e-8, **save)
    whole, other = completions(tmp_path / "1"), completions(tmp_path / "2")
    assert sorted(whole[:8]) != sorted(other[:8])
    # a resumed run samples with the checkpoint's random state; where that is lost, with a state of its own
    checkpoint = tmp_path / "1" / "checkpoint-2"
    for folder in ("kept", "lost"):
        shutil.copytree(checkpoint, tmp_path / folder / "checkpoint-2")
    (tmp_path / "lost" / "checkpoint-2" / "rng_state.pth").unlink()
    resumed = {}
    for folder in ("kept", "lost"):
        settings = {"model": model_path, "seed": 1, "learning_rate": 1e-8, "max_steps": 4, **save, **VLLM, **BATCH}
        trainer = build(OPEFOTrainer, OPEFOConfig, tmp_path / folder, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2"))
        resumed[folder] = completions(tmp_path / folder)
    assert resumed["kept"] == whole[16:]
    assert resumed["lost"] != whole[16:] and resumed["lost"] != whole[:16]


def test_two_processes_train_on_what_their_engines_sampled(model_path, tmp_path):
    script = Path(__file__).parents[1] / "runs" / "two_engines.py"
    python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, model_path, tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*(rank["steps"] for rank in ranks), strict=True):
        assert first == second  # lambda, flows and drift are those of both
        assert first["sampling/sampling_logp_difference/mean"] < 1e-5
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    assert ranks[0]["completions"] != ranks[1]["completions"]  # each engine samples with a seed of its own


def test_the_playground_is_served_by_vllm(tmp_path):
    batch = {"per_device_train_batch_size": 32, "num_generations": 8, "learning_rate": 1e-4}
    args = OPEFOConfig(**settings(tmp_path, **VLLM, **batch))
    trainer = OPEFOTrainer("playground", playground_reward, args, train_dataset=playground_dataset("train"))
    trainer.train()
    frame = trainer.curves.to_pandas()
    assert (frame["sampling/sampling_logp_difference/mean"] < 1e-5).all()
    assert frame["step"].tolist() == [1, 2] and frame["reward"].between(0.02, 0.6).all()
    assert {len(sample["tokens"]) for sample in trainer.curves.samples} <= set(range(1, 13))
