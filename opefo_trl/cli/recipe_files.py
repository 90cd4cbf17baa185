"""Find the scripts, the recipes and the machines of this package, in a clone and in the wheel."""

from __future__ import annotations

from pathlib import Path

import opefo_trl
from opefo_trl.validation import did_you_mean

__all__: list[str] = []  # of use inside this package only

# Folder of train.py, eval.py and configs/: setup.py copies them into the wheel; a clone has them in its top folder
_PACKAGE = Path(opefo_trl.__file__).parent
TOP = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
RECIPES, MACHINES = TOP / "configs", TOP / "configs" / "accelerate"


def names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_file(option: str, value: str, folder: Path) -> Path:
    """Return the file that an option names: its path, or the name of one of ours."""
    names = names_in(folder)
    if Path(value).is_file():
        return Path(value)
    if value not in names:
        hint = did_you_mean(value, names)
        raise ValueError(f"`{option}={value!r}` is no file.{hint} Give one, or a name: {', '.join(names)}.")
    return folder / f"{value}.yaml"
