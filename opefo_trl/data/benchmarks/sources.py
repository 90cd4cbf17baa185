"""Sources of benchmarks: the Hub, a folder or a file."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from opefo_trl.data.benchmarks.table import BENCHMARKS, Source
from opefo_trl.data.loading import FORMATS, load_splits


class _Loaded(NamedTuple):
    """A benchmark as its source has it: one `DatasetDict` for each configuration, the split to take, where from."""

    configs: list[DatasetDict]
    split: str
    origin: str


def find_rows(name: str, source: str | os.PathLike[str] | None) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a benchmark in the columns of their source, and in words where they come from."""
    loaded = _load(name, source)
    rows = [row for splits in loaded.configs for row in _pick(splits, loaded.split, loaded.origin)]
    return rows, loaded.origin


def _load(name: str, source: str | os.PathLike[str] | None) -> _Loaded:
    if source is None:
        return _first_on_hub(name)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(name, path)
    _refuse_other_benchmark(name, path)
    if path.is_file():
        return _Loaded([load_splits(str(path))], "test", str(path))
    if path.suffix in FORMATS or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise ValueError(
            f"There is no file or folder {str(source)!r}. The source of a benchmark is a folder, a file, or a name on "
            "the Hub: owner/name."
        )
    listed = {listed.hub: listed for listed in BENCHMARKS[name].sources}
    return _from_hub(listed.get(str(source), Source(str(source))))


def _from_hub(source: Source) -> _Loaded:
    configs = [load_splits(source.hub, config) for config in source.configs or (None,)]
    return _Loaded(configs, source.split, f"{source.hub} on the Hub")


def _first_on_hub(name: str) -> _Loaded:
    """Load the first source that can be loaded, with a warning if it is not the preferred one."""
    failures: list[str] = []
    for source in BENCHMARKS[name].sources:
        try:
            loaded = _from_hub(source)
        except ValueError as error:
            failures.append(str(error).rstrip("."))
            continue
        if failures:
            warnings.warn(f"{name} is taken from {source.hub}. {'. '.join(failures)}.", UserWarning, stacklevel=5)
        return loaded
    raise ValueError(
        f"No source of {name} on the Hub can be loaded; give a folder, a file or another name as its source. Tried: "
        f"{'; '.join(failures)}."
    )


def _folder(name: str, folder: Path) -> _Loaded:
    """Load from a folder of many benchmarks (`aime24.jsonl`, `math-ai__aime24/`), or from a copy of one data set."""
    files = [folder / f"{name}{suffix}" for suffix in FORMATS]
    for path in files:
        if path.is_file():
            return _Loaded([load_splits(str(path))], "test", str(path))
    copies = [folder / spelling for source in BENCHMARKS[name].sources for spelling in _spellings(source.hub)]
    for path in copies:
        if path.is_dir():
            return _hub_copy(name, path)
    if _is_hub_copy(name, folder):
        _refuse_other_benchmark(name, folder)
        return _hub_copy(name, folder)
    raise ValueError(
        f"The folder {str(folder)!r} holds nothing for {name}. Looked for {files[0].name} (or "
        f"{', '.join(file.suffix for file in files[1:])}) and for a folder "
        f"{', '.join(source.hub.replace('/', '__') for source in BENCHMARKS[name].sources)} (or with / for __)."
    )


def _hub_copy(name: str, folder: Path) -> _Loaded:
    """Load a copy of a Hub data set, whose configurations are subfolders or named in its README."""
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    configs: list[DatasetDict] = []
    for config in _configs(name):
        if (folder / config).is_dir():
            configs.append(load_splits(str(folder / config)))
        elif re.search(rf"config_name:\W*{re.escape(config)}\W*$", card, re.MULTILINE):
            configs.append(load_splits(str(folder), config))
    return _Loaded(configs or [load_splits(str(folder))], "test", str(folder))


def _is_hub_copy(name: str, folder: Path) -> bool:
    """Return whether the folder is a copy of one data set, rather than a folder of several benchmarks."""
    subfolders = [folder, folder / "data", *(folder / config for config in _configs(name))]
    files = [file for subfolder in subfolders for file in subfolder.glob("*") if file.suffix in FORMATS]
    return bool(files) and not any(file.stem in BENCHMARKS for file in files)


def _configs(name: str) -> list[str]:
    return [config for source in BENCHMARKS[name].sources for config in source.configs]


def _refuse_other_benchmark(name: str, path: Path) -> None:
    """Raise if the path names another benchmark: the 30 rows of AIME 2025 would pass for AIME 2024."""
    absolute = f"{path.absolute().as_posix()}/"
    for other, benchmark in BENCHMARKS.items():
        folders = [spelling for source in benchmark.sources for spelling in _spellings(source.hub)]
        if other != name and (path.stem == other or any(f"/{folder}/" in absolute for folder in folders)):
            raise ValueError(f"{str(path)!r} is {benchmark.title} by its name, but {name} is wanted.")


def _spellings(hub: str) -> tuple[str, str]:
    """Return the folder names of a Hub data set's copy: owner__name and owner/name."""
    return hub.replace("/", "__"), hub


def _pick(splits: DatasetDict, split: str, origin: str) -> Dataset:
    if split in splits:
        return splits[split]
    if len(splits) > 1:
        raise ValueError(f"{origin} has the splits {', '.join(splits)}, and none is {split!r}.")
    return next(iter(splits.values()))
