"""Snapshots of a run that wait for their upload, in a folder beside the run that outlives the process.

    OUT/.hub/target.json               repository, branch and strategy
    OUT/.hub/waiting/ID/files/...      the files of a snapshot, as they will lie in the repository
    OUT/.hub/waiting/ID/save.json      its commit message and branch; written last and deleted first

Large files are hard links, so a snapshot costs no copy and survives when the run deletes or replaces the file.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from opefo_trl import files as names


@dataclass(frozen=True)
class Target:
    """A repository and what a run publishes there. `every`: each save is a commit, however slow the Hub is."""

    repo: str
    private: bool | None = None
    revision: str | None = None
    strategy: str = "every_save"
    every: bool = False

    def write(self, run: Path) -> None:
        path = run / names.HUB_FOLDER / "target.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        names.write_whole(path, lambda part: part.write_text(json.dumps(asdict(self))))

    @classmethod
    def read(cls, run: Path) -> Self | None:
        """Return the target of a run, or None if it was never published."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((run / names.HUB_FOLDER / "target.json").read_text()))
        return None


class Save(NamedTuple):
    """A snapshot; `revision` is its branch where that is not the target's."""

    folder: Path
    message: str
    revision: str | None


class Outbox:
    """The waiting snapshots of a run. Unless `every`, a newer one supersedes the older ones for the same branch."""

    def __init__(self, run: Path, every: bool = False):
        self.folder, self.every = run / names.HUB_FOLDER / "waiting", every
        self.superseded: list[str] = []  # messages
        self._sending: Save | None = None  # being uploaded, so newer snapshots leave it alone
        self._moves = threading.Lock()

    def stage(self, files: Mapping[str, Path], message: str, revision: str | None = None) -> None:
        """Add a snapshot of `files`, by their paths in the repository."""
        folder = self.folder / f"{time.time_ns():020d}"
        for path, source in files.items():
            target = folder / "files" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another file system, or one without hard links
                if source.suffix in names.WEIGHT_SUFFIXES:
                    os.link(source, target)
            if not target.exists():
                shutil.copyfile(source, target)
        (folder / "save.json").write_text(json.dumps({"message": message, "revision": revision}))
        with self._moves:
            self._supersede()

    def waiting(self) -> list[Save]:
        """Return the snapshots, oldest first."""
        saves = []
        for path in sorted(self.folder.glob("*/save.json")):
            with suppress(OSError, ValueError):  # another process has just deleted it
                saves.append(Save(path.parent, **json.loads(path.read_text())))
        return saves

    def take(self) -> Save | None:
        """Return the snapshot to upload next. It stays in the outbox until `discard`."""
        with self._moves:
            self._sending = None
            self._supersede()
            self._sending = next(iter(self.waiting()), None)
            return self._sending

    def discard(self, folder: Path) -> None:
        (folder / "save.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete snapshots that are half built or half deleted: their links would keep the disk full."""
        for folder in set(self.folder.glob("*")) - {save.folder for save in self.waiting()}:
            self.discard(folder)

    def _supersede(self) -> None:
        newer: set[str | None] = set()
        for save in [] if self.every else reversed(self.waiting()):
            if save.revision in newer and save != self._sending:
                self.discard(save.folder)
                self.superseded.append(save.message)
            newer.add(save.revision)


def files_to_publish(run: Path, checkpoints: Sequence[Path], strategy: str) -> dict[str, Path]:
    """
    Return the files of a save by their paths in the repository: the output folder with the newest model, and, as the
    strategy wants it, the last of the `checkpoints` or all of them.
    """
    files = names.list_files(run, names.PRIVATE_FILES)
    for checkpoint in checkpoints if strategy == "all_checkpoints" else checkpoints[-1:]:
        saved = (checkpoint / names.TRAINER_STATE_FILE).stat().st_mtime
        models = [
            file
            for path, file in files.items()
            if file.suffix in names.WEIGHT_SUFFIXES and path != "training_args.bin"
        ]
        newer = files if any(file.stat().st_mtime >= saved for file in models) else {}
        saved_files = names.list_files(checkpoint, names.TRAINING_STATE_FILES)
        files = {**files, **{path: file for path, file in saved_files.items() if "/" not in path}, **newer}
        folder = {"checkpoint": names.LAST_CHECKPOINT_FOLDER, "all_checkpoints": checkpoint.name}.get(strategy)
        if folder is not None:
            files |= {f"{folder}/{path}": file for path, file in names.list_files(checkpoint, ("*.part",)).items()}
    return files
