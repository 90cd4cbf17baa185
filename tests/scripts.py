"""Run Python in a process of its own; load a script of the top folder or of benchmarks/ as a module."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def python(*words: object, cwd: Path | None = None, **environment: str) -> str:
    """Run Python with these words, and return what it printed."""
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment}, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=600)
    except BaseException:  # a launcher would leave its ranks behind, which wait for each other
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-4000:]
    return output


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
