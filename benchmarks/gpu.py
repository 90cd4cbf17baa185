"""Everything that waits for a GPU, by itself, in pieces of less than eight minutes.

    python benchmarks/gpu.py --model out/smollm2                      # all pieces, on the GPU
    python benchmarks/gpu.py --pieces overhead sync parity            # some of them
    python benchmarks/gpu.py --pieces words --minutes 7 -- --steps 150 --seeds 0 1 --settings "none: --control none"
    python benchmarks/gpu.py --device cpu --tiny                      # no GPU: the same code on toys, for the tests

    overhead         cost of the control beside GRPOTrainer, on a model of half a billion parameters
    training_phase   gain of exact micro-batching, and peak memory, on the same model
    sync             how often a step waits for the device, beside GRPOTrainer
    parity           lambda and gradient in bf16, beside fp32
    words, sentences SmolLM2 on the two tasks in English; arguments after -- are those of benchmarks/smollm2.py

Each piece writes its JSON to `--folder` as it goes, and prints its table. A piece that fails does not keep the others
from running; the exit status is 1 then. `parity`, `words` and `sentences` need the folder that
`opefo-trl playground smollm2` makes.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import bf16_parity
import overhead
import smollm2
import synchronisations
import torch
import training_phase
from replay import device_of
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer

HALF_A_BILLION = "--hidden 1024 --layers 24 --vocab 151936"
TOY = "--hidden 64 --layers 1 --vocab 64 --rows 16 --generations 4 --accumulation 2 --length 16 --rounds 2"


class Piece:
    """A benchmark, and its arguments on a GPU and on toys."""

    def __init__(self, run: Callable[[Sequence[str]], None], on_gpu: str, on_toys: str, suffix: str = "json"):
        self.run, self.on_gpu, self.on_toys, self.suffix = run, on_gpu, on_toys, suffix


TOY_RUNS = "--steps 1 --seeds 0 --prompts 2 --generations 2 --samples 2 --held-out 2 --settings"
PIECES = {
    "overhead": Piece(
        overhead.main,
        f"{HALF_A_BILLION} --rows 16 --generations 8 --length 1024 --accumulation 2 --rounds 6 "
        "--variants 'control none' 'scope batch' 'scope running' 'batch, exact'",
        f"{TOY} --variants 'control none' 'scope batch'",
    ),
    "training_phase": Piece(
        training_phase.main,
        f"{HALF_A_BILLION} --rows 32 --generations 8 --length 1024 --accumulation 8 --rounds 4 --no-gradient",
        f"{TOY} --profiles moderate",
    ),
    "sync": Piece(
        synchronisations.main,
        "--hidden 512 --layers 4 --vocab 32000 --rows 16 --generations 4 --length 256 --accumulation 4",
        TOY,
    ),
    "parity": Piece(
        bf16_parity.main, "--task words --rollouts 4 --prompts 16", "--task playground --rollouts 1 --prompts 4"
    ),
    "words": Piece(smollm2.main, "--task words --steps 150", f"--task words {TOY_RUNS} opefo:", "jsonl"),
    "sentences": Piece(
        smollm2.main, "--task sentences --steps 150", f"--task sentences {TOY_RUNS} none:--control=none", "jsonl"
    ),
}
ON_MODEL = ("parity", "words", "sentences")  # on SmolLM2


def main() -> int:
    options, more = parse()
    disable_progress_bar()
    options.folder.mkdir(parents=True, exist_ok=True)
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "trl", "datasets")}
    machine = {"device": device_of(options), **packages, "cuda": torch.version.cuda}
    (options.folder / "machine.json").write_text(json.dumps(machine, indent=2))
    print(machine)
    failed = []
    for name in options.pieces:
        begun = time.perf_counter()
        print(f"\n== {name}", flush=True)
        try:
            with alone(60 * options.minutes):
                PIECES[name].run([*arguments_of(name, options), *more.get(name, [])])
        except (Exception, SystemExit):
            traceback.print_exc()
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return bool(failed)


def parse() -> tuple[argparse.Namespace, dict[str, list[str]]]:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pieces", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="toys in place of models: a check of this script")
    parser.add_argument("--model", default="out/smollm2", help="folder of SmolLM2")
    parser.add_argument("--folder", type=Path, default=Path("out/gpu"), help="for the results")
    parser.add_argument("--minutes", type=float, default=8, help="most minutes of a piece")
    options = parser.parse_args(sys.argv[1:end])
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. A check of this script without one: --device cpu --tiny.")
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("These sizes are for a GPU. On a CPU: --device cpu --tiny.")
    needed = [name for name in options.pieces if name in ON_MODEL]
    if needed and not options.tiny and not Path(options.model).is_dir():
        raise SystemExit(
            f"There is no folder {options.model!r} for {', '.join(needed)}. Make it: python -m "
            f"opefo_trl.playground.smollm2 {options.model}. Or choose other --pieces."
        )
    more = sys.argv[end + 1 :]
    return options, dict.fromkeys(("words", "sentences"), more)


def arguments_of(name: str, options: argparse.Namespace) -> list[str]:
    piece = PIECES[name]
    words = shlex.split(piece.on_toys if options.tiny else piece.on_gpu)
    words += ["--device", options.device, "--json", str(options.folder / f"{name}.{piece.suffix}")]
    if name in ON_MODEL:
        words += ["--model", "playground" if options.tiny else options.model]
    if name in ("words", "sentences"):
        words += ["--minutes", str(0.95 * options.minutes)]  # it ends by itself before it is stopped
    return words


@contextmanager
def alone(seconds: float) -> Iterator[None]:
    """Stop a piece after some time, and undo what it leaves behind: TRL's replaced method, memory of the device."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"The piece was stopped after {seconds:.0f} s; what it has written is there.")

    original = GRPOTrainer._generate_and_score_completions
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(round(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        GRPOTrainer._generate_and_score_completions = original
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
