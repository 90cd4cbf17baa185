"""Train a policy with OPEFO, with another entropy control, or with none.

    python train.py                                                # the playground: two cores, three minutes
    python train.py --control none --output_dir out/grpo           # the same with plain GRPO
    python train.py --config configs/qwen2.5-0.5b-gsm8k.yaml --flow_target 0.3
    accelerate launch --config_file configs/accelerate/zero2.yaml train.py --config configs/qwen2.5-math-7b.yaml

Every field of OPEFOConfig, GRPOConfig, TrainingArguments and ModelConfig is an option here and a key of a config file.
A run that was interrupted goes on from its newest whole checkpoint when the same command is given again.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from transformers.trainer_callback import ProgressCallback
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig, get_peft_config, get_quantization_config

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli import Parser, plain_errors
from opefo_trl.data import TEMPLATES, hold_out, load_splits, missing_columns, shape_prompts
from opefo_trl.playground import PLAYGROUND
from opefo_trl.progress import EntropyProgress, table_of
from opefo_trl.rewards import REWARDS, find_reward
from opefo_trl.runs import check_same_run, facts_of, is_finished, newest_checkpoint, state_of, write_facts

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


@dataclass
class ScriptArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'playground', a file (jsonl, json, parquet, csv), a folder, or a data set on the Hub."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the problem."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column that holds the right answer; the reward 'math' looks for 'answer'."}
    )
    prompt_template: str = field(
        default="none",
        metadata={"help": f"Words around a plain-text problem: {', '.join(TEMPLATES)}. 'boxed' makes it a chat."},
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Reward functions: {', '.join(REWARDS)}, or dotted paths (my_rewards.exact). The first one "
            "judges the answer: above 0.5 it counts as right."
        },
    )
    eval_prompts: int = field(
        default=64,
        metadata={
            "help": "Prompts to evaluate on, `num_generations_eval` samples each, from the test split or else taken "
            "off the training split. 0: no evaluation."
        },
    )


def prepare(script: ScriptArguments, args: OPEFOConfig, model: ModelConfig, trained: str | None) -> OPEFOTrainer:
    """What can be wrong is found out here, before the first step. `trained` is where a finished model lies."""
    if model.model_name_or_path is None:
        raise ValueError("There is no model. Give --model_name_or_path NAME, or a config file that does.")
    if script.dataset_name is None:
        raise ValueError("There is no data. Give --dataset_name NAME: 'playground', a file, or a data set on the Hub.")
    if script.eval_prompts < 0:
        raise ValueError(f"`eval_prompts={script.eval_prompts}` must be 0 or more.")
    if not script.reward_funcs:
        raise ValueError(f"There is no reward. Give --reward_funcs, of {', '.join(REWARDS)} or your own.")
    check_writable(args.output_dir)

    splits = load_splits(script.dataset_name, script.dataset_config)
    train_data, eval_data = hold_out(
        splits,
        script.dataset_train_split,
        script.dataset_test_split,
        script.eval_prompts,
        args.seed,
        script.dataset_name,
    )
    shape = (script.prompt_column, script.answer_column, script.prompt_template)
    train_data = shape_prompts(train_data, *shape)
    eval_data = None if eval_data is None else shape_prompts(eval_data, *shape)

    samples, batch = args.num_generations_eval or args.num_generations, args.per_device_eval_batch_size
    if eval_data is not None and batch * args.world_size % samples:
        raise ValueError(
            f"`per_device_eval_batch_size={batch}` on {args.world_size} processes does not divide into groups of "
            f"{samples} samples (`num_generations_eval`, else `num_generations`). Use a multiple, or `eval_prompts=0`."
        )

    rewards = [find_reward(name) for name in script.reward_funcs]
    for name, function in zip(script.reward_funcs, rewards, strict=True):
        for column in missing_columns(function, train_data.column_names):
            raise ValueError(
                f"The reward {name!r} needs a column {column!r}; the data has {', '.join(train_data.column_names)}."
                + (" Name the one with the answers: --answer_column NAME." if column == "answer" else "")
            )

    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    try:
        trainer = OPEFOTrainer(
            trained or model.model_name_or_path,
            rewards,
            args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            quantization_config=get_quantization_config(model),
            peft_config=None if trained else get_peft_config(model),  # its adapter is in there
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The model {model.model_name_or_path!r} cannot be loaded: {reason}") from error
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(EntropyProgress)
        disable_progress_bar()  # of every file that is saved
    return trainer


def check_writable(folder: str) -> None:
    probe = Path(folder) / f".writable-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"Nothing can be written to `output_dir={folder!r}`: {error.strerror}.") from error


def where_to_begin(args: OPEFOConfig, facts: dict) -> str | None:
    """The checkpoint to go on from: the one that was named, or the newest whole one of the same run."""
    named = args.resume_from_checkpoint
    if named and named not in ("True", "true"):
        if not (Path(named) / "trainer_state.json").is_file():
            raise ValueError(
                f"There is no checkpoint in {named!r}. `resume_from_checkpoint` is a folder checkpoint-N."
            )
        return named
    newest = newest_checkpoint(args.output_dir)
    if newest is None:
        return None
    check_same_run(args.output_dir, facts)
    return str(newest)


def main() -> None:
    with plain_errors("train.py"):
        script, args, model = Parser((ScriptArguments, OPEFOConfig, ModelConfig)).parse(sys.argv[1:], QUICKSTART)
        facts = facts_of(script, model, args)
        checkpoint = where_to_begin(args, facts)
        finished = checkpoint is not None and is_finished(Path(checkpoint), args)
        trainer = prepare(script, args, model, trained=checkpoint if finished else None)
    if args.process_index == 0:
        write_facts(args.output_dir, facts)
    if finished:
        trainer.state = state_of(Path(checkpoint))
        trainer.recording.restore(Path(checkpoint))
    try:
        run(trainer, script, checkpoint, finished)
    except KeyboardInterrupt:
        trainer.accelerator.print(f"\nStopped in step {trainer.state.global_step + 1}. The same command goes on.")
        raise SystemExit(130) from None


def run(trainer: OPEFOTrainer, script: ScriptArguments, checkpoint: str | None, finished: bool) -> None:
    say, out = trainer.accelerator.print, trainer.args.output_dir
    if finished:
        say(f"{checkpoint} is the end of a finished run: more --max_steps, or another --output_dir, begin another.")
    else:
        if checkpoint is not None:
            say(f"Going on from {checkpoint}. To begin anew, delete {out} or set another --output_dir.")
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # ---- what came of it

    if trainer.curves is not None:
        say(f"\n{table_of(trainer.curves.to_pandas())}")
    if trainer.eval_dataset is not None:
        scores = trainer.evaluate()
        say(
            f"\nHeld out, {trainer.num_generations_eval} samples for each of {len(trainer.eval_dataset)} prompts: "
            f"reward {scores['eval_reward']:.3f}, entropy {scores['eval_entropy']:.3f}, "
            f"{scores['eval_answers/distinct']:.1f} distinct right answers, "
            f"{scores['eval_answers/solved']:.0%} of the prompts solved"
        )
        trainer.save_metrics("eval", scores)
    on_hub = script.dataset_name != PLAYGROUND and not Path(script.dataset_name).exists()
    dataset_name = script.dataset_name if on_hub else None
    if not finished:  # then it has a card
        trainer.create_model_card(model_name=Path(out).name, dataset_name=dataset_name)
    say(f"\nWritten to {out}: {', '.join(sorted(path.name for path in Path(out).iterdir()))}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        say(f"Pushed to {trainer.hub_model_id}")
    if hasattr(trainer, "end"):  # transformers 5.18: trackers and the process group
        trainer.end()


if __name__ == "__main__":
    main()
