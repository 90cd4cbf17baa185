"""Speed-up of the training phase by exact micro-batching, compared with TRL's GRPOTrainer on the same rollouts.

    make bench-training                                # a 1M-parameter model on one CPU core, 10 minutes
    python benchmarks/training_phase.py --scope running
    python benchmarks/training_phase.py --device cuda --hidden 1024 --layers 24 --vocab 151936 --length 2048

Profiles of a rollout whose longest completion is `--length`:

    uniform            all completions have the full length and an advantage: nothing to gain
    moderate           lengths are normal, with a mean of 40 % of the longest and a deviation of 15 %
    heavy tails        lengths are lognormal, with a mean of a quarter of the longest
    heavy tails, zeros the same, and 40 % of the groups are without a signal, since all of their rewards are equal

A ratio is (A + A) / (B + B) of a round A B B A with A for GRPOTrainer: above 1 ours is faster. `forwards` counts the
forwards of the model in a step of ours, those without gradient included; TRL runs one per micro-batch. `padded` is the
number of tokens in training forwards over those that are not padding. Peak memory is the maximum that tensors held
during a step, less what they held before it. The gradient is compared in fp32 with that of the same control on TRL's
micro-batches: the largest relative norm of the difference over all rollouts.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Sequence

os.environ.update(KINETO_LOG_LEVEL="5", TORCH_CPP_LOG_LEVEL="ERROR")  # silence the profiler

import torch
from replay import a_b_b_a, add_sizes, build, describe, quartiles, replay, rollout, step, write_results
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer

PROFILES = ("uniform", "moderate", "heavy tails", "heavy tails, zeros")
ROLLOUTS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    results = []
    scope = {"flow_scope": options.scope}
    for profile in options.profiles or PROFILES:
        torch.manual_seed(1)
        rollouts = [profiled(profile, options) for _ in range(ROLLOUTS)]
        replay(rollouts)
        apart = None if options.no_gradient else gradient_difference(options, scope)
        theirs = build(GRPOTrainer, GRPOConfig, options)
        ours = build(OPEFOTrainer, OPEFOConfig, options, entropy_curves=False, **scope)
        for trainer in (theirs, ours):
            trainer.train()
            trainer.model.forwards = 0
        if not results:
            print(describe(theirs, options))
            print(
                f"{'profile':20} {'scope':8} {'times faster':>12} {'quartiles':>16} {'s/step':>15} {'forwards':>9} "
                f"{'padded: TRL':>12} {'ours':>6} {'peak MiB: TRL':>14} {'ours':>7} {'gradient':>9}"
            )
        a, b = a_b_b_a(theirs, ours, options)
        low, median, high = quartiles(a, b)
        row = {
            "profile": profile,
            "scope": options.scope,
            "ratio": median,
            "quartiles": [low, high],
            "seconds": [statistics.median(a) / 2, statistics.median(b) / 2],
            "forwards": ours.model.forwards / (2 * options.rounds),
            "padded": [padding(theirs), padding(ours)],
            "peak_mib": [peak_mib(theirs, options), peak_mib(ours, options)],
            "gradient": apart,
        }
        results.append(row)
        print(line(row), flush=True)
        write_results(options, results, leave_out=["profiles", "no_gradient"])
        del theirs, ours


def line(row: dict) -> str:
    (a, b), (low, high) = row["seconds"], row["quartiles"]
    (padded_a, padded_b), (peak_a, peak_b) = row["padded"], row["peak_mib"]
    apart = "" if row["gradient"] is None else f"{row['gradient']:.1e}"
    return (
        f"{row['profile']:20} {row['scope']:8} {row['ratio']:12.2f} {low:7.2f} .. {high:5.2f} {a:7.3f} {b:7.3f} "
        f"{row['forwards']:9.1f} {padded_a:12.2f} {padded_b:6.2f} {peak_a:14.1f} {peak_b:7.1f} {apart:>9}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 192, "layers": 2, "vocab": 1024, "rows": 80, "generations": 8, "length": 256}
    add_sizes(parser, **sizes, accumulation=16, rounds=7)
    parser.add_argument("--profiles", nargs="*", choices=PROFILES)
    parser.add_argument("--scope", default="batch", choices=["batch", "running"], help="of the flow")
    parser.add_argument("--no-gradient", action="store_true", help="leave out the comparison of gradients in fp32")
    return parser.parse_args(arguments)


def profiled(profile: str, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    rows, longest, groups = options.rows, options.length, options.rows // options.generations
    if profile == "uniform":
        lengths = torch.full((rows,), float(longest))
    elif profile == "moderate":
        lengths = longest * (0.4 + 0.15 * torch.randn(rows))
    else:
        spread = 0.8
        lengths = torch.exp(math.log(longest / 4) - spread**2 / 2 + spread * torch.randn(rows))
    lengths = lengths.clamp(longest / 64, longest).long()
    lengths[torch.randint(rows, ())] = longest  # one completion reaches the limit
    uniform = profile == "uniform"
    prompts = torch.full((groups,), 16) if uniform else torch.randint(8, 25, (groups,))
    rewards = torch.randint(0, 2, (groups, options.generations)).float()
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    if profile.endswith("zeros"):
        rewards[: round(0.4 * groups)] = 1.0
    return rollout(options, lengths, prompts.repeat_interleave(options.generations), rewards)


class Gradients(TrainerCallback):
    """Records the gradient of every optimizer step."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *_, model=None, **__):
        self.steps.append(torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()]))


def gradient_difference(options: argparse.Namespace, scope: dict[str, str]) -> float:
    """Return the largest relative difference, over all rollouts, between our micro-batches and TRL's."""
    recorded = []
    for micro_batching in ("trl", "exact"):
        settings = {"micro_batching": micro_batching, "entropy_curves": False, "max_grad_norm": 0.0, **scope}
        trainer = build(OPEFOTrainer, OPEFOConfig, options, bf16=False, learning_rate=0.0, **settings)
        trainer.args.max_steps = ROLLOUTS
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        recorded.append(gradients.steps)
    return max(float((ours - theirs).norm() / theirs.norm()) for theirs, ours in zip(*recorded, strict=True))


def padding(trainer) -> float:
    """Return all tokens over those that are not padding, of the micro-batches of the last step."""
    buffered = trainer._buffered_inputs
    shapes = [
        (len(batch["prompt_ids"]), batch["prompt_ids"].size(1), batch["completion_ids"].size(1)) for batch in buffered
    ]
    real = sum(int(batch["prompt_mask"].sum() + batch["completion_mask"].sum()) for batch in buffered)
    return sum(rows * (prompt + completion) for rows, prompt, completion in shapes) / real


def peak_mib(trainer, options: argparse.Namespace) -> float:
    """Return the maximum that tensors held at once during a step."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(trainer, options)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(trainer, options)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


if __name__ == "__main__":
    main()
