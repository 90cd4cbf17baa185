"""Load a data set (of an embedded task, a file, a folder or a Hub name) as a `DatasetDict`."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, disable_caching, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from opefo_trl.playground import TASKS
from opefo_trl.validation import check_choice

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # file suffix -> loader


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """Load all splits of a data set: an embedded task's name, a file (only `train`), a folder, or a Hub name."""
    if name in TASKS:
        return DatasetDict({split: TASKS[name].dataset(split) for split in TASKS[name].splits})
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_folder(path, config)
    if path.suffix in FORMATS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"`dataset_name={name!r}`: there is no such file. Give a file, a folder or a Hub name."
        )
    return _load(f"The data set {name!r} cannot be loaded", name, config)


def _load(problem: str, *arguments: Any, **options: Any) -> DatasetDict:
    """Call `load_dataset`; an error becomes a `ValueError` of one line that begins with `problem`."""
    try:
        return load_dataset(*arguments, **options)
    except (DatasetsError, OSError, ValueError) as error:
        cause = (options and error.__cause__) or error  # of a single file, what is wrong in it
        text = " ".join(str(cause).split()) or type(cause).__name__
        hint = " (--dataset_config NAME)" if "onfig name is missing" in text else ""
        hint = " It is that of `dataset_config`, which a recipe may set." if "BuilderConfig" in text else hint
        raise ValueError(f"{problem}: {text}{hint}") from error


def _load_file(path: Path) -> DatasetDict:
    if path.suffix not in FORMATS:
        raise ValueError(f"{str(path)!r} cannot be read: its suffix must be one of {', '.join(FORMATS)}.")
    if not path.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty.")
    return _load(f"{str(path)!r} cannot be read", FORMATS[path.suffix], data_files=glob.escape(str(path)))


def _load_folder(path: Path, config: str | None) -> DatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        if not os.access(path, os.W_OK):
            disable_caching()  # files of `map` and `shuffle` would go beside the data; now they are temporary
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    return _load(f"The folder {str(path)!r} holds no data set", str(path), config)


def pick_split(splits: DatasetDict, split: str, name: str) -> Dataset:
    """Return one split of the data set called `name`; an unknown or empty split is an error."""
    check_choice("split", split, splits, where=f" of the data set {name!r}")
    if not len(splits[split]):
        raise ValueError(f"The split {split!r} of the data set {name!r} is empty.")
    return splits[split]
