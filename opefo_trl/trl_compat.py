"""Names of TRL and of transformers' Trainer that are private and that this package relies on, all in one place.

TRL may rename or change any of them in a minor release. tests/test_trl_compat.py holds each one: when TRL moves it,
that test fails first and says where. Nothing else in the package imports from inside TRL.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler, get_config_model_id, is_async_callable, maybe_gather_lm_head_ctx

__all__: list[str] = []  # of use inside this package only

# Methods that we override or call, with the parameters that we count on
HOOKS: dict[type, dict[str, list[str]]] = {
    GRPOTrainer: {
        "__init__": ["model", "reward_funcs", "args", "train_dataset"],
        "_generate_and_score_completions": ["inputs"],  # the generation batch
        "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        "_generate": ["prompts"],  # completions as lists of rows, before they are padded, scored and graded
        "_get_train_sampler": ["dataset"],
        "_prepare_inputs": ["generation_batch"],  # divides it into `_buffered_inputs`
        "_get_per_token_logps_and_entropies": [  # called by the loss before it reads the advantages
            *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        ],
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "training_step": ["model", "inputs", "num_items_in_batch"],
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_save_checkpoint": ["model", "trial"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "log": ["logs", "start_time"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
    },
    Trainer: {
        "_get_grad_norm": ["model", "grad_norm"],  # called after clipping, before `optimizer.step()`
        "_get_output_dir": ["trial"],
        "_get_learning_rate": [],
        "_run_epoch": ["model", "epoch", "train_dataloader"],
        "_save": ["output_dir", "state_dict"],
        "init_hf_repo": ["token"],
        "_push_from_checkpoint": ["checkpoint_folder"],
        "push_to_hub": ["commit_message", "blocking", "token", "revision"],
    },
}

# Attributes of a GRPOTrainer that we read or set
ATTRIBUTES = (
    "_metrics",  # mode -> metric -> values since the last log
    "_buffered_inputs",  # the micro-batches of a rollout
    "_step",  # micro-batches since the start; modulo `steps_per_generation` the index into `_buffered_inputs`
    *("epsilon_low", "epsilon_high"),  # used as 1 - x and 1 + x in clamp and comparisons, so (B, T) tensors work
    *("_is_vlm", "_tokenizer", "aux_loss_enabled", "pad_to_multiple_of", "temperature"),
    *("num_generations", "num_generations_eval", "reward_funcs", "reward_func_names", "reward_weights"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("_logs", "_pending_extra_logs", "_pending_metrics"),  # tables of completions; what reward functions logged
    *("multi_objective_aggregation", "rollout_func", "environment_factories", "train_dataset"),
    *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
)

# Keys of a generation batch: always there, and there in some settings
BATCH_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
OPTIONAL_BATCH_KEYS = (
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio"),
    "tool_mask",
)

# Metrics that the loss logs for each micro-batch
LOSS_EXTREMES = {"clip_ratio/low_min": min, "clip_ratio/high_max": max}
LOSS_MEANS = (
    *("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("cispo_clip_ratio", "vespo/phi_seq_mean"),
)
# Metrics of the scoring pass, each with mean and max, and with min, mean and max
SAMPLING_DRIFT, SAMPLING_RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
# Metrics that are replaced at every step rather than appended to
COUNTERS = ("num_tokens",)

# Arguments of a forward that make a batch multimodal: all that are not about text
MULTIMODAL = frozenset(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters) - {
    *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    *("compute_entropy", "compute_aux_loss"),
}


def vllm_generation() -> Any:
    """Return TRL's module that starts a colocated vLLM engine, by the class `LLM` in its namespace."""
    import trl.generation.vllm_generation as module  # which imports vLLM

    return module
