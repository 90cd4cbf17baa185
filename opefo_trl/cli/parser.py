"""Parser of the scripts, and errors in one line for mistakes that a user can mend."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import trl
import yaml
from trl import TrlParser

from opefo_trl.playground import PLAYGROUND
from opefo_trl.validation import did_you_mean

# Packages that check what a user has set, and raise a ValueError if it is wrong
_CHECKING_PACKAGES = (Path(__file__).parents[1], Path(trl.__file__).parent)

_NO_RECIPE = f" Without --config, the quickstart's settings are taken for the model {PLAYGROUND!r} only."
# Options that name a file, a folder or a repository
_PLACES = ("output_dir", "dataset_name", "model_name_or_path", "model", "benchmark_source", "compare", "pass_rates")


class UsageError(ValueError):
    """A mistake on the command line or in a config file."""


class Parser(TrlParser):
    """TRL's parser (dataclasses, `--config file.yaml`, overrides) that checks names before it builds anything."""

    config_file: Path | None = None  # the file that was read

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str], default_config: Path | None = None) -> tuple[Any, ...]:
        """Return the dataclasses. Without `--config`, read `default_config` if the model is the playground's."""
        words = split_options(arguments)
        if "--config" in words:
            self._check_config(_value_of("--config", words))
        elif default_config is not None and _is_playground(words):
            if words and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"Without --config, the other settings are those of {default_config.name}.", file=sys.stderr)
            words = ["--config", str(default_config), *words]
        self._check_options(words)
        self.config_file = Path(_value_of("--config", words)) if "--config" in words else None
        try:
            *dataclasses, _, rest = self.parse_args_and_config(
                words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except ValueError as error:  # in a `__post_init__` of ours, TRL or transformers
            if "bf16/gpu" in str(error):
                raise UsageError(
                    "These settings are for a GPU, and there is none here. On the CPU: --use_cpu true --bf16 false."
                    f"{'' if self.config_file else _NO_RECIPE}"
                ) from None
            raise UsageError(str(error)) from error
        if rest:
            raise UsageError(f"{rest[0]!r} belongs to no option. Options begin with --, as in --max_steps 100.")
        return tuple(dataclasses)

    def _check_config(self, path: str) -> None:
        check_names(read_config(path), {action.dest for action in self._actions} | {"env"}, f"in {path}")

    def _check_options(self, words: Sequence[str]) -> None:
        options = {option.lstrip("-") for option in self._option_string_actions} | {"config"}
        check_names([name.lstrip("-") for name in _names(words)], options, "on the command line")
        for name, value in pairwise(words):
            if value == "" and name.lstrip("-") in _PLACES:
                raise UsageError(f"{name} is empty. Leave it out, or give a value.")


def read_config(path: str) -> dict[str, Any]:
    """Return a file of `name: value` lines."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The config file {path!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The config file {path!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"The config file {path!r} must hold a map: lines of `name: value`.")
    return content


def check_names(names: Iterable[Any], options: set[str], where: str) -> None:
    """Refuse a name that is none of `options`."""
    for name in names:
        if name not in options:
            hint = did_you_mean(name, sorted(options)) or " --help all lists the options."
            raise UsageError(f"There is no option {str(name)!r} ({where}).{hint}")


def _is_playground(words: Sequence[str]) -> bool:
    models = [word for name, word in pairwise(words) if name == "--model_name_or_path"]
    return "--model_name_or_path" not in _names(words) or models == [PLAYGROUND]


def split_options(words: Iterable[str]) -> list[str]:
    """Return command-line words with each `--some-option=VALUE` as `--some_option` and `VALUE`: the one spelling that
    checks look for. A VALUE that begins with a dash stays with its option."""
    split = []
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
            split += [f"{name}={value}"] if value.startswith("-") else [name, value] if equals else [name]
        else:
            split.append(word)
    return split


def _value_of(option: str, words: Sequence[str]) -> str:
    index = words.index(option) + 1
    if index == len(words):
        raise UsageError(f"{option} needs a file.")
    return words[index]


def _names(words: Sequence[str]) -> list[str]:
    return [word.split("=", 1)[0] for word in words if word.startswith("--")]


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """
    Turn a user's mistake in a script (train.py) into one line and exit status 2; other errors keep their traceback.

    With OPEFO_TRACEBACK=1 a user's mistake has its traceback too.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("OPEFO_TRACEBACK") == "1" or not _is_users_mistake(error, program):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once for each machine
            command = f"opefo-trl {program.removesuffix('.py')}" if program.endswith(".py") else program
            print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_users_mistake(error: Exception, program: str) -> bool:
    """Return whether a user can mend the error: a missing file or package, or a ValueError that a check of ours or of
    TRL's raises. Any other ValueError may be a bug."""
    if isinstance(error, OSError | ImportError):
        return True
    last = error.__traceback__
    assert last is not None  # it was raised
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if dis.opname[code.co_code[last.tb_lasti]] != "RAISE_VARARGS":
        return False  # nobody wrote this error: zip(strict=True), say, or int()
    file = Path(code.co_filename)
    return file.name == program or any(file.is_relative_to(package) for package in _CHECKING_PACKAGES)
