"""One test for each private name of TRL and transformers in trl_compat.py: a release that moves one fails here, with
its name, and not in the middle of somebody's run."""

import inspect
from importlib.metadata import version
from itertools import product

import pytest
import torch
from packaging.version import Version
from tiny import build, recorded, tiny_model, train
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOTrainer
from opefo_trl.training.rebatching import SingleRankAccelerator
from opefo_trl.trl_compat import (
    ATTRIBUTES,
    BATCH_KEYS,
    COUNTERS,
    HOOKS,
    LOSS_EXTREMES,
    LOSS_MEANS,
    MULTIMODAL,
    OPTIONAL_BATCH_KEYS,
    SAMPLING_DRIFT,
    SAMPLING_RATIO,
    RepeatSampler,
    disable_gradient_checkpointing,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
)


def named(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_trl_is_the_series_that_these_hooks_were_read_in():
    assert Version("1.16") <= Version(version("trl")) < Version("1.17")


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [(owner, name, parameters) for owner, hooks in HOOKS.items() for name, parameters in hooks.items()],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_hook_keeps_its_parameters(owner, name, parameters):
    assert named(getattr(owner, name))[1 : len(parameters) + 1] == parameters


def test_every_method_that_overrides_one_of_trls_is_listed():
    inherited = {name for parent in GRPOTrainer.__mro__ for name in vars(parent) if callable(getattr(parent, name))}
    ours = {name for owner in OPEFOTrainer.__mro__ if owner.__module__.startswith("opefo_trl") for name in vars(owner)}
    public = {"train", "__init__", "__module__", "__doc__"}
    assert ours & inherited - public <= {name for hooks in HOOKS.values() for name in hooks}


def test_the_helpers_are_where_they_were():
    assert named(disable_gradient_checkpointing) == ["model", "gradient_checkpointing_kwargs"]
    assert callable(maybe_gather_lm_head_ctx) and callable(is_async_callable)
    assert get_config_model_id(tiny_model().config) == ""


class Watched(dict):
    """A batch that notes when its advantages are read."""

    def __getitem__(self, key):
        self.events += ["advantages"] if key == "advantages" else []
        return super().__getitem__(key)


def test_the_loss_asks_for_logps_before_it_reads_the_advantages(out, monkeypatch):
    events = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    compute = GRPOTrainer._compute_loss

    def watched(self, model, inputs):
        batch = Watched(inputs)
        batch.events = events
        return compute(self, model, batch)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", watched)
    train(GRPOTrainer, GRPOConfig, out, max_steps=1)
    (_, _, kwargs, _), *others = events
    assert kwargs["compute_entropy"] and others and set(others) == {"advantages"}


def test_the_generation_batch_holds_what_the_flow_needs(out, model_path, monkeypatch):
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert all(f'"{name}"' in source for name in OPTIONAL_BATCH_KEYS)
    batches = recorded(monkeypatch, GRPOTrainer, "_generate_and_score_completions")
    train(GRPOTrainer, GRPOConfig, out, max_steps=1)
    train(GRPOTrainer, GRPOConfig, out, model_path, max_steps=1, num_iterations=2, beta=0.1)
    plain, scored = (batch for *_, batch in batches)
    assert set(plain) >= set(BATCH_KEYS)
    assert plain["advantages"].shape == (8,) and not set(OPTIONAL_BATCH_KEYS) & set(plain)
    assert {"old_per_token_logps", "ref_per_token_logps"} <= set(scored)


def test_a_rollout_is_lists_of_rows_until_it_is_graded(out, monkeypatch):
    """`DynamicSampling` changes the lists of inputs and prompts in place, and takes parts of a rollout by index."""
    (rollouts, generations, gradings) = (
        recorded(monkeypatch, GRPOTrainer, name)
        for name in ("_generate_and_score_completions", "_generate", "_calculate_rewards")
    )
    train(GRPOTrainer, GRPOConfig, out, max_steps=1)
    ((_, (inputs,), _, _),), ((_, (prompts,), _, generated),), ((_, grading, _, _),) = rollouts, generations, gradings
    prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = generated
    assert grading[0] is inputs and grading[1] is prompts
    assert grading[2] is completions and grading[3] is completion_ids
    assert [len(rows) for rows in (prompt_ids, completion_ids, completions, prompts, inputs)] == [8] * 5
    assert (tool_mask, logprobs, extra_fields, images, tool_images) == (None, None, {}, None, [])


def test_the_sampler_can_yield_each_prompt_once_in_the_order_of_a_run(plain_trainer):
    order, once = list(plain_trainer._get_train_sampler()), plain_trainer._get_train_sampler()
    assert isinstance(once, RepeatSampler)
    once.mini_repeat_count = once.batch_size = once.repeat_count = 1
    assert list(once) == list(dict.fromkeys(order))
    assert sorted(once) == list(range(64))  # the next pass


def test_a_scoring_pass_says_how_many_rows_to_take_at_once_and_its_very_tensor_is_kept(out, monkeypatch):
    calls = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    batches = recorded(monkeypatch, GRPOTrainer, "_generate_and_score_completions")
    train(GRPOTrainer, GRPOConfig, out, max_steps=1, num_iterations=2)  # a scoring pass and a forward that trains
    assert [(logps.requires_grad, kwargs.get("batch_size")) for _, _, kwargs, (logps, *_) in calls] == [
        (False, 8),
        (True, None),
    ]
    assert batches[0][3]["old_per_token_logps"] is calls[0][3][0]


def test_what_is_not_about_text_is_called_as_it_was():
    """A batch with one of these keeps TRL's grouping: a new one would be trimmed as if it were rows of text."""
    assert {
        *("image_grid_thw", "image_position_ids", "image_sizes", "mm_token_type_ids", "num_images", "num_tiles"),
        *("pixel_attention_mask", "pixel_values", "spatial_shapes", "token_type_ids"),
    } == MULTIMODAL
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert all(f'inputs.get("{name}")' in source for name in MULTIMODAL)


def test_metrics_are_called_as_they_were():
    source = inspect.getsource(GRPOTrainer)
    for name in (*COUNTERS, SAMPLING_DRIFT, SAMPLING_RATIO, *(name.split("/")[-1] for name in LOSS_MEANS)):
        assert name in source, name


def test_entries_of_ones_own_travel_with_their_rows(out, monkeypatch):
    original = GRPOTrainer._generate_and_score_completions

    def tagged(self, inputs):
        batch = original(self, inputs)
        return {**batch, "tag": batch["advantages"].unsqueeze(1) * torch.ones_like(batch["completion_ids"])}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", tagged)
    trainer = train(GRPOTrainer, GRPOConfig, out, max_steps=1, gradient_accumulation_steps=2)
    assert len(trainer._buffered_inputs) == 2
    for inputs in trainer._buffered_inputs:
        assert torch.equal(inputs["tag"][:, 0], inputs["advantages"])


def test_a_rollout_is_a_list_of_micro_batches_that_may_be_replaced(out, monkeypatch):
    """`_prepare_inputs` hands out `_buffered_inputs[_step % steps_per_generation]`, one list for each rollout."""
    original, lists = GRPOTrainer._prepare_inputs, []

    def watched(self, generation_batch):
        inputs = original(self, generation_batch)
        lists.append(self._buffered_inputs)
        assert inputs is self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", watched)
    trainer = train(GRPOTrainer, GRPOConfig, out, max_steps=2, gradient_accumulation_steps=2)
    assert trainer.current_gradient_accumulation_steps == 2
    assert [len(batches) for batches in lists] == [2] * 4
    assert lists[0] is lists[1] and lists[2] is lists[3] and lists[1] is not lists[2]


@pytest.mark.parametrize(
    ("loss_type", "level"),  # TRL refuses vespo by sequence
    [*product(["dapo", "cispo", "sapo"], ["token", "sequence"]), ("vespo", "token")],
)
def test_the_loss_logs_of_a_micro_batch_what_is_known_to_be_merged(model_path, out, loss_type, level):
    trainer = build(
        GRPOTrainer, GRPOConfig, out, model_path, loss_type=loss_type, importance_sampling_level=level, beta=0.1
    )
    compute = trainer._compute_loss

    def watched(model, inputs):
        before = {name: len(values) for name, values in trainer._metrics["train"].items()}
        loss = compute(model, inputs)
        logged = {name for name, values in trainer._metrics["train"].items() if len(values) > before.get(name, 0)}
        assert {"entropy", "kl"} <= logged <= {*LOSS_MEANS, *LOSS_EXTREMES}
        return loss

    trainer._compute_loss = watched
    trainer.train()


def test_the_loss_asks_other_ranks_only_for_what_a_single_rank_answers(model_path, out, monkeypatch):
    """`gather` and `reduce`: anything else would wait for ranks that have other numbers of rows."""
    asked = set()

    class Watched(SingleRankAccelerator):
        def __getattr__(self, name):
            asked.add(name)
            return super().__getattr__(name)

    compute = GRPOTrainer._compute_loss

    def watched(self, model, inputs):
        accelerator, self.accelerator = self.accelerator, Watched(self.accelerator)
        try:
            return compute(self, model, inputs)
        finally:
            self.accelerator = accelerator

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", watched)
    for loss_type in ("dapo", "cispo", "vespo", "sapo"):
        train(GRPOTrainer, GRPOConfig, out, model_path, max_steps=1, loss_type=loss_type, beta=0.1)
    assert asked <= {"autocast", "num_processes", "sync_gradients", "is_main_process", "device"}


def test_the_gradient_norm_is_asked_for_once_a_step_between_backward_and_update(out, monkeypatch):
    seen, original = [], Trainer._get_grad_norm

    def observed(self, model, grad_norm=None):
        seen.append([parameter.grad is not None for parameter in model.parameters()])
        before = next(model.parameters()).clone()
        result = original(self, model, grad_norm)
        assert torch.equal(before, next(model.parameters()))
        return result

    monkeypatch.setattr(Trainer, "_get_grad_norm", observed)
    train(GRPOTrainer, GRPOConfig, out, max_steps=2, gradient_accumulation_steps=2)
    assert len(seen) == 2 and all(all(step) for step in seen)


def test_rewards_are_gathered_and_inf_comes_through(out, monkeypatch):
    calls = recorded(monkeypatch, GRPOTrainer, "_calculate_rewards")
    rewards = [1.0, None, float("inf"), 0.0, 0.0, 1.0, 0.0, 1.0]
    train(GRPOTrainer, GRPOConfig, out, max_steps=1, extra={"reward_funcs": lambda **kwargs: list(rewards)})
    matrix = calls[0][3]
    assert matrix.shape == (8, 1) and matrix[1].isnan() and matrix[2].isinf()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_trainer_keeps_the_attributes_that_are_used(name, plain_trainer):
    assert hasattr(plain_trainer, name)


def test_attributes_hold_what_they_held(plain_trainer):
    trainer = plain_trainer
    assert trainer.reward_func_names == ["digit_reward"] and len(trainer.reward_funcs) == 1
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.temperature) == (0.2, 0.2, 1.0)
    assert set(trainer._metrics) == {"train", "eval"} and trainer._tokenizer is trainer.processing_class
    assert trainer.accelerator.mixed_precision == "no" and trainer.is_deepspeed_enabled is False
    assert {"_tag_names", "_name", "_paper"} <= set(dir(GRPOTrainer))
    # FlowStep and Rebatcher take these from the arguments
    for name in ("loss_type", "max_completion_length", "pad_to_multiple_of", "temperature"):
        assert getattr(trainer, name) == getattr(trainer.args, name)


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory):
    return build(GRPOTrainer, GRPOConfig, tmp_path_factory.mktemp("plain"))
