"""Run `opefo-trl`, one command for training, evaluation, plans, curves, the Hub and the playground.

`train` and `eval` run the scripts of those names: in this process, or in several that `accelerate launch` starts.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import psutil
import yaml

from opefo_trl.cli.recipe_files import MACHINES, RECIPES, TOP, find_file, names_in
from opefo_trl.validation import check_number, did_you_mean

__all__ = ["main"]

# subcommand -> (script, or module with a `main`; what it does)
_COMMANDS = {
    "train": ("train.py", "train a policy with OPEFO, with another entropy control, or with none"),
    "eval": ("eval.py", "evaluate a model on maths benchmarks, with intervals on the scores"),
    "plan": ("opefo_trl.plan.__main__", "predict whether a recipe fits its machine, and how long a step takes"),
    "curves": ("opefo_trl.curves.__main__", "draw the entropy curves of one run, or of several"),
    "hub": ("opefo_trl.hub.__main__", "push the files of a run that are not on the Hub yet"),
    "playground": ("opefo_trl.playground.__main__", "make the models of the embedded tasks"),
}
_PAGES = {"train": "docs/python.md (fields), docs/performance.md (several processes)", "eval": "docs/evaluation.md"}

# Options of `accelerate launch` that take precedence over the file of --accelerate_config
_OVERRIDES = {
    "num_processes": int,
    "num_machines": int,
    "machine_rank": int,
    "main_process_ip": str,
    "main_process_port": int,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the subcommand that the first word names."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<12}{purpose}" for name, (_, purpose) in _COMMANDS.items())
        print(f"usage: opefo-trl COMMAND ...\n\n{rows}\n\nopefo-trl COMMAND --help says more. Page: README.md")
        return
    name, *words = words
    if name not in _COMMANDS:
        hint = did_you_mean(name, _COMMANDS)
        _refuse("opefo-trl", f"There is no subcommand {name!r}.{hint} Choose one of {', '.join(_COMMANDS)}.")
    target, _ = _COMMANDS[name]
    if target.endswith(".py"):
        _run_script(name, TOP / target, words)
    else:
        import_module(target).main(words)


def _refuse(program: str, message: object) -> NoReturn:
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def _run_script(name: str, script: Path, words: list[str]) -> None:
    parser = _parser(name, script)
    lists_all = words[-2:] == ["--help", "all"]
    if not lists_all and {"-h", "--help"} & set(words):
        parser.print_help()
        return
    options, rest = parser.parse_known_args(words)
    try:
        if options.config is not None:
            rest = ["--config", str(find_file("config", options.config, RECIPES)), *rest]
        launch = None if lists_all else _launch_options(name, options, rest)
    except ValueError as error:
        _refuse(parser.prog, error)
    if launch is None:
        sys.argv = [str(script), *rest]
        runpy.run_path(str(script), run_name="__main__")
    else:
        _launch(parser.prog, [*launch, str(script), *rest])


def _parser(name: str, script: Path) -> argparse.ArgumentParser:
    """Return the parser of the options that are not passed on as they are. Its help begins as the script does."""
    parser = argparse.ArgumentParser(
        prog=f"opefo-trl {name}",
        usage=f"opefo-trl {name} [--accelerate_config MACHINE] [--OPTION VALUE ...]",
        description=ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))),
        epilog=f"--help all lists every option. Page: {_PAGES[name]}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=119, max_help_position=32),
        add_help=False,
        allow_abbrev=False,
    )
    recipes = f"{', '.join(names_in(RECIPES))}, or a file."
    machines = f"{', '.join(names_in(MACHINES))}, a file, or a number of processes. As for `accelerate launch`, "
    machines += f"{', '.join(f'--{option}' for option in _OVERRIDES)} take precedence."
    parser.add_argument("--accelerate_config", metavar="MACHINE", help=machines)
    for option, kind in _OVERRIDES.items():
        parser.add_argument(f"--{option}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="RECIPE", help=recipes if name == "train" else argparse.SUPPRESS)
    return parser


def _launch_options(name: str, options: argparse.Namespace, rest: list[str]) -> list[str] | None:
    """Return options for `accelerate launch`, or None if the script runs in this process."""
    overrides = {option: value for option in _OVERRIDES if (value := getattr(options, option)) is not None}
    machine = options.accelerate_config or overrides.get("num_processes")
    if machine is None and overrides:
        raise ValueError(f"`{next(iter(overrides))}` needs a machine: --accelerate_config multi_node, or a file.")
    on_cpu = name == "train" and _stays_on_cpu(rest)
    if machine is None and (name == "eval" or on_cpu):
        return None
    import torch  # as late as this, so that help comes at once
    from accelerate.commands.config.config_args import default_config_file

    if machine is None and Path(default_config_file).is_file():  # from `accelerate config`; accelerate reads it itself
        return []
    gpus = torch.cuda.device_count()
    if not isinstance(machine, str) or machine.isdecimal():
        processes = max(gpus, 1) if machine is None else int(machine)
        check_number("accelerate_config", processes, low=1)
        if overrides.get("num_processes", processes) == 1 and overrides.get("num_machines", 1) == 1:
            if gpus > 1:  # or transformers would divide each batch over all of them by nn.DataParallel
                visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
                os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
            return None
        # Not the bf16 of ddp.yaml: `bf16` of the run decides
        overrides = {"num_processes": processes, "mixed_precision": "no"} | overrides
        machine = "ddp" if gpus and not on_cpu else "cpu"
    file = find_file("accelerate_config", machine, MACHINES)
    _check_gpus(gpus, file, overrides)
    return ["--config_file", str(file), *(f"--{option}={value}" for option, value in overrides.items())]


def _stays_on_cpu(words: list[str]) -> bool:
    """Return whether the options, or else the recipe, keep a run on the CPU, whatever GPUs there are."""
    parser = argparse.ArgumentParser("opefo-trl train", add_help=False, allow_abbrev=False)
    for option in ("config", "model_name_or_path", "use_cpu"):
        parser.add_argument(f"--{option}", f"--{option.replace('_', '-')}", nargs="?", const="true", dest=option)
    options, _ = parser.parse_known_args(words)
    if options.use_cpu is not None:
        return options.use_cpu.lower() in ("true", "t", "yes", "y", "1")
    if options.config is None and options.model_name_or_path in (None, "playground"):
        options.config = RECIPES / "quickstart.yaml"
    try:
        recipe = yaml.safe_load(Path(options.config).read_text(encoding="utf-8")) if options.config else None
    except (yaml.YAMLError, UnicodeDecodeError):  # the script will say it
        return False
    return isinstance(recipe, dict) and recipe.get("use_cpu") is True


def _check_gpus(gpus: int, file: Path, overrides: dict[str, int | str]) -> None:
    """Check that this machine has a GPU for each of its processes, unless they run on the CPU."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        machine = vars(load_config_from_file(str(file))) | overrides
    except Exception as error:  # a file that is not accelerate's fails in many ways
        raise ValueError(f"`accelerate_config={str(file)!r}` is no file of `accelerate config`: {error}") from error
    processes = (machine["num_processes"] or 1) // (machine["num_machines"] or 1)
    if not machine["use_cpu"] and 0 < gpus < processes:
        raise ValueError(
            f"`accelerate_config={str(file)!r}` takes {processes} processes here, and there are {gpus} GPUs. "
            f"Set --num_processes {gpus * machine['num_machines']}."
        )


def _launch(program: str, words: list[str]) -> None:
    """Run `accelerate launch`; if a process fails, say which one instead of accelerate's traceback."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # accelerate's `simple_launcher` has no handlers and waits for the script, which gets Ctrl-C itself but not SIGTERM
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in psutil.Process().children()])
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except subprocess.CalledProcessError as error:
        _blame(program, {0: error.returncode})
    except ChildFailedError as error:
        _blame(program, {rank: failure.exitcode for rank, failure in error.failures.items()})
    except (ImportError, ValueError, OSError) as error:  # such as: DeepSpeed is not installed, a port is in use
        _refuse(program, error)


def _blame(program: str, codes: dict[int, int]) -> NoReturn:
    """Say how ranks of this machine ended, and exit as the first of them."""
    for code in (2, 130):  # a mistake, or Ctrl-C: the script has said it
        if code in codes.values():
            raise SystemExit(code)
    # When a rank ends, the launcher ends the others by SIGTERM
    causes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    text = "; ".join(f"Rank {rank} {_ending(code)}" for rank, code in causes.items())
    if -signal.SIGKILL in causes.values():
        text += ". The kernel does that when memory runs out"
    if max(causes.values()) > 0:
        text += "; see above. Where a connection was lost, another machine's rank ended first: see its output"
    print(f"{program}: error: {text}. The same command resumes, on every machine of the run.", file=sys.stderr)
    code = next(iter(causes.values()))
    raise SystemExit(code if code > 0 else 128 - code)


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


if __name__ == "__main__":
    main()
