"""Evaluate a model on maths benchmarks: sample answers, grade them, and report scores with confidence intervals.

    opefo-trl eval --model out/my-model --benchmarks aime24,math500
    opefo-trl eval --model out/my-model --compare out/eval/base/results.json    # paired difference, with interval
    opefo-trl eval --model out/my-model --preset paper                          # sampled as in the OPEFO paper
    opefo-trl eval --model playground --benchmarks playground --k 64            # seconds on a CPU, no network
    opefo-trl eval --model out/my-model --dataset_name train.jsonl --k 8        # pass rates of a training set
    opefo-trl eval --model out/my-model --accelerate_config 8                   # the batches over eight GPUs
    opefo-trl eval --watch out/my-run --benchmarks math500                      # each checkpoint as it comes
    opefo-trl eval --model out/my-run --push_to_hub                             # results to the card, and samples

By default 32 samples for each problem of AIME 2024, AIME 2025 and AMC 2023, and one for each of MATH-500, Minerva and
OlympiadBench, at temperature 0.6 and top-p 0.95 (`--preset paper`: 1.0 and 0.7). vLLM samples if it is installed, else
transformers. The same command resumes an interrupted evaluation.
With --dataset_name, prompts, reward, temperature and top-p are by default those of the training.
"""

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that looking for a GPU does not initialize CUDA

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from opefo_trl.cli import preflight
from opefo_trl.cli.parser import Parser, plain_errors
from opefo_trl.cli.run_folder import is_complete, saved_setting
from opefo_trl.data import TEMPLATES, bare_problems, clean, load_splits, pick_split, with_template
from opefo_trl.data.benchmarks import BENCHMARKS, SIX, benchmark_name
from opefo_trl.evaluation.engines import ENGINES, Decoding, make_engine, resolve_engine
from opefo_trl.evaluation.model_source import DTYPES, ModelSource
from opefo_trl.evaluation.results import check_comparable, read_results, report, score
from opefo_trl.evaluation.samples import (
    FOR_MATHS,
    Evaluation,
    Task,
    TaskGrader,
    benchmark_of,
    check_same_settings,
    load_problems,
    tokenize_problems,
)
from opefo_trl.evaluation.training_set import DEFAULT_K, report_pass_rates, training_task
from opefo_trl.evaluation.watch import watch
from opefo_trl.files import EVAL_FOLDER, PASS_RATES_FOLDER
from opefo_trl.grading import POLICIES, Grader, Outcome
from opefo_trl.grading.grader import cores_of_rank, grader_version
from opefo_trl.hub import NotPushedError, Target
from opefo_trl.hub.results import check_target, push_results, results_target
from opefo_trl.playground import TASKS
from opefo_trl.rewards import find_reward
from opefo_trl.validation import check_choice, check_map

# Temperature and top-p. The paper's are second-hand; its numbers of samples are the defaults of the benchmarks
PRESETS = {"default": (0.6, 0.95), "paper": (1.0, 0.7), "training": (1.0, 1.0)}
_FOR_BENCHMARKS = [
    *("benchmarks", "benchmark_source", "compare", "watch", "push_to_hub", "system_prompt"),
    *("policy", "grading_timeout"),  # those of a training set are its reward's
]
_FOR_TRAINING_SETS = ["dataset_config", "dataset_train_split", "prompt_column", "answer_column", "reward_funcs"]


@dataclass
class EvalArguments:
    model: str | None = field(default=None, metadata={"help": "A folder, a LoRA adapter's folder, or a Hub name."})
    benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Some of {', '.join([*BENCHMARKS, *TASKS])}, separated by commas or spaces. By default the six: "
            f"{', '.join(SIX)}."
        },
    )
    benchmark_source: str | None = field(default=None, metadata={"help": "Folder with the benchmarks, else the Hub."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Output folder. By default eval/ in a local model's folder, or out/eval/."}
    )
    compare: str | None = field(default=None, metadata={"help": "Another results.json to compare with."})
    watch: str | None = field(default=None, metadata={"help": "A run's folder: evaluate each of its checkpoints."})

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A training set instead of benchmarks, as for train.py: write the pass rate of each problem."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_train_split: str | None = field(default=None, metadata={"help": "Its split, by default train."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the problem, as for train.py."})
    answer_column: str | None = field(default=None, metadata={"help": "Column with the answer, as for train.py."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions of the training, of which the first one judges: above 0.5 is right. By default "
            "that of an embedded task, else math."
        },
    )

    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Put the results into the model's card on the Hub, and upload them with their samples."},
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository, else the model's or its run's."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make a new repository private."})

    k: int | None = field(
        default=None,
        metadata={
            "help": "Samples for each problem. By default 32 for AIME and AMC, 16 for the embedded tasks, 8 for a "
            "training set, 1 for the others."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Take this many problems only, the first ones."})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Temperature and top-p by name: 'default' (0.6, 0.95), 'paper' (1.0, 0.7, the OPEFO paper's) or "
            "'training' (1.0, 1.0, TRL's), the default for a training set. --temperature and --top_p take precedence."
        },
    )
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy. By default the preset's."})
    top_p: float | None = field(
        default=None, metadata={"help": "Mass of the nucleus that is sampled from. By default the preset's."}
    )
    max_new_tokens: int = field(default=16_384, metadata={"help": "The model's context may allow less."})
    seed: int = field(default=0, metadata={"help": "Seed that every sample's own seed is derived from."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(TEMPLATES)}. By default boxed, for a training set none, as in train.py."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "A system message before each problem."})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of the chat template, such as '{\"enable_thinking\": false}'. By default those of the "
            "run that trained the model."
        },
    )
    policy: str | None = field(
        default=None, metadata={"help": f"Grading policy of benchmarks: {', '.join(POLICIES)}. By default lenient."}
    )
    grading_timeout: float | None = field(
        default=None, metadata={"help": "Seconds of processor time to grade an answer of a benchmark. By default 5."}
    )

    engine: str = field(default="auto", metadata={"help": f"{', '.join(ENGINES)}. 'auto' is vllm if installed."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Samples in a batch. By default 512 with vLLM, else 32."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of a model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": f"Data type of the weights: {', '.join(DTYPES)}."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model on the Hub brings."})
    max_model_length: int | None = field(default=None, metadata={"help": "Context. By default the model's own."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that hold one model, with vLLM."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of a GPU's memory that vLLM takes."})

    def __post_init__(self) -> None:
        if self.watch == "none":  # takes back that of a config file
            self.watch = None
        if self.benchmarks is None:
            self.benchmarks = list(SIX) if self.dataset_name is None else []
        words = [self.benchmarks] if isinstance(self.benchmarks, str) else self.benchmarks
        names = [name for word in words for name in word.replace(",", " ").split()]
        self.benchmarks = list(dict.fromkeys(benchmark_name(name, "benchmarks", TASKS) for name in names))
        if not self.benchmarks and self.dataset_name is None:
            raise ValueError(f"There is no benchmark. Give --benchmarks: {', '.join([*BENCHMARKS, *TASKS])}.")
        self._set_defaults()
        if self.chat_template_kwargs is None:
            self.chat_template_kwargs = saved_setting(self.watch or self.model or "", "chat_template_kwargs")
        example = '{"enable_thinking": false}'
        self.chat_template_kwargs = check_map("chat_template_kwargs", self.chat_template_kwargs, example) or None
        temperature, top_p = PRESETS[check_choice("preset", self.preset, PRESETS)]
        self.temperature = temperature if self.temperature is None else self.temperature
        self.top_p = top_p if self.top_p is None else self.top_p
        for name in ("k", "limit", "batch_size", "max_model_length", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}={value}` must be 1 or more.")

    def _set_defaults(self) -> None:
        """Set what depends on whether benchmarks are evaluated or a training set; refuse options of the other, and
        those of maths benchmarks where there is none."""
        on_training_set = self.dataset_name is not None
        for name in _FOR_BENCHMARKS if on_training_set else _FOR_TRAINING_SETS:
            if getattr(self, name):
                reason = "is for benchmarks, but `dataset_name` is set" if on_training_set else "needs `dataset_name`"
                raise ValueError(f"`{name}={getattr(self, name)!r}` {reason}. Leave one of the two out.")
        if on_training_set:
            defaults = {
                "dataset_train_split": "train",
                "reward_funcs": [self.dataset_name if self.dataset_name in TASKS else "math"],
                "preset": "training",
                "prompt_template": "none",
                "k": DEFAULT_K,
            }
        else:
            defaults = {"preset": "default", "prompt_template": "boxed"}
            for name in () if self.has_maths else FOR_MATHS:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` is for maths benchmarks, and {', '.join(self.benchmarks)} "
                        "has prompts and a judge of its own. Leave it out."
                    )
        for name, value in {"policy": "lenient", "grading_timeout": 5.0, **defaults}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def has_maths(self) -> bool:
        """Return whether any benchmark is not an embedded task."""
        return any(name not in TASKS for name in self.benchmarks)


def main() -> None:
    with plain_errors("eval.py"):
        (options,) = Parser((EvalArguments,), prog="opefo-trl eval").parse(sys.argv[1:])
        check(options)
        if options.watch is not None:
            settings = {**samples_settings(options), "k": options.k}
            watch(options.watch, options.benchmarks, settings, Path(__file__), sys.argv[1:])
            return
        other = None if options.compare is None else read_results(options.compare)
        # Cores are counted before vLLM starts, because the engine deletes accelerate's variables (LOCAL_WORLD_SIZE)
        grader = Grader(cores_of_rank(), options.grading_timeout, options.policy)
        kind, version = resolve_engine(options.engine)
        source, tasks = load(options)
        folder, batch_size = folder_of(options), options.batch_size or (512 if kind == "vllm" else 32)
        preflight.check_writable(str(folder))
        run = Evaluation(folder, tasks, batch_size, source.context(), options.max_new_tokens, options.seed)
        settings = settings_of(options, source, version, batch_size)
        # The processes wait for each other twice, the second time until the slowest has sampled its share
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        if state.is_main_process:
            settings = check_same_settings(folder, settings, tasks)
        state.wait_for_everyone()
    if state.is_main_process and run.problems_without_room():
        print(
            f"{run.problems_without_room()} problems fill the context of {run.context} tokens and count as not right."
        )

    sample_all(run, options, source, kind, grader, state)
    state.wait_for_everyone()
    if state.is_main_process and options.dataset_name is not None:
        print("\n".join(report_pass_rates(folder, task, run.gather(task)) for task in tasks))
    elif state.is_main_process:
        results = {task.name: score(run.gather(task), benchmark_of(task.name).title) for task in tasks}
        report(folder, settings, results, other)
        if options.push_to_hub:
            publish(options, folder)
    state.destroy_process_group()


def check(options: EvalArguments) -> None:
    """Check the options before the model is loaded."""
    if options.model is None and options.watch is None:
        raise ValueError("There is no model. Give --model: a folder, or a name on the Hub.")
    kind, _ = resolve_engine(options.engine)
    decoding_of(options)
    Grader(policy=options.policy, timeout=options.grading_timeout)
    if options.tensor_parallel_size > 1 and kind != "vllm":
        raise ValueError(f"`tensor_parallel_size={options.tensor_parallel_size}` needs vLLM, but {kind} samples here.")
    if options.compare is not None:
        check_comparable(read_results(options.compare), options.benchmarks)
    if options.push_to_hub:
        if options.watch is not None:
            raise ValueError("`--push_to_hub` is for one model, and `--watch` evaluates checkpoints: leave it out.")
        if options.revision not in (None, "main") and options.hub_model_id is None:
            raise ValueError(
                f"`--push_to_hub` would put the scores of the revision {options.revision!r} into the card of the main "
                "branch. Leave it out, or name another repository: --hub_model_id USER/NAME."
            )
        if os.environ.get("RANK", "0") == "0":
            check_target(target_of(options))
    check_choice("prompt_template", options.prompt_template, TEMPLATES)
    for k in [options.k] if options.k else [benchmark_of(name).k for name in options.benchmarks]:
        if k > 1 and options.temperature == 0:
            raise ValueError(f"`temperature=0` gives the same sample {k} times. Set `k=1`, or a temperature above 0.")


def decoding_of(options: EvalArguments) -> Decoding:
    assert options.temperature is not None and options.top_p is not None  # since `__post_init__`
    return Decoding(options.temperature, options.top_p, options.max_new_tokens)


def target_of(options: EvalArguments) -> Target:
    return results_target(options.model, options.hub_model_id, options.hub_private_repo)


def folder_of(options: EvalArguments) -> Path:
    """Return the folder for the samples and results. Pass rates have one of their own, as their settings differ."""
    if options.output_dir is not None:
        return Path(options.output_dir)
    model = Path(str(options.model))
    if not model.is_dir():
        folder = Path("out", EVAL_FOLDER, str(options.model).replace("/", "--"))
    elif is_complete(model):  # beside a checkpoint and not in it, because its run may delete it
        folder = model.parent / EVAL_FOLDER / model.name
    else:
        folder = model / EVAL_FOLDER
    return folder if options.dataset_name is None else folder / PASS_RATES_FOLDER


def load(options: EvalArguments) -> tuple[ModelSource, list[Task]]:
    """Return the model's source, and each benchmark as token ids."""
    preflight.check_model(
        ModelConfig(options.model, model_revision=options.revision or "main"), options.trust_remote_code
    )
    source = ModelSource(
        options.model,
        options.revision,
        options.dtype,
        options.trust_remote_code,
        options.max_model_length,
        options.tensor_parallel_size,
        options.gpu_memory_utilization,
    )
    tokenizer, chat_options = source.tokenizer(), options.chat_template_kwargs or {}
    if options.dataset_name is not None:
        return source, [load_training_set(options, tokenizer, chat_options)]
    tasks = []
    for name in options.benchmarks:
        problems = load_problems(name, options.benchmark_source)[: options.limit]
        template = "none" if name in TASKS else options.prompt_template
        prompts = tokenize_problems(problems, tokenizer, template, options.system_prompt, **chat_options)
        k, task = options.k or benchmark_of(name).k, TASKS.get(name)
        own = {} if task is None else {"max_new_tokens": task.max_new_tokens, "grader": TaskGrader(task)}
        tasks.append(Task(name, problems, prompts, k, **own))
    return source, tasks


def load_training_set(
    options: EvalArguments, tokenizer: PreTrainedTokenizerBase, chat_options: dict[str, Any]
) -> Task:
    """Return the problems of a training set, checked and cleaned as train.py does it."""
    split, names = options.dataset_train_split, options.reward_funcs[:1]  # the first one judges
    rewards = [find_reward(name, options.max_new_tokens) for name in names]
    rows = pick_split(load_splits(options.dataset_name, options.dataset_config), split, options.dataset_name)
    rows = bare_problems(rows, options.prompt_column, options.answer_column)
    preflight.check_columns(names, rewards, rows.column_names)
    preflight.check_answers(rewards, rows, split)
    rows, _ = clean(rows, bare=options.prompt_template != "none")
    rows = rows.select(range(min(len(rows), options.limit or len(rows))))
    preflight.check_prompts(names, with_template(rows.select([0]), options.prompt_template)[0]["prompt"])
    return training_task(
        options.dataset_name, split, rows, options.prompt_template, tokenizer, rewards[0], options.k, **chat_options
    )


def samples_settings(options: EvalArguments) -> dict[str, Any]:
    """Return the options that samples and grades depend on."""
    names = ["limit", "temperature", "top_p", "max_new_tokens", "seed", "dtype"]
    names += ["system_prompt", "chat_template_kwargs"]
    if options.dataset_name is not None:
        names += ["prompt_template", "reward_funcs"]
    elif options.has_maths:
        names += FOR_MATHS
    return {name: getattr(options, name) for name in names}


def settings_of(options: EvalArguments, source: ModelSource, engine: str, batch_size: int) -> dict[str, Any]:
    """Return the settings that identify samples; resuming with others is refused."""
    return {
        "model": options.model,
        "revision": options.revision,
        "weights": source.fingerprint(),
        **samples_settings(options),
        "context": source.context(),
        "engine": engine,
        "batch_size": batch_size,
        "grader": grader_version() if options.has_maths or options.dataset_name else None,
    }


def sample_all(
    run: Evaluation, options: EvalArguments, source: ModelSource, kind: str, grader: Grader, state: PartialState
) -> None:
    """Sample this process's share: every `num_processes`-th remaining batch."""
    remaining = run.remaining(state.process_index, state.num_processes)
    if not remaining:
        return
    engine = make_engine(kind, source, decoding_of(options), source.tokenizer(), run.longest_sample())
    right = done = 0
    samples = sum(len(batch) for *_, batch in remaining)
    with grader, tqdm(total=samples, unit="sample", disable=not state.is_main_process) as bar:
        for task, number, batch in remaining:
            bar.set_description(task.name)
            frame = run.sample(task, number, batch, engine, task.grader or grader)
            right, done = right + int((frame["outcome"] == Outcome.CORRECT).sum()), done + len(frame)
            bar.set_postfix(right=f"{right / done:.1%}", cut_off=f"{frame['truncated'].mean():.0%}")
            bar.update(len(frame))


def publish(options: EvalArguments, folder: Path) -> None:
    """Push the results to the Hub. If that fails, they are on disk, and the same command pushes them."""
    try:
        print(push_results(target_of(options), folder, options.model))
    except NotPushedError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
