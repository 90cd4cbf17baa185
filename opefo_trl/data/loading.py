"""Training data for GRPO, from the playground, local files or the Hub: rows with a `prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from opefo_trl.data.cleaning import DAPO_AFTER, DAPO_BEFORE, each_once, overlapping, problem_of, text_of
from opefo_trl.playground import PLAYGROUND, SPLITS, playground_dataset
from opefo_trl.validation import check_choice

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BOXED = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."
EVAL_PROMPTS = 64
TEMPLATES: dict[str, str | None] = {"none": None, "boxed": BOXED, "dapo": DAPO_BEFORE + "{problem}" + DAPO_AFTER}
PROMPTS = ("prompt", "problem", "question", "Problem")
ANSWERS = ("answer", "reward_model.ground_truth", "Answer", "expected_answer", "final_answer", "solution")


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a data set: `"playground"`, a file, a folder, or a name on the Hub."""
    if name == PLAYGROUND:
        return DatasetDict({split: playground_dataset(split) for split in SPLITS})
    path = Path(name).expanduser()
    if path.is_file():
        return _read_files(path, path.suffix)
    if path.is_dir():
        return _read_folder(path, config)
    if path.suffix in READERS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"There is no file {name!r}. `dataset_name` is a file, a folder, or a name on the Hub."
        )
    try:
        return load_dataset(name, config)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"The data set {name!r} cannot be loaded: {_one_line(error)}") from error


def _read_files(path: Path, suffix: str) -> DatasetDict:
    if suffix not in READERS:
        raise ValueError(f"{str(path)!r} is none of {', '.join(READERS)}, which are the files that can be read.")
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty.")
    try:
        return load_dataset(READERS[suffix], data_files=str(path))
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {_one_line(error.__cause__ or error)}") from error


def _read_folder(path: Path, config: str | None) -> DatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    try:
        return load_dataset(str(path), config)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"The folder {str(path)!r} holds no data set: {_one_line(error)}") from error


def pick_split(splits: DatasetDict, split: str, name: str) -> Dataset:
    check_choice("split", split, splits, where=f" of the data set {name!r}")
    if not len(splits[split]):
        raise ValueError(f"The split {split!r} of the data set {name!r} is empty.")
    return splits[split]


def bare_problems(dataset: Dataset, prompt_column: str | None = None, answer_column: str | None = None) -> Dataset:
    """
    Columns under the names that TRL and our rewards look for: `prompt`, and `answer` where there is one. Columns that
    are not named are looked for; a column may be a field within another one: `reward_model.ground_truth`.
    """
    prompt = prompt_column or next((name for name in PROMPTS if name in dataset.column_names), "prompt")
    answer = answer_column or next((name for name in ANSWERS if _has(dataset, name)), None)
    for option, column in (("prompt_column", prompt), ("answer_column", answer)):
        if column is not None and not _has(dataset, column):
            raise ValueError(
                f"The data has no column {column!r}; it has {', '.join(dataset.column_names)}. Say which holds "
                f"the {option.split('_')[0]}: --{option} NAME."
            )
    dataset = _renamed(dataset, prompt, "prompt", keep=prompt_column is None)
    if answer is not None:
        dataset = _renamed(dataset, answer, "answer", keep=answer_column is None)
    for column, source in (("prompt", prompt), ("answer", answer)):
        values = dataset[column] if source is not None else ()
        empty = [index for index, value in enumerate(values) if _is_empty(column, value)]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(dataset)} rows have nothing in column {source!r}, first row {empty[0]}, "
                "counted from 0. Drop them from the data."
            )
    return dataset


def _has(dataset: Dataset, path: str) -> bool:
    features: Any = dataset.features
    for name in path.split("."):
        if not isinstance(features, dict) or name not in features:
            return False
        features = features[name]
    return True


def _renamed(dataset: Dataset, old: str, new: str, keep: bool) -> Dataset:
    """The column under a new name; `keep` leaves it under the old one too, for rewards that want it there."""
    if old == new:
        return dataset
    column, *fields = old.split(".")
    values = [reduce(_field, fields, value) for value in dataset[column]] if fields or keep else None
    if new in dataset.column_names:
        dataset = dataset.remove_columns(new)
    return dataset.rename_column(old, new) if values is None else dataset.add_column(new, values)


def _field(value: dict | None, name: str) -> Any:
    return None if value is None else value[name]


def _is_empty(column: str, value: Any) -> bool:
    if column == "prompt" and value is not None:
        return not text_of(value).strip()
    return value is None or value != value or value == [] or (isinstance(value, str) and not value.strip())


def with_template(dataset: Dataset, template: str) -> Dataset:
    """Each problem with the template's words around it, as a chat."""
    words = TEMPLATES[check_choice("prompt_template", template, TEMPLATES)]
    if words is None:
        return dataset
    if not isinstance(dataset[0]["prompt"], str):
        raise ValueError(
            f"`prompt_template={template!r}` is for prompts that are plain texts; these are conversations. Leave the "
            "template out, or name another column: --prompt_column NAME."
        )
    return dataset.map(lambda row: {"prompt": chat(row["prompt"], template)})


def chat(problem: str, template: str) -> list[dict[str, str]]:
    """A problem as the one message of a conversation."""
    return [{"role": "user", "content": (TEMPLATES[template] or "{problem}").replace("{problem}", problem)}]


@dataclass(frozen=True)
class Cleaned:
    """What was left out of a data set."""

    rows: int
    repeated: int = 0
    disputed: int = 0
    leaked: dict[str, list[str]] = field(default_factory=dict)  # by benchmark

    def __str__(self) -> str:
        parts = [f"{self.repeated} repetitions"] if self.repeated else []
        parts += [f"{self.disputed} problems with contradictory answers"] if self.disputed else []
        parts += [f"{len(texts)} that are in {name}" for name, texts in self.leaked.items() if texts]
        return f"{self.rows} rows" + (f", without {', '.join(parts)}" if parts else "")


def clean(
    dataset: Dataset, unique: bool = True, bare: bool = False, benchmarks: dict[str, Sequence[str]] | None = None
) -> tuple[Dataset, Cleaned]:
    """Each problem once, without the prompt that is baked in if `bare`, and none of a benchmark's."""
    rows, repeated, disputed, kept = len(dataset), 0, 0, list(range(len(dataset)))
    if unique:
        answers = dataset["answer"] if "answer" in dataset.column_names else None
        kept, repeated, disputed = each_once(dataset["prompt"], answers)
    dataset = dataset if len(kept) == rows else dataset.select(kept)
    prompts = list(dataset["prompt"])
    problems = [problem_of(prompt) for prompt in prompts]
    if bare and len({isinstance(problem, str) for problem in problems}) > 1:
        raise ValueError(
            "Some prompts are DAPO's, with its words around a problem, and others are conversations of another kind. "
            "Drop one of them, or leave the template out: --prompt_template none."
        )
    if bare and any(problem is not prompt for problem, prompt in zip(problems, prompts, strict=True)):
        dataset = dataset.remove_columns("prompt").add_column("prompt", problems)
    hits = {name: overlapping(map(text_of, problems), texts) for name, texts in (benchmarks or {}).items()}
    gone = set().union(*hits.values())
    if gone:
        dataset = dataset.select([place for place in range(len(dataset)) if place not in gone])
    leaked = {name: [text_of(problems[place]) for place in found] for name, found in hits.items()}
    return dataset, Cleaned(rows, repeated, disputed, leaked)


def hold_out(
    dataset: Dataset, test: Dataset | None, count: int | None, seed: int, name: str
) -> tuple[Dataset, Dataset | None]:
    """
    Rows to train on and `count` rows to evaluate on: of the test split, or else taken off the rows to train on. None
    is 64, or a tenth of the rows to train on if that is less and they have to give them.
    """
    if count == 0:
        return dataset, None
    if test is not None:
        rows = test.shuffle(seed=seed)
        return dataset, rows.select(range(min(EVAL_PROMPTS if count is None else count, len(rows))))
    if count is None:
        count = min(EVAL_PROMPTS, max(1, len(dataset) // 10))
    if count >= len(dataset):
        raise ValueError(
            f"`eval_prompts={count}` would leave nothing of the {len(dataset)} rows of {name!r} to train on: there "
            "is no other split to evaluate on. Set fewer, or 0."
        )
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def whole_batches(dataset: Dataset, prompts: int) -> Dataset:
    """As many rows as fill batches of `prompts`: TRL averages over batches, and a partial one would count too much."""
    return dataset if len(dataset) <= prompts else dataset.select(range(len(dataset) - len(dataset) % prompts))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text} (--dataset_config NAME)" if "onfig name is missing" in text else text
