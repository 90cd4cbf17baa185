"""The folder of a run: the checkpoint to resume from, and the settings that the run was started with."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from opefo_trl.files import CHECKPOINT_PREFIX, RUN_FILE, TRAINER_STATE_FILE, write_whole

__all__ = ["checkpoints", "newest_checkpoint"]

# Settings that may differ when a run is resumed. run.json has all others, and resuming with other values is refused,
# so a field that is unknown here is compared. `eval_prompts` is, too: it decides which rows are left to train on.
_MAY_DIFFER_BY_TOPIC = {
    "length and resuming": """
        max_steps num_train_epochs output_dir resume_from_checkpoint ignore_data_skip
        restore_callback_states_from_checkpoint do_train do_eval do_predict
    """,
    "logging": """
        entropy_curves disable_tqdm report_to run_name project trackio_bucket_id trackio_space_id
        trackio_static_space_id log_level log_level_replica log_on_each_node log_completions
        log_completions_hub_repo log_multimodal log_unique_prompts logging_first_step logging_nan_inf_filter
        logging_steps logging_strategy num_completions_to_print include_num_input_tokens_seen
        skip_memory_metrics debug
    """,
    "saving and publishing": """
        save_on_each_node save_only_model save_steps save_strategy save_total_limit enable_jit_checkpoint
        load_best_model_at_end metric_for_best_model greater_is_better push_to_hub hub_always_push hub_model_id
        hub_private_repo hub_revision hub_strategy
    """,
    "evaluation": """
        eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
        eval_use_gather_object per_device_eval_batch_size num_generations_eval batch_eval_metrics
        include_for_metrics prediction_loss_only bf16_full_eval fp16_full_eval
    """,
    "guards": "nonfinite sampling_drift_max strict_on_policy",
    "machine, memory and speed": """
        generation_batch_size use_cpu local_rank bf16 fp16 tf32 full_determinism attn_implementation
        trust_remote_code parallelism_config accelerator_config deepspeed ds3_gather_for_generation fsdp
        fsdp_config ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
        ddp_static_graph ddp_timeout dataloader_multiprocessing_context dataloader_num_workers
        dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor gradient_checkpointing
        gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs micro_batching
        torch_compile torch_compile_backend torch_compile_mode
        torch_empty_cache_steps use_liger_kernel liger_kernel_config use_cache cache_implementation
        auto_find_batch_size use_transformers_paged use_transformers_continuous_batching
        transformers_continuous_batching_config use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
        vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size vllm_group_port
        vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    """,
}
_MAY_DIFFER = frozenset(" ".join(_MAY_DIFFER_BY_TOPIC.values()).split())


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step."""
    return max(checkpoints(folder), key=step_of, default=None)


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run in the order of their steps."""
    return sorted(filter(is_complete, Path(folder).glob(f"{CHECKPOINT_PREFIX}*")), key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Return whether `trainer_state.json`, the last file that `Trainer._save_checkpoint` writes, records the step in
    the folder's name."""
    if not re.fullmatch(rf"{CHECKPOINT_PREFIX}\d+", checkpoint.name):
        return False
    try:
        return _recorded_step(checkpoint) == step_of(checkpoint)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _recorded_step(checkpoint: Path) -> int:
    return json.loads((checkpoint / TRAINER_STATE_FILE).read_text())["global_step"]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def check_newest(checkpoint: str | Path, folder: str | Path) -> None:
    """Raise if `checkpoint` is not the newest of `folder`: a later resume would continue from the newer one."""
    newest = newest_checkpoint(folder)
    if newest is None or Path(checkpoint).resolve().parent != newest.resolve().parent:
        return
    if step_of(newest) > _recorded_step(Path(checkpoint)):
        raise ValueError(
            f"`resume_from_checkpoint={str(checkpoint)!r}` is older than {newest.name} in the same folder, which a "
            "later resume would continue from. Set another --output_dir, or delete the newer checkpoints."
        )


def settings_of(*dataclasses: Any) -> dict[str, Any]:
    """Return the fields of the script's dataclasses that must match to resume, as JSON, without access tokens."""
    settings = {
        field.name: getattr(part, field.name)
        for part in dataclasses
        for field in fields(part)
        if field.init and field.name not in _MAY_DIFFER
    }
    return json.loads(json.dumps(_without_tokens(settings), default=str))


def _without_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """Drop access tokens, also from dict fields (`model_init_kwargs`)."""
    return {
        name: _without_tokens(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in ("token", "use_auth_token", "hub_token", "push_to_hub_token")
    }


def check_same_run(folder: str | Path, settings: dict[str, Any]) -> None:
    """Raise if the run in `folder` has other settings. Fields that its run.json lacks are not compared; without a
    run.json nothing is."""
    path = Path(folder) / RUN_FILE
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}. Delete it to resume without a comparison.") from None
    changed = [name for name in settings if name in saved and _comparable(settings[name]) != _comparable(saved[name])]
    if changed:
        differences = ", ".join(f"{name}={saved[name]} (now {settings[name]})" for name in changed)
        raise ValueError(
            f"{str(folder)!r} holds a run with {differences}. Set another --output_dir, delete that folder, or resume "
            "with the changed settings by naming the checkpoint: --resume_from_checkpoint DIR."
        )


def _comparable(value: Any) -> Any:
    """Convert a value to one form: 20 of a config file is 20.0 or "20" on the command line."""
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if isinstance(value, dict):
        return {name: _comparable(item) for name, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return str(value) if math.isnan(number) else number


def has_ended(folder: str | Path) -> bool:
    """Return whether train.py has saved its last model. (A push may write files of a model earlier.)"""
    return _run_of(folder).get("ended") is True


def saved_setting(model: str, name: str) -> Any:
    """Return a setting of the run whose last model or checkpoint is in the folder; None without one."""
    path = Path(model)
    return _run_of(path.parent if path.name.startswith(CHECKPOINT_PREFIX) else path).get(name)


def _run_of(folder: str | Path) -> dict[str, Any]:
    """Return what run.json in a folder holds; nothing if it cannot be read."""
    try:
        return json.loads((Path(folder) / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}


def write_settings(folder: str | Path, settings: dict[str, Any], ended: bool = False) -> None:
    """Write run.json: the settings, and whether the run has ended."""
    path = Path(folder) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**settings, "ended": True} if ended else settings
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))
