"""Training data for GRPO, from the playground, local files or the Hub: rows with a `prompt`."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from opefo_trl.playground import PLAYGROUND, SPLITS, playground_dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BOXED = "{problem}\n\nReason step by step, and put your final answer within \\boxed{{}}."
EVAL_PROMPTS = 64
TEMPLATES: dict[str, str | None] = {"none": None, "boxed": BOXED}


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
    if split not in splits:
        raise ValueError(
            f"The data set {name!r} has no split {split!r}. Choose one of {', '.join(map(repr, splits))}."
        )
    if not len(splits[split]):
        raise ValueError(f"The split {split!r} of the data set {name!r} is empty.")
    return splits[split]


def shape_prompts(
    dataset: Dataset, prompt_column: str = "prompt", answer_column: str | None = None, template: str = "none"
) -> Dataset:
    """Columns under the names that TRL and our rewards look for: `prompt`, and `answer` where there is one."""
    if template not in TEMPLATES:
        raise ValueError(
            f"`prompt_template={template!r}` is unknown. Choose one of {', '.join(map(repr, TEMPLATES))}."
        )
    for option, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column is not None and column not in dataset.column_names:
            raise ValueError(
                f"The data has no column {column!r}; it has {', '.join(dataset.column_names)}. Say which holds "
                f"the {option.split('_')[0]}: --{option} NAME."
            )
    for column in filter(None, (prompt_column, answer_column)):
        empty = [index for index, value in enumerate(dataset[column]) if value is None or value in ("", [])]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(dataset)} rows have nothing in column {column!r}, first row {empty[0]}, "
                "counted from 0. Drop them from the data."
            )
    dataset = _rename(dataset, prompt_column, "prompt")
    if answer_column is not None:
        dataset = _rename(dataset, answer_column, "answer")
    words = TEMPLATES[template]
    if words is None:
        return dataset
    if not isinstance(dataset[0]["prompt"], str):
        raise ValueError(
            f"`prompt_template={template!r}` is for prompts that are plain texts; these are conversations. Leave the "
            "template out, or name another column: --prompt_column NAME."
        )
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": words.format(problem=row["prompt"])}]})


def _rename(dataset: Dataset, old: str, new: str) -> Dataset:
    if old == new:
        return dataset
    return (
        dataset.remove_columns(new).rename_column(old, new)
        if new in dataset.column_names
        else (dataset.rename_column(old, new))
    )


def hold_out(
    splits: DatasetDict, train: str, test: str, count: int | None, seed: int, name: str
) -> tuple[Dataset, Dataset | None]:
    """
    Rows to train on and `count` rows to evaluate on: from the test split, or else taken off the training split. None
    is 64, or a tenth of the training split if that is less and has to give them.
    """
    dataset = pick_split(splits, train, name)
    if count == 0:
        return dataset, None
    if test in splits and test != train:
        rows = pick_split(splits, test, name).shuffle(seed=seed)
        return dataset, rows.select(range(min(EVAL_PROMPTS if count is None else count, len(rows))))
    if count is None:
        count = min(EVAL_PROMPTS, max(1, len(dataset) // 10))
    if count >= len(dataset):
        raise ValueError(
            f"`eval_prompts={count}` would leave nothing of the {len(dataset)} rows of {name!r} to train on: there "
            f"is no split {test!r} to evaluate on. Set fewer, or 0."
        )
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def whole_batches(dataset: Dataset, prompts: int) -> Dataset:
    """As many rows as fill batches of `prompts`: TRL averages over batches, and a partial one would count too much."""
    return dataset if len(dataset) <= prompts else dataset.select(range(len(dataset) - len(dataset) % prompts))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text} (--dataset_config NAME)" if "onfig name is missing" in text else text
