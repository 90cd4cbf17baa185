"""Cost of taking the flow from generation: generation with and without it, transformers on both sides.

    python benchmarks/generation.py                        # the playground, and a model with a vocabulary of 32,768
    python benchmarks/generation.py --rounds 5

Both trainers generate a rollout in turns, in the order A B B A, with A for GRPOTrainer; every completion has the full
length. A ratio is (B + B) / (A + A) of one such round; the table has the median of the ratios and their quartiles. One
CPU thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from replay import build, describe, quartiles, seconds, write_results
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer

SIZES = {  # of the model and of its rollouts
    "playground": {"hidden": 128, "layers": 2, "vocab": 64, "rows": 64, "length": 12},
    "vocabulary 32,768": {"hidden": 256, "layers": 4, "vocab": 32768, "rows": 16, "length": 64},
}
ESTIMATORS = ("sampled", "exact")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="A B B A rounds of each comparison")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    given = parser.parse_args(arguments)
    given.device = "cpu"
    torch.set_num_threads(1)
    results = []
    for name, sizes in SIZES.items():
        options = SimpleNamespace(device="cpu", generations=8, accumulation=2, rounds=given.rounds, **sizes)
        theirs = build(GRPOTrainer, GRPOConfig, options)
        print(f"{name}: {describe(theirs, options)}")
        for estimator in ESTIMATORS:
            ours = build(OPEFOTrainer, OPEFOConfig, options, flow_estimator=estimator, entropy_curves=False)
            a, b = [], []
            for number in range(-1, given.rounds):  # the first round is a warm-up
                times = [generation(trainer, options) for trainer in (theirs, ours, ours, theirs)]
                if number >= 0:
                    a.append(times[0] + times[3])
                    b.append(times[1] + times[2])
            low, median, high = quartiles(b, a)
            results.append({"model": name, "estimator": estimator, "ratio": median, "quartiles": [low, high]})
            print(f"{estimator:12} {median:6.3f} {low:8.3f} .. {high:.3f} {min(a) / 2:8.3f} s", flush=True)
    write_results(given, results)


def generation(trainer, options: SimpleNamespace) -> float:
    """Return the seconds that a rollout of full length takes."""
    trainer.model.train()
    trainer.generation_config.min_new_tokens = options.length
    torch.manual_seed(0)
    prompts = [[2] * 16] * options.rows
    return seconds(lambda: trainer._generate_single_turn(prompts, None, {}, options.generations))


if __name__ == "__main__":
    main()
