"""Material beside the project that some tests use: real benchmarks and grading cases. Without it they skip."""

import json
import os
from pathlib import Path

import pytest

EVAL = Path(os.environ.get("OPEFO_SHARED", Path(__file__).parents[2] / "shared")) / "eval"


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not (EVAL / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{EVAL} has no {', '.join(missing)}: OPEFO_SHARED says where")


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (EVAL / name).read_text().splitlines()]
