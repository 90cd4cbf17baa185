import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import build, scripted_rollout, tiny_model
from transformers import TrainerCallback
from watched_runs import assert_same, poison, run

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.training.guards import (
    CollapseGuard,
    DriftGuard,
    MicroBatchRecord,
    NonFiniteError,
    StaleWeightsError,
    StepGuard,
    describe,
)

__all__ = ["poison"]  # the fixture of watched_runs.py, for every test here


# ---- losses and gradients


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stop_leaves_the_parameters_alone_and_says_where(value, out):
    error, before, after = run(out, control="poison", control_kwargs={"steps": [3], "value": value})
    assert isinstance(error, NonFiniteError)
    message = str(error)
    assert "Step 3: not finite on rank 0." in message and "No parameter was updated." in message
    assert "advantages of rows [1] in micro-batch 0" in message and "`nonfinite='skip'`" in message
    assert_same(before[3], after)
    assert not all(torch.equal(before[3][name], before[2][name]) for name in after)  # until then it did train

    dump = json.loads((out / "nonfinite" / "step-3-rank-0.json").read_text())
    assert dump["step"] == 3 and dump["rank"] == 0 and [row["row"] for row in dump["rows"]] == [1]
    assert {"prompt", "completion", "completion_ids", "log-probabilities", "entropies", "advantages"} <= set(
        dump["rows"][0]
    )


def test_the_offending_rows_are_found_when_a_tensor_gives_them_away(out):
    """A broken embedding: the rows that read this token are dumped, and only they."""
    model, broken = tiny_model(), 5

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.embed_tokens.weight.data[broken] = math.nan

    error, before, after = run(out, model=model, callbacks=[Break()], rollout_func=scripted_rollout)
    assert isinstance(error, NonFiniteError) and "log-probabilities of rows [" in str(error)
    dump = json.loads((out / "nonfinite" / "step-2-rank-0.json").read_text())
    assert 0 < len(dump["rows"]) < 8
    for row in dump["rows"]:
        assert broken in row["prompt_ids"] + row["completion_ids"]
        assert "nan" in row["log-probabilities"]
    assert torch.equal(before[2]["lm_head.weight"], after["lm_head.weight"])


def test_a_gradient_that_overflows_under_a_finite_loss_is_caught(out):
    model = tiny_model()
    calls = []

    def explode(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) == 2 else gradient

    model.lm_head.weight.register_hook(explode)
    error, before, after = run(out, model=model)
    assert isinstance(error, NonFiniteError) and "gradient norm" in str(error) and "Step 2" in str(error)
    assert_same(before[2], after)


def test_where_backward_takes_the_update_a_loss_is_judged_before_it(out, monkeypatch):
    monkeypatch.setattr(OPEFOConfig, "updates_in_backward", True)  # as with DeepSpeed
    error, before, end = run(out, control="poison", control_kwargs={"steps": [3]})
    assert isinstance(error, NonFiniteError) and "Step 3" in str(error)
    assert_same(before[3], end)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_overflow_of_half_precision_is_left_to_the_gradient_scaler(precision, out, monkeypatch):
    def overflows(*_):
        monkeypatch.setattr(Accelerator, "mixed_precision", precision)
        return torch.tensor(math.inf)

    monkeypatch.setattr("transformers.Trainer._get_grad_norm", overflows)
    result, _, _ = run(out, max_steps=1)
    assert isinstance(result, NonFiniteError) == (precision == "no"), result


def test_skip_takes_no_step_and_goes_on(out):
    trainer, before, after = run(out, control="poison", control_kwargs={"steps": [2]}, nonfinite="skip", max_steps=5)
    assert_same(before[2], before[3])
    for step in (1, 3, 4):
        assert not all(torch.equal(before[step][name], before[step + 1][name]) for name in after)
    rows = trainer.state.log_history[:5]
    assert [row["guard/skipped_steps"] for row in rows] == [0, 1, 1, 1, 1]
    assert math.isnan(rows[1]["loss"])  # not the 0.0 that the Trainer would log
    taken = [row["loss"] for row in (rows[0], *rows[2:])]
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(taken) / 4)
    assert all(math.isfinite(row["loss"]) for row in (rows[0], *rows[2:]))
    assert all(p.isfinite().all() for p in after.values())


def test_a_broken_reference_model_is_named(out, model_path):
    class Break(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.ref_model.lm_head.weight.data[:] = math.nan

    trainer = build(
        OPEFOTrainer, OPEFOConfig, out, model=model_path, beta=0.1, max_steps=1, extra={"callbacks": [Break()]}
    )
    with pytest.raises(NonFiniteError, match=r"reference log-probabilities of rows \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        trainer.train()


# ---- the counters


def guard_of(policy, path="unused"):
    return StepGuard(policy, Path(path), str)


def test_step_guard_counts():
    guard = guard_of("skip")
    guard.passed(0.5)
    guard.failed("bad")
    guard.passed(1.5)
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert guard.logged_loss(9.0) == 1.0  # = (0.5 + 1.5) / 2
    assert guard.logged_loss(9.0) == 9.0  # nothing skipped since
    guard.failed("bad")
    assert math.isnan(guard.logged_loss(9.0))
    assert guard.final_loss(9.0) == 1.0
    restored = guard_of("skip")
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (restored.skipped, restored.in_a_row, restored.final_loss(9.0)) == (2, 1, 1.0)
    with pytest.raises(NonFiniteError, match=r"bad No parameter was updated. Set `nonfinite='skip'`"):
        guard_of("stop").failed("bad")
    with pytest.raises(NonFiniteError, match=r"bad No parameter was updated\.$"):  # where skipping is refused
        replace(guard_of("stop"), updates_in_backward=True).failed("bad")
    only_skips = guard_of("skip")
    for _ in range(9):
        only_skips.failed("bad")
    assert math.isnan(only_skips.final_loss(9.0))
    with pytest.raises(NonFiniteError, match="10th step in a row"):
        only_skips.failed("bad")


def test_a_rank_is_blamed_by_its_loss_and_by_the_norm_only_if_all_losses_are_finite(tmp_path):
    guard, nan = guard_of("stop", tmp_path), math.nan
    assert guard.inspect([[1.0, 2.0], [3.0, 4.0]], rank=0, step=7) is None
    assert guard.inspect([[1.0, nan], [nan, nan]], rank=0, step=7) == "Step 7: not finite on rank 1."
    blamed = guard.inspect([[1.0, math.inf], [3.0, math.inf]], rank=1, step=7)
    assert blamed.startswith("Step 7: not finite on rank 0, 1. On rank 1: gradient norm inf; the rows are in ")
    assert [path.name for path in tmp_path.iterdir()] == ["step-7-rank-1.json"]
    (tmp_path / "file").touch()  # where the folder should be
    unwritten = guard_of("stop", tmp_path / "file").inspect([[nan, nan]], rank=0, step=7)
    assert unwritten.startswith("Step 7: not finite on rank 0.") and "could not be written" in unwritten


def micro_batch(logps, loss):
    tensors = {"log-probabilities": torch.tensor(logps), "advantages": torch.ones(2, 1)}
    return MicroBatchRecord({}, tensors, torch.tensor([[1, 1], [1, 0]]), torch.tensor(loss))


def test_a_bad_micro_batch_keeps_its_numbers_and_names_its_rows_and_one_in_order_does_neither():
    good = micro_batch([[0.0, 0.0], [0.0, math.nan]], 1.0)  # NaN under the mask
    bad = micro_batch([[0.0, 0.0], [math.nan, 0.0]], math.nan)
    infinite = micro_batch([[math.inf, 0.0], [0.0, 0.0]], 1.0)
    padding = micro_batch([[0.0, 0.0], [0.0, math.nan]], math.nan)  # under the mask: not to blame
    assert good.tensors == {}
    assert all(set(record.tensors) == {"log-probabilities", "advantages"} for record in (bad, infinite, padding))
    assert describe([good]) == ""
    assert describe([good, bad]) == "log-probabilities of rows [1] in micro-batch 1"
    assert describe([padding]) == "loss of micro-batch 0"


# ---- signs


def test_a_drift_is_warned_of_and_the_fifth_in_a_row_stops():
    guard = DriftGuard(0.1)
    assert guard.check(0.1, 1) is None
    for step in range(2, 6):
        assert guard.check(0.25, step).startswith(
            f"Step {step}: the sampler's log-probabilities are 0.25 nats from the policy's on average, more than "
            "`sampling_drift_max=0.1`."
        )
    assert guard.check(0.001, 6) is None  # counted from the beginning again
    for step in range(7, 11):
        guard.check(0.25, step)
    with pytest.raises(StaleWeightsError, match=r"Step 11: .* 5th rollout in a row\. Likely causes: the weights"):
        guard.check(0.25, 11)
    # NaN is not vLLM's fault, and None takes any drift
    assert DriftGuard(0.1).check(math.nan, 1) is None and DriftGuard(0.1).check(math.inf, 1)
    assert all(DriftGuard(None).check(drift, 1) is None for drift in (math.nan, math.inf, 9.0))


def test_a_sampler_that_is_meant_to_differ_is_warned_of_once(out):
    common = {"use_cpu": True, "bf16": False, "report_to": []}
    args = OPEFOConfig(str(out), **common, use_vllm=True, top_p=0.7, repetition_penalty=1.1)
    guard = DriftGuard.of(args)
    assert "`top_p=0.7` and `repetition_penalty=1.1`" in guard.check(0.25, 1)
    assert [guard.check(0.25, step) for step in range(2, 9)] == [None] * 7
    assert DriftGuard.of(OPEFOConfig(str(out), **common, use_vllm=True)) == DriftGuard(0.1)
    of_a_function = DriftGuard.of(OPEFOConfig(str(out), **common))
    assert "your `rollout_func`" in of_a_function.check(0.25, 1)
    assert [of_a_function.check(0.25, step) for step in range(2, 9)] == [None] * 7


def test_an_entropy_that_is_nearly_gone_is_warned_of_once_until_it_is_back():
    guard = CollapseGuard()
    warned = [guard.check(entropy, step) is not None for step, entropy in enumerate([0.3, 0.004, 0.003, 0.006, 0.004])]
    assert warned == [False, True, False, False, False]
    assert guard.check(0.02, 5) is None and "Step 6: entropy is 0.001 nats" in guard.check(0.001, 6)
    assert CollapseGuard().check(math.nan, 1) is None
