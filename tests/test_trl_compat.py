"""One test for each private hook of TRL and transformers that trainer.py leans on: a release that moves one fails
here, with the name of the hook, and not in the middle of somebody's run."""

import inspect
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from tiny import build, scripted_rollout, tiny_model, train
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, get_config_model_id, is_async_callable, maybe_gather_lm_head_ctx

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.training.microbatches import EXTREMES, MEANS
from opefo_trl.training.rebatching import Alone


def named(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def recorded(monkeypatch, owner, name) -> list:
    """Calls of a method, as (instance, args, kwargs, result)."""
    calls, original = [], getattr(owner, name)

    def record(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append((self, args, kwargs, result))
        return result

    monkeypatch.setattr(owner, name, record)
    return calls


def test_trl_is_the_series_that_these_hooks_were_read_in():
    assert Version("1.16") <= Version(version("trl")) < Version("1.17")


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (
            GRPOTrainer,
            "_get_per_token_logps_and_entropies",
            ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"],
        ),
        (GRPOTrainer, "_prepare_inputs", ["self", "generation_batch"]),
        (GRPOTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (GRPOTrainer, "training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        (GRPOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer, "_save_checkpoint", ["self", "model", "trial"]),
        (GRPOTrainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (GRPOTrainer, "log", ["self", "logs", "start_time"]),
        (GRPOTrainer, "__init__", ["self", "model", "reward_funcs", "args", "train_dataset"]),
        (Trainer, "_get_grad_norm", ["self", "model", "grad_norm"]),
        (Trainer, "_get_output_dir", ["self", "trial"]),
        (Trainer, "_run_epoch", ["self", "model", "epoch", "train_dataloader"]),
        (Trainer, "_save", ["self", "output_dir", "state_dict"]),
        (Trainer, "init_hf_repo", ["self", "token"]),
        (Trainer, "_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (Trainer, "_finish_current_push", ["self"]),
        (Trainer, "push_to_hub", ["self", "commit_message", "blocking", "token", "revision"]),
        (GRPOTrainer, "create_model_card", ["self", "model_name", "dataset_name", "tags"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_hook_keeps_its_signature(owner, name, parameters):
    assert named(getattr(owner, name))[: len(parameters)] == parameters


def test_the_helpers_are_where_they_were():
    assert named(disable_gradient_checkpointing) == ["model", "gradient_checkpointing_kwargs"]
    assert named(add_fused_lm_head) == ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
    assert callable(maybe_gather_lm_head_ctx) and callable(is_async_callable)
    assert get_config_model_id(tiny_model().config) == ""


class Watched(dict):
    """A batch that notes when its advantages are read."""

    def __init__(self, batch, events):
        super().__init__(batch)
        self.events = events

    def __getitem__(self, key):
        if key == "advantages":
            self.events.append("advantages")
        return super().__getitem__(key)


def test_the_loss_asks_for_logps_before_it_reads_the_advantages(out, monkeypatch):
    events = []
    compute, score = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, model, inputs: compute(self, model, Watched(inputs, events))
    )

    def scored(self, *args, **kwargs):
        events.append("logps")
        assert kwargs["compute_entropy"]
        return score(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", scored)
    train(GRPOTrainer, GRPOConfig, out, max_steps=1)
    assert events[0] == "logps" and "advantages" in events and events.count("logps") == 1


def test_the_scoring_pass_keeps_the_very_tensor_that_it_was_given(out, monkeypatch):
    scores = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    batches = recorded(monkeypatch, GRPOTrainer, "_generate_and_score_completions")
    train(GRPOTrainer, GRPOConfig, out, max_steps=1, num_iterations=2)
    assert batches[0][3]["old_per_token_logps"] is scores[0][3][0]


def test_the_generation_batch_holds_what_the_flow_needs(out, monkeypatch):
    batches = recorded(monkeypatch, GRPOTrainer, "_generate_and_score_completions")
    train(GRPOTrainer, GRPOConfig, out, max_steps=1)
    batch = batches[0][3]
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"} <= set(batch)
    assert batch["advantages"].shape == (8,) and "old_per_token_logps" not in batch


def test_entries_of_ones_own_travel_with_their_rows(out, monkeypatch):
    original = GRPOTrainer._generate_and_score_completions

    def tagged(self, inputs):
        batch = original(self, inputs)
        batch["tag"] = batch["advantages"].unsqueeze(1) * torch.ones_like(batch["completion_ids"])
        return batch

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


def test_only_a_scoring_pass_says_how_many_rows_to_take_at_once(out, monkeypatch):
    calls = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    train(GRPOTrainer, GRPOConfig, out, max_steps=1, num_iterations=2)  # both of its kinds
    sizes = [
        (torch.is_grad_enabled() and logps.requires_grad, kwargs.get("batch_size"))
        for _, _, kwargs, (logps, *_) in calls
    ]
    assert sizes == [(False, 8), (True, None)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "sapo"])
def test_the_loss_logs_of_a_micro_batch_what_is_known_to_be_merged(model_path, out, loss_type, level):
    if (loss_type, level) == ("vespo", "sequence"):
        pytest.skip("TRL refuses it")
    trainer = build(
        GRPOTrainer, GRPOConfig, out, model_path, loss_type=loss_type, importance_sampling_level=level, beta=0.1
    )
    logged = []
    compute = trainer._compute_loss

    def watched(model, inputs):
        before = {name: len(values) for name, values in trainer._metrics["train"].items()}
        loss = compute(model, inputs)
        logged.append(
            {name for name, values in trainer._metrics["train"].items() if len(values) > before.get(name, 0)}
        )
        return loss

    trainer._compute_loss = watched
    trainer.train()
    assert logged[0] and logged[0] <= {*MEANS, *EXTREMES} and {"entropy", "kl"} <= logged[0]


def test_the_loss_asks_other_ranks_only_for_what_alone_answers(model_path, out, monkeypatch):
    """`gather` and `reduce`: anything else would wait for ranks that have other numbers of rows."""
    asked = set()

    class Watched(Alone):
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


def test_tool_masks_are_called_tool_mask(out):
    def rollout(prompts, trainer):
        scripted = scripted_rollout(prompts, trainer)
        return {**scripted, "env_mask": [[1] * len(ids) for ids in scripted["completion_ids"]]}

    trainer = train(GRPOTrainer, GRPOConfig, out, max_steps=1, extra={"rollout_func": rollout})
    assert trainer._buffered_inputs[0]["tool_mask"].shape == trainer._buffered_inputs[0]["completion_mask"].shape


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


def test_the_trainer_keeps_the_attributes_that_are_used(out):
    trainer = build(GRPOTrainer, GRPOConfig, out)
    assert trainer.reward_func_names == ["digit_reward"] and len(trainer.reward_funcs) == 1
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.temperature) == (0.2, 0.2, 1.0)
    assert set(trainer._metrics) == {"train", "eval"} and trainer._tokenizer is trainer.processing_class
    assert trainer.accelerator.mixed_precision == "no" and trainer.is_deepspeed_enabled is False
    assert (trainer.aux_loss_enabled, trainer.pad_to_multiple_of) == (False, None)
    assert trainer.vllm_importance_sampling_correction is True and trainer.loss_type == "dapo"
    assert {"_tag_names", "_name", "_paper"} <= set(dir(GRPOTrainer))


def test_model_state_and_card_survive_a_save(out):
    """`_save_checkpoint` may find its folder made already, with our state in it."""
    train(OPEFOTrainer, OPEFOConfig, out, max_steps=2, save_strategy="steps", save_steps=2)
    assert {"control_state.json", "trainer_state.json", "model.safetensors"} <= {
        path.name for path in (out / "checkpoint-2").iterdir()
    }
