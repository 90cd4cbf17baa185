"""What the scripts share: a parser that speaks in one line, and no traceback where a user can mend the mistake."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from opefo_trl.playground import PLAYGROUND


class UsageError(ValueError):
    """A mistake on the command line or in a config file."""


class Parser(TrlParser):
    """TRL's parser: dataclasses, `--config file.yaml`, overrides; with names checked before anything is built."""

    config_file: Path | None = None  # that was read

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str], default_config: Path | None = None) -> tuple[Any, ...]:
        """The dataclasses. Without `--config`, and without a model but the playground's, `default_config` is taken."""
        words = [part for word in arguments for part in _split_config(word)]
        if "--config" in words:
            self._check_config(_value_of("--config", words))
        elif default_config is not None and _is_playground(words):
            if words and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"No --config: the rest is as in {default_config.name}.", file=sys.stderr)
            words = ["--config", str(default_config), *words]
        self._check_options(words)
        self.config_file = Path(_value_of("--config", words)) if "--config" in words else None
        try:
            *parts, _, rest = self.parse_args_and_config(
                words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            raise UsageError(
                "These settings are for a GPU, and there is none here. On the CPU: --use_cpu true --bf16 false."
            ) from None
        if rest:
            raise UsageError(f"{rest[0]!r} belongs to no option. Options begin with --, as in --max_steps 100.")
        return tuple(parts)

    def _check_config(self, path: str) -> None:
        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise UsageError(f"The config file {path!r} cannot be read: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise UsageError(f"The config file {path!r} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UsageError(f"The config file {path!r} must hold a map: lines of `name: value`.")
        known = {action.dest for action in self._actions} | {"env"}
        self._check_names([name for name in content if name not in known], known, f"in {path}")

    def _check_options(self, words: Sequence[str]) -> None:
        known = {option.lstrip("-") for option in self._option_string_actions} | {"config"}
        names = [name.lstrip("-") for name in _names(words)]
        self._check_names([name for name in names if name not in known], known, "on the command line")

    def _check_names(self, unknown: list[Any], known: set[str], where: str) -> None:
        if unknown:
            name = str(unknown[0])
            near = difflib.get_close_matches(name, known, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else " --help lists what there is."
            raise UsageError(f"There is no option {name!r} ({where}).{guess}")


def _is_playground(words: Sequence[str]) -> bool:
    models = [word for name, word in pairwise(words) if name == "--model_name_or_path"]
    return "--model_name_or_path" not in _names(words) or models == [PLAYGROUND]


def _split_config(word: str) -> list[str]:
    """TRL knows `--config FILE`; `--config=FILE` is the same."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _value_of(option: str, words: Sequence[str]) -> str:
    index = words.index(option) + 1
    if index == len(words):
        raise UsageError(f"{option} needs a file.")
    return words[index]


def _names(words: Sequence[str]) -> list[str]:
    return [word.split("=", 1)[0] for word in words if word.startswith("--")]


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """Turn what a user can mend into one line and exit status 2. OPEFO_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("OPEFO_TRACEBACK") == "1":
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
