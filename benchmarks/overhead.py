"""Cost of entropy-flow control: the training phase of OPEFOTrainer over that of TRL's GRPOTrainer.

    make bench                                     # a 4M-parameter model on one CPU core, 7 minutes
    python -u benchmarks/overhead.py --controls --rounds 10    # every control beside `none`
    python benchmarks/overhead.py --device cuda --hidden 1536 --layers 28 --vocab 151936 --length 1024

Both trainers get the same recorded rollouts, so that everything but generation and rewards is timed: scoring, loss,
backward, clipping, update. Each variant and GRPO take steps in turns, in the order A B B A; a ratio is
(B + B) / (A + A) of one such round. The output is the median of the ratios, their quartiles, and the ratio of the
median step times. On a CPU one thread is used, and `make bench` keeps glibc from returning memory between steps: both
make the times steadier, equally for both sides.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence

import torch
from replay import a_b_b_a, add_sizes, build, describe, quartiles, replay, rollout, write_results
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS

VARIANTS = {
    "control none": {"control": "none"},
    "scope micro": {"flow_scope": "micro"},
    "scope running": {"flow_scope": "running"},
    "scope batch": {"flow_scope": "batch"},
    "flow_target": {"flow_target": 20.0},  # above the entropy of any vocabulary: it pushes in every step
    "batch, expected": {"flow_estimator": "expected"},
    "batch, exact": {"flow_estimator": "exact"},
}
# With `flow_scope: running` no control needs a scoring pass, so all of them run the same forwards
CONTROL_VARIANTS = {
    name: {"control": name, "strict_on_policy": control.acts_on_policy, "flow_scope": "running"}
    for name, control in CONTROLS.items()
    if name != "none"
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore", message="`control=")  # notes on fields and sources do not matter for the time
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    replay([uneven(options) for _ in range(8)])
    if options.controls:
        variants, baseline = CONTROL_VARIANTS, "control none"
        grpo = build(OPEFOTrainer, OPEFOConfig, options, micro_batching="trl", control="none")
    else:
        variants, baseline = VARIANTS, "GRPOTrainer"
        grpo = build(GRPOTrainer, GRPOConfig, options)
    grpo.train()
    grpo.model.forwards = 0
    print(describe(grpo, options))
    print(f"{'':22} {'ratio':>7} {'quartiles':>18} {'ratio of medians':>17} {'forwards/step':>14} {'s/step':>7}")
    results = {}
    for name in options.variants or variants:
        ours = build(OPEFOTrainer, OPEFOConfig, options, micro_batching="trl", **variants[name])
        ours.train()
        ours.model.forwards = 0
        grpo_seconds, ours_seconds = a_b_b_a(grpo, ours, options)
        low, median, high = quartiles(ours_seconds, grpo_seconds)
        results[name] = {
            "ratio": median,
            "quartiles": [low, high],
            "ratio_of_medians": statistics.median(ours_seconds) / statistics.median(grpo_seconds),
            "forwards": ours.model.forwards / (2 * options.rounds),
            "seconds": statistics.median(ours_seconds) / 2,
        }
        row = results[name]
        print(
            f"{name:22} {median:7.3f} {low:9.3f} .. {high:5.3f} {row['ratio_of_medians']:17.3f} "
            f"{row['forwards']:14.2f} {row['seconds']:7.3f}",
            flush=True,
        )
        write_results(options, results)
        del ours
    forwards = grpo.model.forwards / (2 * options.rounds * len(results))
    print(f"{baseline:22} {1:7.3f} {'':37} {forwards:14.2f} {statistics.median(grpo_seconds) / 2:7.3f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 256, "layers": 3, "vocab": 4096, "rows": 8, "generations": 4, "length": 96}
    add_sizes(parser, **sizes, accumulation=2, rounds=40)
    parser.add_argument("--variants", nargs="*", choices=[*VARIANTS, *CONTROL_VARIANTS])
    parser.add_argument("--controls", action="store_true", help="every control beside `none`, in place of GRPOTrainer")
    return parser.parse_args(arguments)


def uneven(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return a rollout with completions of uneven length, half of them rewarded."""
    rows, groups = options.rows, options.rows // options.generations
    lengths = torch.randint(options.length // 4, options.length + 1, (rows,))
    lengths[0] = options.length
    rewards = torch.randint(0, 2, (groups, options.generations)).float()
    return rollout(options, lengths, torch.full((rows,), 16), rewards)


if __name__ == "__main__":
    main()
