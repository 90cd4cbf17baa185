"""Train a policy with OPEFO, with another entropy control, or with none.

    opefo-trl train                                           # configs/quickstart.yaml: two cores, three minutes
    opefo-trl train --control none --output_dir out/grpo      # the same with plain GRPO
    opefo-trl train --config qwen2.5-0.5b-gsm8k --flow_target 0.3
    opefo-trl train --accelerate_config zero3 --config qwen2.5-math-7b

Every field of OPEFOConfig, GRPOConfig, TrainingArguments and ModelConfig is an option here and a key of a config file.
The same command resumes an interrupted run from its newest complete checkpoint.
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
from opefo_trl.cli import preflight
from opefo_trl.cli.parser import Parser, plain_errors
from opefo_trl.cli.progress import EntropyProgress, sentence_of, table_of
from opefo_trl.cli.run_folder import check_newest, check_same_run, newest_checkpoint, settings_of, write_settings
from opefo_trl.data import (
    TEMPLATES,
    bare_problems,
    check_range,
    clean,
    hold_out,
    keep_by_pass_rate,
    load_splits,
    pick_split,
    whole_batches,
    with_template,
)
from opefo_trl.data.benchmarks import BENCHMARKS, load_benchmark
from opefo_trl.data.pass_rates import DEFAULT_RANGE
from opefo_trl.files import DECONTAMINATED_FILE, TRAINER_STATE_FILE
from opefo_trl.hub import NotPushedError
from opefo_trl.hub.model_card import RunFacts
from opefo_trl.playground import TASKS
from opefo_trl.rewards import REWARDS, find_reward
from opefo_trl.training.colocated_vllm import seed_sampling

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


@dataclass
class ScriptArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(TASKS)}, a file (jsonl, json, parquet, csv), a folder, or a data set on the Hub."
        },
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
            "answer, reward_model.ground_truth, expected_answer, final_answer or solution, the first that is there."
        },
    )
    prompt_template: str = field(
        default="none",
        metadata={
            "help": f"Template that turns a plain-text problem into a chat: {', '.join(TEMPLATES)}. 'boxed' asks for "
            "the \\boxed{} that the reward 'math' reads, 'dapo' for the line that 'math_answer_line' reads."
        },
    )
    unique_problems: bool = field(
        default=True,
        metadata={"help": "Whether to keep each problem once, and none whose copies have different answers."},
    )
    decontaminate: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Benchmarks whose problems are removed from the training data: {', '.join(BENCHMARKS)}. A "
            "problem with half of the 8-word sequences of a benchmark's problem is removed."
        },
    )
    benchmark_source: str | None = field(
        default=None, metadata={"help": "Folder with the benchmarks. By default they come from the Hub."}
    )
    pass_rates: str | None = field(
        default=None,
        metadata={
            "help": "File of the pass rates of the training problems, which opefo-trl eval --dataset_name writes."
        },
    )
    keep_pass_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest pass rate to train on, with pass_rates. By default 0.1 and 0.9."},
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
            "help": "Prompts to evaluate on, with `num_generations_eval` samples each. They come from the test split, "
            "or are taken off the training split. By default 64, but at most a tenth of a training split. 0: no "
            "evaluation."
        },
    )

    def __post_init__(self) -> None:
        for name in ("reward_funcs", "decontaminate"):
            if isinstance(getattr(self, name), str):  # a config file may have one name instead of a list
                setattr(self, name, [getattr(self, name)])
        if not self.reward_funcs and self.dataset_name in TASKS:
            self.reward_funcs = [self.dataset_name]
        if self.keep_pass_rates is not None:
            if self.pass_rates is None:
                raise ValueError(
                    "`keep_pass_rates` needs the pass rates: --pass_rates FILE, which `opefo-trl eval --dataset_name` "
                    "writes."
                )
            check_range(self.keep_pass_rates)


def main(arguments: list[str] | None = None) -> None:
    """Run with these options, or with those of the command line; benchmarks run many in one process."""
    # Adding `--control none` to a recipe is the usual comparison, so unused fields of its control need no warning
    warnings.filterwarnings("ignore", message="`control='none'` does not use")
    with plain_errors("train.py"):
        parser = Parser((ScriptArguments, OPEFOConfig, ModelConfig), prog="opefo-trl train")
        script, args, model = parser.parse(sys.argv[1:] if arguments is None else arguments, QUICKSTART)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        settings = {**settings_of(script, args, model), "completions_per_update": rows}
        checkpoint = find_checkpoint(args, settings)
        trainer = make_trainer(script, args, model)
    on_hub = script.dataset_name not in TASKS and not Path(script.dataset_name).expanduser().exists()
    trainer.run_facts = RunFacts(script.dataset_name, on_hub, parser.config_file)
    if args.process_index == 0:
        write_settings(args.output_dir, settings)
    try:
        run(trainer, settings, checkpoint)
    except KeyboardInterrupt:
        trainer.accelerator.print(f"\nStopped in step {trainer.state.global_step + 1}. The same command resumes.")
        if trainer.publisher is not None and trainer.publisher.stop():
            print(trainer.publisher.report())
        raise SystemExit(130) from None


# ---- before the first step: everything that can be wrong is checked here


def find_checkpoint(args: OPEFOConfig, settings: dict) -> str | None:
    """Return the checkpoint to resume from: the one that was named, or the newest complete one of the same run."""
    named = str(args.resume_from_checkpoint or "")
    if named.lower() not in ("", "true", "false"):
        if not (Path(named) / TRAINER_STATE_FILE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint={named!r}`: there is no checkpoint. Give a folder checkpoint-N."
            )
        check_newest(named, args.output_dir)
        return named
    newest = newest_checkpoint(args.output_dir)
    if newest is None:
        return None
    if named.lower() == "false":
        raise ValueError(
            f"`resume_from_checkpoint=False`, but {args.output_dir!r} holds {newest.name}, which a later resume would "
            "continue from. Set another --output_dir, or delete that one."
        )
    check_same_run(args.output_dir, settings)
    if not any(newest.glob("rng_state*")):
        raise ValueError(
            f"{str(newest)!r} cannot be resumed from by itself: it has no optimizer, as `save_only_model=True` leaves "
            f"it out, and Adam and the learning rate would begin anew. Name it to accept that "
            f"(--resume_from_checkpoint {newest}), or set another --output_dir."
        )
    return str(newest)


def make_trainer(script: ScriptArguments, args: OPEFOConfig, model: ModelConfig) -> OPEFOTrainer:
    """Check all settings, load data and model, and return the trainer."""
    if model.model_name_or_path is None:
        raise ValueError("There is no model. Give --model_name_or_path NAME, or a config file that does.")
    if script.dataset_name is None:
        raise ValueError("There is no data. Give --dataset_name NAME: 'playground', a file, or a data set on the Hub.")
    if script.eval_prompts is not None and script.eval_prompts < 0:
        raise ValueError(f"`eval_prompts={script.eval_prompts}` must be 0 or more.")
    if not script.reward_funcs:
        raise ValueError(f"There is no reward. Give --reward_funcs: {', '.join(REWARDS)}, or your own.")
    preflight.check_writable(args.output_dir)

    rewards = [find_reward(name, args.max_completion_length or 0) for name in script.reward_funcs]
    train_data, eval_data = load_data(script, args, rewards)
    preflight.check_sizes(args, len(train_data), eval_data is not None)
    if eval_data is not None:
        samples = args.num_generations_eval or args.num_generations
        eval_data = whole_batches(eval_data, args.per_device_eval_batch_size * args.world_size // samples)

    preflight.check_model(model, args.trust_remote_code)
    preflight.warn_about_memory(args, model, train_data["prompt"])

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
        disable_progress_bar()  # a bar for every file that is saved
    return trainer


def load_data(script: ScriptArguments, args: OPEFOConfig, rewards: list) -> tuple[Dataset, Dataset | None]:
    """Return cleaned problems with readable answers to train on, and others to evaluate on."""
    splits = load_splits(script.dataset_name, script.dataset_config)
    benchmarks = {name: load_benchmark(name, script.benchmark_source)["problem"] for name in script.decontaminate}

    def problems(split: str, benchmarks: dict) -> Dataset:
        rows = pick_split(splits, split, script.dataset_name)
        rows = bare_problems(rows, script.prompt_column, script.answer_column)
        preflight.check_columns(script.reward_funcs, rewards, rows.column_names)
        preflight.check_answers(rewards, rows, split)
        rows, cleaned = clean(rows, script.unique_problems, script.prompt_template != "none", benchmarks)
        if args.process_index == 0 and len(rows) < cleaned.rows:
            print(f"{script.dataset_name}, {split}: {len(rows)} problems, from {cleaned}")
        if args.process_index == 0 and any(cleaned.leaked.values()):
            Path(args.output_dir, DECONTAMINATED_FILE).write_text(json.dumps(cleaned.leaked, indent=1))
        return rows

    train = problems(script.dataset_train_split, benchmarks)
    names_test = script.dataset_test_split != "test" or "test" in splits  # the default may be missing
    has_test = names_test and script.dataset_test_split != script.dataset_train_split
    test = problems(script.dataset_test_split, {}) if has_test and script.eval_prompts != 0 else None
    train, test = hold_out(train, test, script.eval_prompts, args.seed, script.dataset_name)
    if script.pass_rates is not None:  # the held-out rows stay what they are without a filter
        train, summary = keep_by_pass_rate(train, script.pass_rates, script.keep_pass_rates or DEFAULT_RANGE)
        if args.process_index == 0:
            print(summary)
    train = with_template(train, script.prompt_template)
    test = None if test is None else with_template(test, script.prompt_template)
    preflight.check_prompts(script.reward_funcs, train[0]["prompt"])
    return train, test


# ---- the run


def run(trainer: OPEFOTrainer, settings: dict, checkpoint: str | None) -> None:
    """Train, evaluate, and write model, curves and card; push them to the Hub if the run does."""
    say, out = trainer.accelerator.print, trainer.args.output_dir
    if checkpoint is not None:
        say(f"Resuming from {checkpoint}. To start anew, delete {out} or set another --output_dir.")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(out, _internal_call=True)  # so that it is pushed once, at the end
    if trainer.args.process_index == 0:
        write_settings(out, settings, ended=True)

    if trainer.curves is not None:
        say(f"\n{table_of(trainer.curves.to_pandas())}")
    if trainer.eval_dataset is not None:
        evaluate(trainer)
    trainer.create_model_card()
    say(f"\nWritten to {out}: {', '.join(sorted(path.name for path in Path(out).glob('[!.]*')))}")
    # Threads of gloo may still hold tensors of the last collective: a rank that left now could abort
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        publish(trainer)
    if hasattr(trainer, "end"):  # transformers 5.18: trackers and the process group
        trainer.end()


def evaluate(trainer: OPEFOTrainer) -> None:
    """Evaluate the model on the held-out prompts."""
    set_seed(trainer.args.seed, device_specific=True)  # the same samples, resumed or not
    seed_sampling(trainer.args, trainer.accelerator, 0)  # one seed for the ranks of an engine
    scores = trainer.evaluate()
    samples, prompts = trainer.num_generations_eval, len(trainer.eval_dataset)
    trainer.accelerator.print(f"\nHeld out, {samples} samples for each of {prompts} prompts: {sentence_of(scores)}")
    trainer.save_metrics("eval", scores)


def publish(trainer: OPEFOTrainer) -> None:
    """Wait for the uploads to the Hub, and report what is there and what is not."""
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
