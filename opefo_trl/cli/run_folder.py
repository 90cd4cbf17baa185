"""A run's folder: which checkpoint to go on from, and whether it is the same run that would go on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from opefo_trl.files import CHECKPOINT_PREFIX, RUN_FILE, TRAINER_STATE_FILE, write_whole

# What makes two runs different runs. How long they are, and what they log, save or publish, does not.
FACTS = tuple(
    """
    model_name_or_path model_revision dtype dataset_name dataset_config dataset_train_split dataset_test_split
    eval_prompts prompt_column answer_column prompt_template unique_problems decontaminate benchmark_source
    reward_funcs reward_weights scale_rewards
    control control_kwargs flow_target flow_schedule flow_lambda_max flow_shape flow_estimator flow_scope
    learning_rate lr_scheduler_type warmup_steps optim weight_decay max_grad_norm seed
    per_device_train_batch_size gradient_accumulation_steps steps_per_generation num_iterations num_generations
    max_completion_length mask_truncated_completions temperature top_p top_k epsilon epsilon_high beta loss_type
    use_peft lora_r lora_alpha lora_target_modules load_in_4bit load_in_8bit
    """.split()  # noqa: SIM905
)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the highest step among those that were written to their end; others are passed over."""
    return max(checkpoints(folder), key=step_of, default=None)


def checkpoints(folder: str | Path) -> list[Path]:
    """Those that were written to their end, in their order."""
    return sorted(filter(is_complete, Path(folder).glob(f"{CHECKPOINT_PREFIX}*")), key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """`trainer_state.json` is the last file that the Trainer writes: if it is whole, so is the rest."""
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
    """Refuse to go back in a folder whose later checkpoints would then be taken for this run's."""
    newest = newest_checkpoint(folder)
    if newest is None or Path(checkpoint).resolve().parent != newest.resolve().parent:
        return
    if step_of(newest) > _recorded_step(Path(checkpoint)):
        raise ValueError(
            f"{str(checkpoint)!r} is not the newest checkpoint: {newest.name} would be taken for one of this run. Set "
            "another --output_dir, or delete the later ones."
        )


def facts_of(*arguments: Any) -> dict[str, Any]:
    """What makes this run itself, as plain data."""
    known = {name: value for part in arguments for name, value in vars(part).items()}
    return json.loads(json.dumps({name: known[name] for name in FACTS if name in known}, default=str))


def check_same_run(folder: str | Path, facts: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that the folder holds."""
    path = Path(folder) / RUN_FILE
    if not path.exists():
        return
    before = json.loads(path.read_text())
    # As text: what is 0.4 in a config file is "0.4" on the command line
    changed = [name for name in facts if name in before and str(facts[name]) != str(before[name])]
    if changed:
        what = ", ".join(f"{name}={before[name]} (now {facts[name]})" for name in changed)
        raise ValueError(
            f"{str(folder)!r} holds a run with {what}. Set another --output_dir, delete that folder, or go on with "
            "changed settings by naming the checkpoint: --resume_from_checkpoint DIR."
        )


def has_ended(folder: str | Path) -> bool:
    """Whether train.py has saved its last model: files of a model may be there before, from a push to the Hub."""
    try:
        return json.loads((Path(folder) / RUN_FILE).read_text()).get("ended") is True
    except (OSError, ValueError):
        return False


def write_facts(folder: str | Path, facts: dict[str, Any]) -> None:
    path = Path(folder) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(json.dumps(facts, indent=2) + "\n"))
