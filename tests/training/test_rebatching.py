"""Exact micro-batching in the trainer: TRL's gradient and TRL's metrics, whatever is trimmed, regrouped or dropped."""

import pytest
import torch
from tiny import (
    PROMPTS,
    SIZES,
    Gradients,
    build,
    digit_reward,
    metrics,
    recorded,
    relative_difference,
    scripted_rollout,
    tiny_dataset,
    tiny_model,
    train,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS, Control

EXACT_LOSSES = ["dapo", "cispo", "vespo", "dr_grpo"]
OTHER_LOSSES = ["grpo", "sapo", "luspo", "bnpo"]
ROWS = 32
OFF = {"strict_on_policy": False}
# The tests of every pair take minutes; these few are what one runs between two edits
ACCUMULATIONS = [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(16, marks=pytest.mark.slow)]


class EntropyPenalty(Control):
    """Pays for entropy, token by token: also in completions without an advantage."""

    by_row = True

    def penalty(self, tokens):
        return -0.1 * tokens.entropies * (tokens.logps < -1)


def flat_for_some(prompts, completions, **_):
    """Two groups have no signal: in one of them all completions are wrong, in the other all are right."""
    flat = {"1+1=": 0.0, "7+0=": 1.0}
    rewards = digit_reward(completions)
    return [flat.get(prompt, reward) for prompt, reward in zip(prompts, rewards, strict=True)]


def one_step(out, accumulation, config=OPEFOConfig, **overrides):
    gradients = Gradients()
    given = {"reward_funcs": flat_for_some, "rollout_func": scripted_rollout, "train_dataset": tiny_dataset(1)}
    given.update(overrides.pop("extra", {}))
    run = {
        "per_device_train_batch_size": ROWS // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        **overrides,
    }
    trainer_class = OPEFOTrainer if config is OPEFOConfig else GRPOTrainer
    trainer = train(trainer_class, config, out, extra={"callbacks": [gradients], **given}, **run)
    return gradients.last, trainer


def shapes(trainer):
    return [tuple(inputs["completion_ids"].shape) for inputs in trainer._buffered_inputs]


def assert_same_gradient(out, accumulation, reference=None, **overrides):
    exact, ours = one_step(out, accumulation, **overrides)
    theirs, trl = one_step(out, accumulation, **(reference or {"micro_batching": "trl", **overrides}))
    assert relative_difference(exact, theirs) < 1e-5
    return ours, trl


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("loss_type", EXACT_LOSSES + OTHER_LOSSES)
def test_the_gradient_is_trls(loss_type, accumulation, out):
    run = {"loss_type": loss_type}
    reference = {"config": GRPOConfig, **run}
    ours, trl = assert_same_gradient(out, accumulation, reference, control="none", **run)
    assert len(shapes(ours)) == len(shapes(trl)) == accumulation
    kept = sum(rows for rows, _ in shapes(ours))
    assert kept == ROWS - 8 or (loss_type == "bnpo" and kept <= ROWS)  # some of its micro-batches may be idle
    assert sum(rows * width for rows, width in shapes(ours)) < 0.85 * sum(rows * width for rows, width in shapes(trl))
    assert max(rows * width for rows, width in shapes(ours)) <= max(rows * width for rows, width in shapes(trl))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`loss_type='luspo'`")
@pytest.mark.parametrize("accumulation", [1, 4, 16])
@pytest.mark.parametrize("control", ["opefo", "penalty"])
@pytest.mark.parametrize("loss_type", EXACT_LOSSES + OTHER_LOSSES)
def test_the_gradient_is_trls_under_a_control(loss_type, control, accumulation, out, monkeypatch):
    monkeypatch.setitem(CONTROLS, "penalty", EntropyPenalty)
    bound = {"flow_lambda_max": 1.0} if control == "opefo" else {}
    ours, _ = assert_same_gradient(out, accumulation, control=control, loss_type=loss_type, **bound)
    assert ours.rebatcher.transforms.drop == (control == "opefo")
    if control == "opefo":
        assert abs(ours.state.log_history[0]["flow/lambda"]) > 1e-3


@pytest.mark.parametrize(
    ("rows", "dropped", "words"),
    [
        ("right", 4, "drops zero-advantage rows but those of right answers that"),
        ("advantaged", 8, "drops zero-advantage rows."),
        ("all", 0, "does not drop, since `control='opefo'` trains on every row"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"loss_type": "grpo"}, {"mask_truncated_completions": True}], ids=str)
def test_a_push_keeps_the_rows_that_it_trains(rows, dropped, words, more, out):
    run = {"flow_shape": "additive", "flow_lambda_max": 1.0, "flow_rows": rows, **more}
    ours, trl = assert_same_gradient(out, 4, **run)
    assert words in str(ours.rebatcher.transforms)
    lambdas = [trainer.state.log_history[0]["flow/lambda"] for trainer in (ours, trl)]
    assert abs(lambdas[0]) > 1e-3 and lambdas[0] == pytest.approx(lambdas[1], abs=1e-5)
    kept = sum(count for count, _ in shapes(ours))
    assert kept == ROWS - dropped or (more and kept <= ROWS - dropped)  # truncated rows are dropped as well


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`(entropy_coef|top_entropy|use_adaptive|off_policy)")
@pytest.mark.parametrize(
    ("overrides", "active"),
    [
        ({}, "trim regroup drop"),
        ({"flow_scope": "running"}, "trim regroup drop"),
        ({"flow_estimator": "exact"}, "trim regroup drop"),
        ({"flow_estimator": "covariance"}, "trim regroup drop"),
        ({"flow_estimator": "covariance", "flow_scope": "running"}, "trim"),
        ({"flow_scope": "micro"}, "trim drop"),
        ({"beta": 0.1}, "trim regroup"),
        ({"loss_type": "bnpo"}, "trim drop"),
        ({"entropy_coef": 0.1}, "trim"),
        ({"top_entropy_quantile": 0.5}, "trim"),
        ({"off_policy_mask_threshold": 0.5}, "trim regroup drop"),
        ({"mask_truncated_completions": True, "loss_type": "dr_grpo"}, "trim regroup drop"),
        ({"importance_sampling_level": "sequence", "control": "none"}, "trim regroup drop"),
        ({"num_iterations": 2, **OFF}, "trim regroup drop"),
        ({"steps_per_generation": 8, **OFF}, "trim regroup drop"),
        ({"pad_to_multiple_of": 4}, "trim regroup drop"),
    ],
    ids=str,
)
def test_each_part_is_active_where_it_is_exact(overrides, active, model_path, out):
    data = {"extra": {"train_dataset": tiny_dataset(2)}}  # eight micro-batches take 16 prompts
    ours, _ = assert_same_gradient(out, 4, model=model_path, **data, **overrides)
    transforms = ours.rebatcher.transforms
    assert active.split() == [name for name in ("trim", "regroup", "drop") if getattr(transforms, name)]
    assert set(transforms.reasons) == {"regroup", "drop"} - set(active.split())


@pytest.mark.parametrize("active", [True, False])
def test_a_routers_loss_leaves_rows_in_place(active, out):
    run = {"router_aux_loss_coef": 0.5 if active else 0.0}
    exact, ours = one_step(out, 4, model=moe(), **run)
    theirs, _ = one_step(out, 4, model=moe(), micro_batching="trl", **run)
    assert relative_difference(exact, theirs) < 1e-5
    assert ours.rebatcher.transforms.regroup is ours.rebatcher.transforms.drop is not active


def test_a_routers_loss_stays_where_no_token_trains(out):
    """Half of the micro-batches hold nothing but truncated completions; `bnpo` weighs the others by their tokens."""

    def truncated(prompts, trainer):
        rollout = scripted_rollout(prompts, trainer)
        rollout["completion_ids"] = [ids[:-1] if i % 4 < 2 else ids for i, ids in enumerate(rollout["completion_ids"])]
        return rollout

    run = {"loss_type": "bnpo", "mask_truncated_completions": True, "router_aux_loss_coef": 0.5}
    gradients = [
        one_step(out, 16, model=moe(), extra={"rollout_func": truncated}, micro_batching=kind, **run)[0]
        for kind in ("exact", "trl")
    ]
    assert relative_difference(*gradients) < 1e-5


def moe():
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, head_dim=16))


# ---- metrics are of all rows


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["batch", "running"])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "cispo"])
def test_metrics_are_means_over_all_rows(loss_type, scope, out):
    run = {"loss_type": loss_type, "flow_scope": scope, "num_iterations": 2, "max_steps": 2, **OFF}
    _, ours = one_step(out, 4, learning_rate=0.05, **run)
    # in one micro-batch, so that TRL's mean is over all tokens
    _, whole = one_step(out, 1, learning_rate=0.05, micro_batching="trl", **run)
    for row, reference in zip(metrics(ours), metrics(whole), strict=True):
        for name in reference:
            assert row[name] == pytest.approx(reference[name], rel=2e-3, abs=2e-5), name
    rows = metrics(ours)
    assert rows[0]["batching/skipped_rows"] == 0.25 and rows[0]["batching/padding"] >= 1


def of_one_prompt(prompts, completions, **_):
    rewards = digit_reward(completions)
    return [reward if prompt == PROMPTS[0] else 0.0 for prompt, reward in zip(prompts, rewards, strict=True)]


def always_well_formed(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_what_rounding_leaves_of_an_advantage_is_no_signal(aggregation, out):
    """Rewards that add up to 0.1 are flat in all of a group, and TRL's advantage there is -7e-5."""
    run = {"reward_weights": [1.0, 0.1], "multi_objective_aggregation": aggregation, "num_generations": 8}
    extra = {"reward_funcs": [of_one_prompt, always_well_formed], "train_dataset": tiny_dataset(1)}
    run |= {"per_device_train_batch_size": 64, "max_steps": 1, "extra": extra}
    trainer = train(OPEFOTrainer, OPEFOConfig, out, zero_advantage_tokens="leave_out", **run)
    assert metrics(trainer)[0]["batching/skipped_rows"] == 7 / 8


def test_dropped_rows_that_are_scored_leave_the_checkpointing_as_it_is(out):
    hooks = []
    for trainer_class, config in ((GRPOTrainer, GRPOConfig), (OPEFOTrainer, OPEFOConfig)):
        run = {"reward_funcs": of_one_prompt, "train_dataset": tiny_dataset(1)}
        options = {"gradient_checkpointing": True, "per_device_train_batch_size": 32, "max_steps": 3, "extra": run}
        trainer = train(trainer_class, config, out, **options)
        hooks.append(len(trainer.model.get_input_embeddings()._forward_hooks))
    assert hooks[1] <= hooks[0]


def test_dropped_rows_are_measured_once(out, monkeypatch):
    """By the scoring pass where there is one, else by a forward without gradient."""
    calls = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    for scope, without_gradient in (("batch", 4), ("running", 1)):  # all 32 rows; the 8 dropped ones in one forward
        calls.clear()
        one_step(out, 4, flow_scope=scope)
        assert [logps.requires_grad for *_, (logps, *_) in calls] == [False] * without_gradient + [True] * 4


# ---- how it is said, and when it rests


def test_the_start_says_what_is_left_out_and_why(model_path, out, caplog):
    one_step(out, 4)
    assert "Exact micro-batching" not in caplog.text  # all parts are active: nothing to warn of
    one_step(out, 4, model=model_path, beta=0.1)
    said = "Exact micro-batching trims padding, regroups rows by length. It does not drop, since `beta=0.1` pulls"
    assert caplog.text.count(said) == 1


def test_multimodal_batches_keep_trls_grouping(out, caplog, monkeypatch):
    original = GRPOTrainer._generate_and_score_completions

    def with_images(self, inputs):
        batch = original(self, inputs)
        return {**batch, "num_images": [1] * len(batch["advantages"])}

    trainer = build(OPEFOTrainer, OPEFOConfig, out, max_steps=2, control="none")
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_images)
    trainer.train()
    assert caplog.text.count("images have rows of their own") == 1
    assert "batching/padding" not in trainer.state.log_history[0]


def test_a_rollout_without_any_signal_trains_nothing_and_stops_nothing(out):
    flat = {"extra": {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}}
    gradients, trainer = one_step(out, 4, weight_decay=0.0, **flat)
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert [rows for rows, _ in shapes(trainer)] == [1, 1, 1, 1]  # the shortest ones keep the count
    assert trainer.state.log_history[0]["entropy"] > 0 == trainer.state.log_history[0]["flow/lambda"]
    before = tiny_model().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
