"""Where a benchmark's rows are: on the Hub, in a folder, in a file."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from opefo_trl.data.benchmarks.table import BENCHMARKS, Source
from opefo_trl.data.loading import READERS, load_splits


def find_rows(name: str, source: str | os.PathLike[str] | None) -> tuple[list[dict[str, Any]], str]:
    """The rows of a benchmark under the column names of their source, and where they are from, in words."""
    parts, split, origin = _find(name, source)
    return [row for part in parts for row in _pick(part, split, origin)], origin


def _find(name: str, source: str | os.PathLike[str] | None) -> tuple[list[DatasetDict], str, str]:
    if source is None:
        return _first_on_hub(name)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(name, path)
    _refuse_another(name, path)
    if path.is_file():
        return [load_splits(str(path))], "test", str(path)
    if path.suffix in READERS or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise ValueError(
            f"There is no file or folder {str(source)!r}. The source of a benchmark is a folder, a file, or a name on "
            "the Hub: owner/name."
        )
    known = {listed.hub: listed for listed in BENCHMARKS[name].sources}
    return _hub(known.get(str(source), Source(str(source))))


def _hub(source: Source) -> tuple[list[DatasetDict], str, str]:
    parts = [load_splits(source.hub, config) for config in source.configs or (None,)]
    return parts, source.split, f"{source.hub} on the Hub"


def _first_on_hub(name: str) -> tuple[list[DatasetDict], str, str]:
    failures: list[str] = []
    for source in BENCHMARKS[name].sources:
        try:
            found = _hub(source)
        except ValueError as error:
            failures.append(str(error).rstrip("."))
            continue
        if failures:
            warnings.warn(f"{name} is taken from {source.hub}. {'. '.join(failures)}.", UserWarning, stacklevel=5)
        return found
    raise ValueError(
        f"No source of {name} on the Hub can be loaded; give a folder, a file or another name as its source. Tried: "
        f"{'; '.join(failures)}."
    )


def _folder(name: str, folder: Path) -> tuple[list[DatasetDict], str, str]:
    files = [folder / f"{name}{suffix}" for suffix in READERS]
    for path in files:
        if path.is_file():
            return [load_splits(str(path))], "test", str(path)
    copies = [folder / spelling for source in BENCHMARKS[name].sources for spelling in _spellings(source.hub)]
    for path in copies:
        if path.is_dir():
            return _copy(name, path)
    if _is_copy(name, folder):
        _refuse_another(name, folder)
        return _copy(name, folder)
    raise ValueError(
        f"The folder {str(folder)!r} holds nothing for {name}. Looked for {files[0].name} (or "
        f"{', '.join(file.suffix for file in files[1:])}) and for a folder "
        f"{', '.join(source.hub.replace('/', '__') for source in BENCHMARKS[name].sources)} (or with / for __)."
    )


def _copy(name: str, folder: Path) -> tuple[list[DatasetDict], str, str]:
    """A copy of a Hub data set: its configs are named in its README, or folders of their own."""
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    parts: list[DatasetDict] = []
    for config in _configs(name):
        if (folder / config).is_dir():
            parts.append(load_splits(str(folder / config)))
        elif re.search(rf"config_name:\W*{re.escape(config)}\W*$", card, re.MULTILINE):
            parts.append(load_splits(str(folder), config))
    return parts or [load_splits(str(folder))], "test", str(folder)


def _is_copy(name: str, folder: Path) -> bool:
    """Whether a folder of any name is one data set, not a place where several lie."""
    places = [folder, folder / "data", *(folder / config for config in _configs(name))]
    files = [file for place in places for file in place.glob("*") if file.suffix in READERS]
    return bool(files) and not any(file.stem in BENCHMARKS for file in files)


def _configs(name: str) -> list[str]:
    return [config for source in BENCHMARKS[name].sources for config in source.configs]


def _refuse_another(name: str, path: Path) -> None:
    """30 rows of AIME 2025 would pass for AIME 2024."""
    absolute = f"{path.absolute().as_posix()}/"
    for other, benchmark in BENCHMARKS.items():
        marks = [spelling for source in benchmark.sources for spelling in _spellings(source.hub)]
        if other != name and (path.stem == other or any(f"/{mark}/" in absolute for mark in marks)):
            raise ValueError(f"{str(path)!r} is {benchmark.title} by its name, and {name} was asked for.")


def _spellings(hub: str) -> tuple[str, str]:
    return hub.replace("/", "__"), hub


def _pick(splits: DatasetDict, split: str, origin: str) -> Dataset:
    if split in splits:
        return splits[split]
    if len(splits) > 1:
        raise ValueError(f"{origin} has the splits {', '.join(splits)}, and none is {split!r}.")
    return next(iter(splits.values()))
