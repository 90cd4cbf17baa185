"""What is on its way to the Hub: a folder for each save, beside the run, that outlives the process.

out/.hub/target.json                      which repository, and what goes there
out/.hub/outcomes.jsonl                   what came of every attempt
out/.hub/waiting/SAVE/message             a save, whole, as it will lie in the repository:
out/.hub/waiting/SAVE/root/...                its top level
out/.hub/waiting/SAVE/checkpoint-40/...       its folders
out/.hub/sending/SAVE/...                 the same, taken by the process that uploads

Large files are hard links, so a save costs no copy and may be deleted or replaced by the run meanwhile. A save that a
newer one makes needless goes, unless every one is wanted; what is a folder of its own in the repository stays.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from opefo_trl.files import write_whole

FOLDER = ".hub"
ROOT, MESSAGE = "root", "message"
LAST_CHECKPOINT = "last-checkpoint"
LINKED = 1 << 20  # bytes from which a file is linked: what is smaller may be written over in place
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
# Of an output folder: what is the run's own business, and what `eval.py` publishes
PRIVATE = ("_*", ".*", "*.part", "checkpoint-*", "nonfinite", "eval")
# Of a checkpoint: what only resuming needs, and what the output folder has a newer copy of
TRAINING_STATE = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "control_state.json", "*.part"),
    *("latest", "zero_to_fp32.py", "entropy_ctrl_state.json", "entropy_curves.parquet", "flow_samples.json"),
    "README.md",
)


@dataclass(frozen=True)
class Target:
    """A repository, and what a run wants to have there."""

    repo: str
    private: bool | None = None
    revision: str | None = None
    strategy: str = "every_save"
    every: bool = False  # whether each save is to be a commit, however slow the Hub

    def write(self, run: Path) -> None:
        path = folder_of(run) / "target.json"
        write_whole(path, lambda part: part.write_text(json.dumps(asdict(self), indent=1) + "\n"))

    @classmethod
    def read(cls, run: Path) -> Target | None:
        """The target that a run was given, where it was given one."""
        try:
            content = json.loads((run / FOLDER / "target.json").read_text())
        except (OSError, ValueError):
            return None
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})


@dataclass(frozen=True)
class Outcome:
    """Of one attempt to bring what is waiting to the Hub."""

    messages: list[str]  # of the saves that it was about
    repo: str | None = None  # with its owner, once the Hub has told
    commit: str | None = None  # None: nothing was pushed
    url: str | None = None
    files: int = 0
    bytes: int = 0
    error: str | None = None
    superseded: bool = False  # a newer save took its place before it was sent
    refused: bool = False  # trying again would not help
    wait: float = 0.0  # seconds that the Hub asks to wait

    @property
    def ok(self) -> bool:
        return self.error is None


def folder_of(run: Path) -> Path:
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- putting in


def stage(run: Path, parts: Mapping[str, Mapping[str, Path]], message: str, every: bool = False) -> Path:
    """Put a save into the outbox: for each part (`ROOT`, or a folder of the repository) its files by their paths."""
    folder = folder_of(run)
    name = f"{time.time_ns():020d}"
    making = folder / "making" / name
    for part, files in parts.items():
        for path, source in files.items():
            link(source, making / part / path)
    (making / MESSAGE).parent.mkdir(parents=True, exist_ok=True)
    (making / MESSAGE).write_text(message)
    waiting = folder / "waiting"
    waiting.mkdir(exist_ok=True)
    making.rename(waiting / name)
    if not every:
        supersede(folder, waiting)
    return waiting / name


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINKED:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def supersede(folder: Path, saves: Path) -> None:
    """Keep of each save what no newer one writes; a save of which nothing is left goes."""
    written: set[str] = set()
    for save in reversed(in_order(saves)):
        parts = [part for part in save.iterdir() if part.is_dir()] if save.is_dir() else []
        needless = [part for part in parts if part.name in written]
        written |= {part.name for part in parts}
        if parts and len(needless) == len(parts):
            note(folder.parent, Outcome([message_of(save)], superseded=True))
            discard(folder, save)
        else:
            for part in needless:
                discard(folder, part)


def discard(folder: Path, path: Path) -> None:
    """In one move: the process that uploads takes a save as a whole, or finds it gone."""
    away = folder / "discarded" / f"{path.parent.name}-{path.name}-{time.time_ns()}"
    away.parent.mkdir(exist_ok=True)
    try:
        path.rename(away)
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)


# ---- taking out, by the one process that holds the lock


def take(run: Path, every: bool) -> list[Path]:
    """The saves to push now: all that is there as one commit, or the oldest by itself."""
    folder = folder_of(run)
    sending = folder / "sending"
    sending.mkdir(exist_ok=True)
    shutil.rmtree(folder / "discarded", ignore_errors=True)
    for save in in_order(folder / "waiting")[: max(0, 1 - len(in_order(sending))) if every else None]:
        save.rename(sending / save.name)
    if not every:
        supersede(folder, sending)
    return in_order(sending)


def contents(saves: Iterable[Path]) -> dict[str, Path]:
    """Files of saves by their paths in the repository; a newer save's in place of an older one's."""
    return {
        str(PurePosixPath(*path.parts[1:]) if path.parts[0] == ROOT else PurePosixPath(path.as_posix())): save / path
        for save in saves
        for path in sorted(file.relative_to(save) for file in save.rglob("*") if file.is_file())
        if path.name != MESSAGE or len(path.parts) > 1
    }


def message_of(save: Path) -> str:
    try:
        return (save / MESSAGE).read_text()
    except OSError:
        return save.name


def in_order(saves: Path) -> list[Path]:
    return sorted(saves.iterdir()) if saves.is_dir() else []


def missing(run: Path) -> list[str]:
    """What is not on the Hub yet, oldest first."""
    return [message_of(save) for kind in ("sending", "waiting") for save in in_order(run / FOLDER / kind)]


def note(run: Path, outcome: Outcome) -> None:
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **asdict(outcome)})
    with (folder_of(run) / "outcomes.jsonl").open("a") as file:
        file.write(line + "\n")


def outcomes(run: Path) -> list[Outcome]:
    known = {field.name for field in fields(Outcome)}
    try:
        lines = (run / FOLDER / "outcomes.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [Outcome(**{key: value for key, value in json.loads(line).items() if key in known}) for line in lines]


# ---- what of a run belongs into its repository


def published(run: Path) -> dict[str, Path]:
    """All of an output folder but checkpoints, dumps, evaluations, and names that begin with _ or a dot."""
    return _files(run, lambda path: not any(_matches(part, PRIVATE) for part in path.parts))


def model_of(checkpoint: Path) -> dict[str, Path]:
    """The model in a checkpoint: its top-level files without the state that resuming needs."""
    return _files(checkpoint, lambda path: len(path.parts) == 1 and not _matches(path.name, TRAINING_STATE))


def whole(checkpoint: Path) -> dict[str, Path]:
    return _files(checkpoint, lambda path: not _matches(path.name, ("*.part",)))


def parts_of(run: Path, checkpoint: Path | None, strategy: str) -> dict[str, dict[str, Path]]:
    """A save as it goes to the Hub: the output folder, with the model of a checkpoint in it, and the checkpoint."""
    if checkpoint is None:
        return {ROOT: published(run)}
    parts: dict[str, dict[str, Path]] = {ROOT: {**published(run), **model_of(checkpoint)}}
    name = {"checkpoint": LAST_CHECKPOINT, "all_checkpoints": checkpoint.name}.get(strategy)
    if name is not None:
        parts[name] = whole(checkpoint)
    return parts


def state_of(run: Path, strategy: str) -> dict[str, dict[str, Path]]:
    """What a run has left by now: the model that was saved last, and the checkpoints that the strategy publishes."""
    checkpoints = sorted(
        (path for path in run.glob("checkpoint-*") if (path / "trainer_state.json").is_file()),
        key=lambda path: int(path.name.rpartition("-")[2]) if path.name.rpartition("-")[2].isdigit() else -1,
    )
    if not checkpoints:
        return parts_of(run, None, strategy)
    parts = parts_of(run, checkpoints[-1], strategy)
    models = [path for path in run.iterdir() if path.name.endswith((".safetensors", ".bin"))]
    if any(path.stat().st_mtime >= _saved(checkpoints[-1]) for path in models if path.name != "training_args.bin"):
        parts[ROOT] = published(run)
    if strategy == "all_checkpoints":
        parts.update({checkpoint.name: whole(checkpoint) for checkpoint in checkpoints})
    return parts


def _saved(checkpoint: Path) -> float:
    return (checkpoint / "trainer_state.json").stat().st_mtime


def _files(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix(): folder / path for path in found if wanted(path)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def as_json(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome))


def of_json(text: str) -> Outcome:
    content: dict[str, Any] = json.loads(text)
    return Outcome(**content)
