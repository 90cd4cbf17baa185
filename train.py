"""Train a policy with OPEFO, with another entropy control, or with none.

    python train.py                                                # configs/quickstart.yaml: two cores, three minutes
    python train.py --control none --output_dir out/grpo           # the same with plain GRPO
    python train.py --config configs/qwen2.5-0.5b-gsm8k.yaml --flow_target 0.3
    accelerate launch --config_file configs/accelerate/zero2.yaml train.py --config configs/qwen2.5-math-7b.yaml

Every field of OPEFOConfig, GRPOConfig, TrainingArguments and ModelConfig is an option here and a key of a config file.
A run that was interrupted goes on from its newest whole checkpoint when the same command is given again.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from accelerate.utils import set_seed
from datasets import Dataset
from transformers.trainer_callback import ProgressCallback
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig, get_peft_config, get_quantization_config

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.parser import Parser, plain_errors
from opefo_trl.cli.preflight import (
    check_answers,
    check_columns,
    check_model,
    check_prompts,
    check_sizes,
    check_writable,
)
from opefo_trl.cli.progress import EntropyProgress, sentence_of, table_of
from opefo_trl.cli.run_folder import check_newest, check_same_run, facts_of, newest_checkpoint, write_facts
from opefo_trl.data import (
    TEMPLATES,
    bare_problems,
    clean,
    hold_out,
    load_splits,
    pick_split,
    whole_batches,
    with_template,
)
from opefo_trl.data.benchmarks import BENCHMARKS, load_benchmark
from opefo_trl.hub import NotPushedError
from opefo_trl.hub.model_card import RunFacts
from opefo_trl.playground import PLAYGROUND
from opefo_trl.rewards import REWARDS, find_reward

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
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column that holds the problem; by default prompt, problem or question."}
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the right answer, or a field of one (reward_model.ground_truth); by default "
            "answer, reward_model.ground_truth, solution or final_answer, where there is one."
        },
    )
    prompt_template: str = field(
        default="none",
        metadata={
            "help": f"Words around a plain-text problem, as a chat: {', '.join(TEMPLATES)}. 'boxed' asks for the "
            "\\boxed{} that the reward 'math' reads, 'dapo' for the line that 'math_answer_line' reads."
        },
    )
    unique_problems: bool = field(
        default=True,
        metadata={"help": "Whether to take each problem once, and none whose copies have different answers."},
    )
    decontaminate: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Benchmarks whose problems are not to be trained on: {', '.join(BENCHMARKS)}. A problem goes "
            "that holds half of the 8-word sequences of one of theirs."
        },
    )
    benchmark_source: str | None = field(
        default=None, metadata={"help": "Folder with the benchmarks; by default they come from the Hub."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Reward functions: {', '.join(REWARDS)}, or dotted paths (my_rewards.exact). The first one "
            "judges the answer: above 0.5 it counts as right."
        },
    )
    eval_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Prompts to evaluate on, `num_generations_eval` samples each, from the test split or else taken "
            "off the training split (by default 64, and of a training split a tenth at most). 0: no evaluation."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.reward_funcs, str):  # as a config file may have it
            self.reward_funcs = [self.reward_funcs]
        if not self.reward_funcs and self.dataset_name == PLAYGROUND:
            self.reward_funcs = [PLAYGROUND]


def prepare(script: ScriptArguments, args: OPEFOConfig, model: ModelConfig) -> OPEFOTrainer:
    """What can be wrong is found out here, before the first step."""
    if model.model_name_or_path is None:
        raise ValueError("There is no model. Give --model_name_or_path NAME, or a config file that does.")
    if script.dataset_name is None:
        raise ValueError("There is no data. Give --dataset_name NAME: 'playground', a file, or a data set on the Hub.")
    if script.eval_prompts is not None and script.eval_prompts < 0:
        raise ValueError(f"`eval_prompts={script.eval_prompts}` must be 0 or more.")
    if not script.reward_funcs:
        raise ValueError(f"There is no reward. Give --reward_funcs, of {', '.join(REWARDS)} or your own.")
    check_writable(args.output_dir)

    rewards = [find_reward(name, args.max_completion_length or 0) for name in script.reward_funcs]
    train_data, eval_data = prepare_data(script, args, rewards)
    check_sizes(args, len(train_data), eval_data is not None)
    if eval_data is not None:
        samples = args.num_generations_eval or args.num_generations
        eval_data = whole_batches(eval_data, args.per_device_eval_batch_size * args.world_size // samples)

    check_model(model, args.trust_remote_code)

    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = OPEFOTrainer(
        model.model_name_or_path,
        rewards,
        args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(EntropyProgress)
        disable_progress_bar()  # of every file that is saved
    return trainer


def prepare_data(script: ScriptArguments, args: OPEFOConfig, rewards: list) -> tuple[Dataset, Dataset | None]:
    """Problems to train on, clean and readable, and others to evaluate on."""
    splits = load_splits(script.dataset_name, script.dataset_config)
    benchmarks = {name: load_benchmark(name, script.benchmark_source)["problem"] for name in script.decontaminate}

    def problems(split: str, benchmarks: dict) -> Dataset:
        rows = pick_split(splits, split, script.dataset_name)
        rows = bare_problems(rows, script.prompt_column, script.answer_column)
        check_columns(script.reward_funcs, rewards, rows.column_names)
        check_answers(rewards, rows, split)
        rows, left_out = clean(rows, script.unique_problems, script.prompt_template != "none", benchmarks)
        if args.process_index == 0 and len(rows) < left_out.rows:
            print(f"{script.dataset_name}, {split}: {len(rows)} problems, of {left_out}")
        if args.process_index == 0 and any(left_out.leaked.values()):
            Path(args.output_dir, "decontaminated.json").write_text(json.dumps(left_out.leaked, indent=1))
        return with_template(rows, script.prompt_template)

    train = problems(script.dataset_train_split, benchmarks)
    apart = script.dataset_test_split in splits and script.dataset_test_split != script.dataset_train_split
    test = problems(script.dataset_test_split, {}) if apart and script.eval_prompts != 0 else None
    train, test = hold_out(train, test, script.eval_prompts, args.seed, script.dataset_name)
    check_prompts(script.reward_funcs, train[0]["prompt"])
    return train, test


def where_to_begin(args: OPEFOConfig, facts: dict) -> str | None:
    """The checkpoint to go on from: the one that was named, or the newest whole one of the same run."""
    named = str(args.resume_from_checkpoint or "")
    if named.lower() not in ("", "true", "false"):
        if not (Path(named) / "trainer_state.json").is_file():
            raise ValueError(
                f"There is no checkpoint in {named!r}. `resume_from_checkpoint` is a folder checkpoint-N."
            )
        check_newest(named, args.output_dir)
        return named
    newest = newest_checkpoint(args.output_dir)
    if newest is None:
        return None
    if named.lower() == "false":
        raise ValueError(
            f"`resume_from_checkpoint=False`, and {args.output_dir!r} holds {newest.name}, which a later resume would "
            "take for one of this run. Set another --output_dir, or delete that one."
        )
    check_same_run(args.output_dir, facts)
    return str(newest)


def main() -> None:
    # A recipe with `--control none` is how one compares: it goes without saying that its control's fields rest then.
    warnings.filterwarnings("ignore", message="`control='none'` does not use")
    with plain_errors("train.py"):
        parser = Parser((ScriptArguments, OPEFOConfig, ModelConfig))
        script, args, model = parser.parse(sys.argv[1:], QUICKSTART)
        facts = facts_of(script, model, args)
        checkpoint = where_to_begin(args, facts)
        trainer = prepare(script, args, model)
    on_hub = script.dataset_name != PLAYGROUND and not Path(script.dataset_name).expanduser().exists()
    trainer.run_facts = RunFacts(script.dataset_name, on_hub, parser.config_file)
    if args.process_index == 0:
        write_facts(args.output_dir, facts)
    try:
        run(trainer, script, facts, checkpoint)
    except KeyboardInterrupt:
        trainer.accelerator.print(f"\nStopped in step {trainer.state.global_step + 1}. The same command goes on.")
        if trainer.publisher is not None and trainer.publisher.stop():
            print(trainer.publisher.report())
        raise SystemExit(130) from None


def run(trainer: OPEFOTrainer, script: ScriptArguments, facts: dict, checkpoint: str | None) -> None:
    say, out = trainer.accelerator.print, trainer.args.output_dir
    if checkpoint is not None:
        say(f"Going on from {checkpoint}. To begin anew, delete {out} or set another --output_dir.")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(out, _internal_call=True)  # published once, at the end
    if trainer.args.process_index == 0:
        write_facts(out, {**facts, "ended": True})

    # ---- what came of it

    if trainer.curves is not None:
        say(f"\n{table_of(trainer.curves.to_pandas())}")
    if trainer.eval_dataset is not None:
        set_seed(trainer.args.seed, device_specific=True)  # the same samples, whether the run was resumed or not
        scores = trainer.evaluate()
        say(
            f"\nHeld out, {trainer.num_generations_eval} samples for each of {len(trainer.eval_dataset)} prompts: ",
            end="",
        )
        say(sentence_of(scores))
        trainer.save_metrics("eval", scores)
    trainer.create_model_card()
    say(f"\nWritten to {out}: {', '.join(sorted(path.name for path in Path(out).glob('[!.]*')))}")
    if trainer.args.push_to_hub:
        publish(trainer)
    if hasattr(trainer, "end"):  # transformers 5.18: trackers and the process group
        trainer.end()


def publish(trainer: OPEFOTrainer) -> None:
    """Wait for what is on its way to the Hub, and say what is there and what is not."""
    say = trainer.accelerator.print
    say(f"\nPushing to {trainer.hub_model_id} ...")
    try:
        commit = trainer.push_to_hub()
    except NotPushedError as error:  # the run is done, and its model is on disk
        trainer.publisher.stop()
        say(f"\n{trainer.publisher.report()}\n{error}")
        raise SystemExit(1) from None
    if commit is not None:  # the first process
        say(f"\n{trainer.publisher.report()}\nPushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
