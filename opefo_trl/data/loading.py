"""Data sets from the playground, a file, a folder or the Hub, as splits."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from opefo_trl.playground import PLAYGROUND, SPLITS, playground_dataset
from opefo_trl.validation import check_choice

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # file suffix -> loader


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """Load all splits of a data set: `"playground"`, a file, a folder, or a name on the Hub."""
    if name == PLAYGROUND:
        return DatasetDict({split: playground_dataset(split) for split in SPLITS})
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_folder(path, config)
    if path.suffix in FORMATS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"`dataset_name={name!r}`: there is no such file. Give a file, a folder or a Hub name."
        )
    try:
        return load_dataset(name, config)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"The data set {name!r} cannot be loaded: {_one_line(error)}") from error


def _load_file(path: Path) -> DatasetDict:
    if path.suffix not in FORMATS:
        raise ValueError(f"{str(path)!r} cannot be read: its suffix must be one of {', '.join(FORMATS)}.")
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty.")
    try:
        return load_dataset(FORMATS[path.suffix], data_files=str(path))
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {_one_line(error.__cause__ or error)}") from error


def _load_folder(path: Path, config: str | None) -> DatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    try:
        return load_dataset(str(path), config)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"The folder {str(path)!r} holds no data set: {_one_line(error)}") from error


def pick_split(splits: DatasetDict, split: str, name: str) -> Dataset:
    """Return one split of the data set called `name`; an unknown or empty split is an error."""
    check_choice("split", split, splits, where=f" of the data set {name!r}")
    if not len(splits[split]):
        raise ValueError(f"The split {split!r} of the data set {name!r} is empty.")
    return splits[split]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text} (--dataset_config NAME)" if "onfig name is missing" in text else text
