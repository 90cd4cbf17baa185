"""Real benchmarks and grading cases in tests/material; its README says where each file is from."""

import json
from pathlib import Path

MATERIAL = Path(__file__).parent / "material"
BENCH, HUB_COPIES = MATERIAL / "bench", MATERIAL / "hf_like"


def read_lines(path: str | Path) -> list[dict]:
    """Return the rows of a jsonl file, named relative to tests/material."""
    return [json.loads(line) for line in (MATERIAL / path).read_text(encoding="utf-8").splitlines()]
