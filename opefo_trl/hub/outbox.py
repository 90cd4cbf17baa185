"""What is on its way to the Hub: a folder for each save, beside the run, that outlives the process.

out/.hub/target.json                      which repository, and what of the run goes there
out/.hub/outcomes.jsonl                   what came of every attempt
out/.hub/waiting/SAVE/save.json           a save, whole: its message and its address, and as it will lie there
out/.hub/waiting/SAVE/root/...                its top level
out/.hub/waiting/SAVE/checkpoint-40/...       its folders
out/.hub/sending/SAVE/...                 the same, taken by the process that uploads

Weights are hard links, so a save costs no copy and may be deleted or replaced by the run meanwhile. What a newer save
writes as well is needless in an older one, unless every one is wanted. Both processes move folders as a whole, and
each expects the other to have been faster.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath

from opefo_trl.files import write_whole

FOLDER = ".hub"
ROOT, FACTS = "root", "save.json"
LAST_CHECKPOINT = "last-checkpoint"
# Written once and never in place; everything else is small, or may grow while it waits
LINKED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp")
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
# Of an output folder: what is the run's own business, and what `eval.py` publishes
PRIVATE = ("_*", ".*", "*.part", "checkpoint-*", LAST_CHECKPOINT, "nonfinite", "eval")
# Of a checkpoint: what only resuming needs, and what the output folder has a newer copy of
TRAINING_STATE = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "control_state.json", "*.part"),
    *("latest", "zero_to_fp32.py", "pytorch_model_fsdp*", "entropy_ctrl_state.json"),
    *("entropy_curves.parquet", "flow_samples.json", "README.md"),
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
            return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})
        except (OSError, ValueError, TypeError):
            return None


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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(line).items() if name in known})


@dataclass(frozen=True)
class Save:
    """A folder of the outbox."""

    folder: Path
    message: str
    repo: str
    revision: str | None

    @classmethod
    def read(cls, folder: Path) -> Save | None:
        """None for one that has been moved away meanwhile."""
        try:
            facts = json.loads((folder / FACTS).read_text())
            return cls(folder, facts["message"], facts["repo"], facts["revision"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def address(self) -> tuple[str, str | None]:
        return self.repo, self.revision

    def parts(self) -> list[str]:
        try:
            return [part.name for part in self.folder.iterdir() if part.is_dir()]
        except OSError:
            return []


def folder_of(run: Path) -> Path:
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- putting in


def stage(run: Path, parts: Mapping[str, Mapping[str, Path]], message: str, target: Target) -> None:
    """Put a save into the outbox: for each part (`ROOT`, or a folder of the repository) its files by their paths."""
    folder = folder_of(run)
    name = f"{time.time_ns():020d}"
    making, waiting = folder / "making" / name, folder / "waiting"
    try:
        making.mkdir(parents=True)
        for part, files in parts.items():
            for path, source in files.items():
                link(source, making / part / path)
        facts = {"message": message, "repo": target.repo, "revision": target.revision}
        (making / FACTS).write_text(json.dumps(facts))
        waiting.mkdir(exist_ok=True)
        making.rename(waiting / name)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)  # or its links would keep what the run deletes to have room
        raise
    if not target.every:
        with suppress(OSError):
            supersede(run, "waiting")


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in LINKED:
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def supersede(run: Path, kind: str) -> None:
    """Keep of each save what no newer one to the same address writes; a save of which nothing is left goes."""
    written: dict[tuple[str, str | None], set[str]] = {}
    for save in reversed(saves_in(run, kind)):
        newer, parts = written.setdefault(save.address, set()), save.parts()
        if parts and newer.issuperset(parts):
            if discard(run, save.folder):
                note(run, Outcome([save.message], save.repo, superseded=True))
        else:
            for part in newer.intersection(parts):
                discard(run, save.folder / part)
        newer |= set(parts)


def discard(run: Path, path: Path) -> bool:
    """In one move. False where the process that uploads has taken it before."""
    away = folder_of(run) / "discarded" / f"{path.parent.name}-{path.name}-{time.time_ns()}"
    away.parent.mkdir(exist_ok=True)
    try:
        path.rename(away)
    except FileNotFoundError:
        return False
    shutil.rmtree(away, ignore_errors=True)
    return True


def sweep(run: Path) -> None:
    """What a process that was killed has left half-made, or half-deleted."""
    for kind in ("making", "discarded"):
        shutil.rmtree(run / FOLDER / kind, ignore_errors=True)


# ---- taking out, by the one process that holds the lock


def take(run: Path, every: bool) -> list[list[Save]]:
    """The saves to push now, by their addresses: what is there as one commit, or the oldest by itself."""
    sending = folder_of(run) / "sending"
    sending.mkdir(exist_ok=True)
    busy = {save.address for save in saves_in(run, "sending")}
    for save in saves_in(run, "waiting"):
        if not (every and save.address in busy):
            busy.add(save.address)
            with suppress(FileNotFoundError):  # the training has a newer one
                save.folder.rename(sending / save.folder.name)
    if not every:
        supersede(run, "sending")
    taken = saves_in(run, "sending")
    addresses = dict.fromkeys(save.address for save in taken)
    return [[save for save in taken if save.address == address] for address in addresses]


def readdress(run: Path, target: Target) -> None:
    """What waits goes to another repository than it was meant for."""
    for save in (save for kind in ("waiting", "sending") for save in saves_in(run, kind)):
        facts = json.dumps({"message": save.message, "repo": target.repo, "revision": target.revision})
        with suppress(FileNotFoundError):
            write_whole(save.folder / FACTS, partial(Path.write_text, data=facts))


def contents(saves: Iterable[Save]) -> dict[str, Path]:
    """Files of saves by their paths in the repository; a newer save's in place of an older one's."""
    files = {}
    for save in saves:
        for part in save.parts():
            for file in sorted(path for path in (save.folder / part).rglob("*") if path.is_file()):
                path = PurePosixPath(file.relative_to(save.folder / part).as_posix())
                files[str(path if part == ROOT else part / path)] = file
    return files


def saves_in(run: Path, kind: str) -> list[Save]:
    """Oldest first."""
    try:
        folders = sorted((run / FOLDER / kind).iterdir())
    except OSError:
        return []
    return [save for save in map(Save.read, folders) if save is not None]


def missing(run: Path) -> list[str]:
    """What is not on the Hub yet, oldest first."""
    # In this order, or one that is moved from the first to the second meanwhile would be in neither
    saves = {save.folder.name: save for kind in ("waiting", "sending") for save in saves_in(run, kind)}
    return [saves[name].message for name in sorted(saves)]


def note(run: Path, outcome: Outcome) -> None:
    """As a line of its own, whatever the one before was cut off at."""
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **asdict(outcome)})
    with suppress(OSError), (folder_of(run) / "outcomes.jsonl").open("a") as file:
        file.write(f"\n{line}")


def outcomes(run: Path) -> list[Outcome]:
    try:
        lines = (run / FOLDER / "outcomes.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError, AttributeError):
            found.append(Outcome.from_json(line))
    return found


# ---- what of a run belongs into its repository


def published(run: Path) -> dict[str, Path]:
    """All of an output folder but checkpoints, dumps, evaluations, and names that begin with _ or a dot."""
    return _files(run, lambda path: True, PRIVATE)


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
    models = [path for path in run.iterdir() if path.suffix in LINKED and path.name != "training_args.bin"]
    saved = (checkpoints[-1] / "trainer_state.json").stat().st_mtime
    if any(path.stat().st_mtime >= saved for path in models):
        parts[ROOT] = published(run)
    if strategy == "all_checkpoints":
        parts.update({checkpoint.name: whole(checkpoint) for checkpoint in checkpoints})
    return parts


def to(target: Target, save: Save) -> Target:
    return replace(target, repo=save.repo, revision=save.revision)


def _files(folder: Path, wanted: Callable[[Path], bool], unseen: Iterable[str] = ()) -> dict[str, Path]:
    """`unseen` names are not looked into: what lies there may vanish meanwhile."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _matches(name, unseen))
        paths = [Path(place, name).relative_to(folder) for name in sorted(names) if not _matches(name, unseen)]
        found.update({path.as_posix(): folder / path for path in paths if wanted(path)})
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
