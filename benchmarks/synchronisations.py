"""How often an optimizer step waits for the device, and where: ours beside TRL's GRPOTrainer.

    python benchmarks/synchronisations.py --device cuda --json out/synchronisations.json

Both trainers take a step on the same recorded rollout. A wait is counted in the phase that it falls into:

    rollout    the generation batch is measured and divided into micro-batches (generation itself is recorded)
    loss       a micro-batch's forward, control and loss, up to the backward
    backward   backward
    end        guards, metrics, clipping, update

Nothing of ours waits in `loss` (CONTRIBUTING.md): TRL's loss fetches its metrics there, and we must add nothing to
that. On a GPU torch's sync debug mode reports each wait. A CPU never waits, so there the operations are counted that
would make a GPU wait: a number fetched from a tensor, and results whose size depends on values.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from replay import add_sizes, build, describe, replay, rollout, step, write_results
from torch.utils._python_dispatch import TorchDispatchMode
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer

PHASES = ("rollout", "loss", "backward", "end")
VARIANTS: dict[str, dict[str, Any]] = {
    "control none": {"micro_batching": "trl", "control": "none"},
    "scope batch": {"micro_batching": "trl"},
    "scope running": {"micro_batching": "trl", "flow_scope": "running"},
    "scope micro": {"micro_batching": "trl", "flow_scope": "micro"},
    "target": {"micro_batching": "trl", "flow_target": 0.5},
    "exact": {},
    "exact, target": {"flow_target": 0.5},
}
aten = torch.ops.aten
_FETCHING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.is_nonzero}


class Waits:
    """Counts of waits by phase and by place in the code."""

    def __init__(self) -> None:
        self.phases = ["end"]
        self.places: Counter[tuple[str, str]] = Counter()

    def add(self) -> None:
        self.places[self.phases[-1], place()] += 1

    def of(self, phase: str) -> int:
        return sum(count for (name, _), count in self.places.items() if name == phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def follow(self, owner: Any, method: str, name: str) -> None:
        """Let calls of a method count as a phase."""
        original = getattr(owner, method)

        def within(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, within)


def place() -> str:
    """Return file and line of the innermost caller in our package or TRL, or else of the innermost caller at all."""
    frame, innermost = sys._getframe(2), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.name not in ("warnings.py", Path(__file__).name):
            innermost = innermost or frame
            if {"opefo_trl", "trl"} & set(path.parts):
                innermost = frame
                break
        frame = frame.f_back
    if innermost is None:
        return "?"
    path = Path(innermost.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{innermost.f_lineno}"


class FetchingOperations(TorchDispatchMode):
    """Counts operations that would wait for a GPU."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or func.overloadpacket in _FETCHING:
            self.waits.add()
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(waits: Waits, device: str) -> Iterator[None]:
    if device == "cpu":
        with FetchingOperations(waits):
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def seen(message: Any, *args: Any, **kwargs: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                waits.add()
            else:
                show(message, *args, **kwargs)

        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of(trainer: Any, options: argparse.Namespace) -> Waits:
    """Return the waits of one optimizer step, after a first one."""
    trainer.train()
    waits = Waits()
    waits.follow(trainer, "_prepare_inputs", "rollout")
    waits.follow(trainer, "compute_loss", "loss")
    waits.follow(trainer.accelerator, "backward", "backward")
    step(trainer, options)
    waits.places.clear()
    with counted(waits, options.device):
        step(trainer, options)
    return waits


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    rows, groups = options.rows, options.rows // options.generations
    lengths = torch.randint(options.length // 4, options.length + 1, (rows,))
    rewards = torch.randint(0, 2, (groups, options.generations)).float()
    replay([rollout(options, lengths, torch.full((rows,), 16), rewards)])
    results = {}
    for name, settings in {"GRPOTrainer": None, **VARIANTS}.items():
        if settings is None:
            trainer = build(GRPOTrainer, GRPOConfig, options)
            print(f"{describe(trainer, options)}\n{'':16}", *(f"{phase:>9}" for phase in PHASES))
        else:
            trainer = build(OPEFOTrainer, OPEFOConfig, options, **settings)
        waits = waits_of(trainer, options)
        results[name] = {phase: waits.of(phase) for phase in PHASES}
        results[name]["places"] = {f"{phase}: {where}": n for (phase, where), n in waits.places.most_common()}
        print(f"{name:16}", *(f"{results[name][phase]:9}" for phase in PHASES), flush=True)
        write_results(options, results)
        del trainer
    for where, count in results["exact, target"]["places"].items():
        print(f"{count:4}  {where}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 64, "layers": 2, "vocab": 256, "rows": 16, "generations": 4, "length": 32}
    add_sizes(parser, **sizes, accumulation=4, rounds=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
