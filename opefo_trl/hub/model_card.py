"""The model card of a run: what was trained, how its entropy moved, what it scores, and how to reproduce it."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from jinja2 import Template

from opefo_trl import files as names
from opefo_trl.cli.progress import EDGE, TABLE
from opefo_trl.config import OPEFOConfig
from opefo_trl.controls import CONTROLS
from opefo_trl.evaluation.model_source import is_of
from opefo_trl.evaluation.results import read_results
from opefo_trl.hub.card_blocks import LICENCE, join, merge, split
from opefo_trl.hub.results import with_results
from opefo_trl.hub.upload import without_secrets
from opefo_trl.playground import MODEL, question
from opefo_trl.repositories import is_repository

_PACKAGES = ("opefo_trl", "trl", "transformers", "torch", "datasets", "accelerate", "peft", "vllm", "deepspeed")
_NOT_GIVEN = ("_token", "generation_batch_size", "accelerator_config")  # tokens, and what follows from the rest


@dataclass(frozen=True)
class RunFacts:
    """Facts that a script adds to the card: name of the data, whether that is on the Hub, and the recipe file."""

    data: str | None = None
    on_hub: bool = False
    config_file: Path | None = None


@dataclass(frozen=True)
class RunSummary:
    """A run as its card describes it. `repo` and `curves` (a data frame) are None where there is none."""

    args: OPEFOConfig
    facts: RunFacts
    name: str
    repo: str | None
    base_model: str
    adapter: bool
    steps: tuple[int, int]  # taken, and planned or 0
    rewards: Sequence[str]
    curves: Any
    paper: Mapping[str, str]
    tags: Sequence[str]
    dataset: Any  # rows, or a stream of them


def write_card(run: RunSummary) -> None:
    """Write the card of a run into its output folder; what its author wrote there stays."""
    out = Path(run.args.output_dir)
    text = _card_of(run, out)
    if (out / names.EVAL_FOLDER / names.RESULTS_FILE).exists():
        results = read_results(out / names.EVAL_FOLDER)
        text = with_results(text, results if is_of(results, out) else {**results, "benchmarks": {}}, run.name)
    if (out / names.CARD_FILE).exists():
        text = merge(text, (out / names.CARD_FILE).read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    names.write_whole(out / names.CARD_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def _card_of(run: RunSummary, out: Path) -> str:
    base, facts = describe_base(run.base_model), run.facts
    downloads = " ".join(getattr(getattr(run.dataset, "info", None), "download_checksums", None) or {})
    sources = sorted(set(re.findall(r"hf://datasets/([^@\s]+)@", downloads)))  # as the `Dataset` remembers
    metadata = {
        **base,
        "base_model_relation": ("adapter" if run.adapter else "finetune") if "base_model" in base else None,
        "datasets": [facts.data] if facts.on_hub else sources,
        "library_name": "peft" if run.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "model_name": run.name,
        "tags": sorted({"generated_from_trainer", *run.tags}),
    }
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(run.args)}
    given = {key: value for key, value in run.args.to_dict().items() if not key.endswith(_NOT_GIVEN)}
    changed = [item for item in given.items() if item[1] != defaults[item[0]] and any((item[1], defaults[item[0]]))]
    recipe = facts.config_file.read_text(encoding="utf-8") if facts.config_file else ""
    recipe = re.sub(r"(?m)^env:.*\n?(?:[ \t}].*\n?|\n)*", "", recipe)  # environment variables, which may be keys
    body = Template(Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8")).render(
        **{"run": run, "args": run.args, "facts": facts, "names": names, "out": out, "table": TABLE, "edge": EDGE},
        **metadata,
        control_paper="".join(re.findall(r"\d{4}\.\d{4,5}", CONTROLS[run.args.control].__doc__ or "")[:1]),
        playground_prompt=question(24) if Path(run.base_model) == MODEL else None,
        conversational=not hasattr(run.dataset, "__len__") or not isinstance(run.dataset[0]["prompt"], str),
        arguments=without_secrets("".join(f"    {key}={value!r},\n" for key, value in changed), run.args.hub_token),
        recipe=without_secrets(recipe, run.args.hub_token),
        versions=sorted(f"{found.name} {found.version}" for found in distributions() if found.name in _PACKAGES),
    )
    return re.sub(r"\n{3,}", "\n\n", join(metadata, body))


def describe_base(model: str) -> dict[str, Any]:
    """Return `base_model`, a repository, and the licence of a model, as far as its name or its own card tells."""
    if is_repository(model):
        return {"base_model": model}
    metadata: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        metadata, _ = split((Path(model) / names.CARD_FILE).read_text(encoding="utf-8"))
    repo = metadata.get("base_model")
    repo = repo[0] if isinstance(repo, list) and len(repo) == 1 else repo
    licence = {key: metadata[key] for key in LICENCE if key in metadata}
    return licence | ({"base_model": repo} if is_repository(repo) else {})
