"""eval.py on the playground, in this process (which spares its imports) or as a command."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from scripts import ROOT, load_script
from transformers import PreTrainedModel

SMALL = "--temperature 1 --top_p 1 --max_new_tokens 12 --batch_size 16 --k 4".split()  # noqa: SIM905


def command(out: Path, *more: str) -> list[str]:
    task = () if "--dataset_name" in more else ("--benchmarks", "playground")
    options = ("--model", "playground", *task, *SMALL, "--output_dir", str(out), *more)
    return [sys.executable, str(ROOT / "eval.py"), *options]


class Done(NamedTuple):
    stdout: str
    stderr: str


def run(out: Path, *more: str, refused: bool = False) -> Done:
    """Run the script to its end, or to the refusal that is expected."""
    stdout, stderr, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = command(out, *more)[1:]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            load_script("eval.py").main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    assert code == (2 if refused else 0), stderr.getvalue()
    return Done(stdout.getvalue(), stderr.getvalue())


def refusal(out: Path, *more: str) -> str:
    """The one line that the script ends with."""
    (line,) = [line for line in run(out, *more, refused=True).stderr.splitlines() if "opefo-trl eval: error: " in line]
    return line


def logp_of(model: PreTrainedModel, prompt: list[int], ids: list[int], temperature: float, top_p: float) -> float:
    """Compute the log-probability of a completion in the distribution that it is sampled from."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logps = (logits / (temperature or 1.0)).log_softmax(-1)
    if top_p < 1:  # the fewest tokens that hold so much; the others have no chance
        ordered, order = logps.exp().sort(descending=True)
        outside = torch.zeros_like(logps, dtype=torch.bool).scatter(1, order, ordered.cumsum(-1) - ordered >= top_p)
        logps = logps.masked_fill(outside, -torch.inf).log_softmax(-1)
    return float(logps.gather(1, torch.tensor(ids)[:, None]).sum())


def samples(out: Path, name: str = "playground") -> pd.DataFrame:
    return pd.read_parquet(out / "samples" / f"{name}.parquet")
