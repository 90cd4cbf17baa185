"""Simulated runs that a law may be tried on: entropy that answers to flows through gains the law does not know.

    H' = H + rate gain (x_natural + ratio x_pushed),    x: flows, averaged as an optimizer's first moment does

`PLAYGROUND` falls as the playground does, `SMOLLM2` as SmolLM2-135M on one-word answers: there a measurement scatters
by a tenth, flows as estimated from a batch by half and more, and the natural flow promises more than it does, by a
factor that wanders. `FADING` has the gains that a least-squares fit found in a run of it (benchmarks/flow_gains.py,
docs/log.md): after the fall a flow of either kind moves entropy a fifth as far as during it. `WEAK` is another run
of it: the push has to be large at all times, and hardly reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from opefo_trl.controls.tracker import EntropyTracker

AHEAD = 4  # steps after which a law that knows all wants to be at its target; of 1 to 6 the best on random plants


@dataclass(frozen=True)
class Plant:
    steps: int = 300
    rate: float = 4e-4
    warmup: int = 20
    decays: bool = True
    gain: float = 250.0
    ratio: float = 10.0  # of the push's gain to the natural one
    momentum: float = 0.9
    told: float | None = None  # the momentum that the law is told, if it is wrong
    noise: float = 0.012  # of a measurement, nats
    flow_noise: float = 0.5
    hold_noise: float = 0.2
    natural: float = 0.12
    hold: float = 0.15  # flow of lambda = 1 at the target
    kept: tuple[float, float] = (1.0, 1.0)  # what the natural flow does of what it promises, at first and from mid-run
    wander: float = 0.0
    fades: float = 1.0  # what is left of both gains some steps after entropy has come near its target
    start: float = 1.47
    target: float = 0.4
    shape: str = "constant"
    most: float = 2.0  # bound of lambda
    updates: int = 1  # on each rollout, which is measured once

    def target_at(self, step: int) -> float:
        done = step / self.steps
        return {
            "constant": lambda: self.target,
            "jump": lambda: self.target * (1.3 if done >= 0.6 else 1),
            "drop": lambda: self.target * (0.75 if done >= 0.6 else 1),
            "above": lambda: 1.15 * self.start,
            "wave": lambda: self.target * (1 + 0.5 * (1 - done) * math.cos(6 * math.pi * done)),
            "hill": lambda: self.target * (1 + 0.5 * math.sin(math.pi * done)),
            "anneal": lambda: self.target * min(1, 1.5 - done),
        }[self.shape]()

    def rate_at(self, step: int) -> float:
        left = 1 - max(0, step - self.warmup) / (self.steps - self.warmup) if self.decays else 1
        return self.rate * min(1, (step + 1) / self.warmup) * left


PLAYGROUND = Plant()
SMOLLM2 = Plant(
    rate=2e-5, warmup=5, decays=False, gain=5e4, ratio=1.3, noise=0.08, hold_noise=0.7, natural=0.2, hold=0.4,
    kept=(0.6, 0.3), wander=0.6, start=1.78, target=1.0,
)  # fmt: skip

FADING = replace(
    SMOLLM2, ratio=1.0, gain=6e4, noise=0.1, flow_noise=0.25, natural=0.16, hold=0.5, kept=(1.0, 1.0), wander=0.3,
    fades=0.2,
)  # fmt: skip

WEAK = replace(FADING, gain=4e4, fades=0.6, hold=0.35, natural=0.19, noise=0.12)


def random_plant(seed: int) -> Plant:
    """Draw a plant: wrong gains (x0.3 to x30), learning rates x1/3 to x3, noise x1/4 to x4, other momenta, some of
    which the law is not told, and targets that jump, move or lie above the first entropy."""
    generator = np.random.default_rng(1000 + seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    ratio = between(0.3, 30)
    return Plant(
        steps=int(generator.choice([300, 600])),
        ratio=ratio,
        most=max(2.0, 3 * PLAYGROUND.natural / (ratio * PLAYGROUND.hold)),  # or no law could hold it
        rate=PLAYGROUND.rate * between(1 / 3, 3),
        noise=PLAYGROUND.noise * between(1 / 4, 4),
        momentum=float(generator.choice([0.0, 0.9, 0.9, 0.95])),
        decays=bool(generator.random() < 0.5),
        wander=float(generator.choice([0.0, 0.3])),
        target=PLAYGROUND.target * between(0.6, 1.3),
        told=float(generator.choice([0.0, 0.9])) if generator.random() < 0.25 else None,
        shape=str(generator.choice(["constant"] * 3 + ["jump", "drop", "above", "wave", "hill", "anneal"])),
    )


def simulate(plant: Plant, seed: int, held_by: str | None = "law") -> np.ndarray:
    """Return the true entropy of each step of a run that is held by our law, by none, or by a yardstick that `knows
    all`: the true entropy, flows, gains and momentum."""
    return simulate_with_bounds(plant, seed, held_by)[0]


def simulate_with_bounds(plant: Plant, seed: int, held_by: str | None = "law") -> tuple[np.ndarray, np.ndarray]:
    """Return the true entropy of each step, and whether lambda was at its bound."""
    generator, law = np.random.default_rng(seed), EntropyTracker()
    told = plant.momentum if plant.told is None else plant.told
    since_near, average = 0, partial(_average, plant.momentum)
    entropy, natural_average, pushed_average, wander = plant.start, 0.0, 0.0, 0.0
    entropies, bounded = [], []
    for step in range(plant.steps):
        entropies.append(entropy)
        noise = generator.standard_normal(5)
        rate, target = plant.rate_at(step), plant.target_at(step)
        flow = -plant.natural * min(1, entropy / (1.25 * plant.target))
        wander = 0.95 * wander + plant.wander * 0.31 * noise[3]
        first, later = plant.kept
        kept = max((first + (later - first) * min(1, 2 * step / plant.steps)) * (1 + wander), -0.2)
        if since_near or entropy < 1.3 * target:
            since_near += 1
        moves = rate * plant.gain * (plant.fades + (1 - plant.fades) * math.exp(-since_near / 5))
        natural_average = average(natural_average, kept * flow * (1 + 0.5 * plant.flow_noise * noise[4]))
        pushed, at_bound = 0.0, False
        if held_by == "knows all":
            hold = plant.hold * entropy / plant.target
            missing, moved_by_unit = plant.target_at(step + AHEAD) - entropy, 0.0
            natural_then, pushed_then = natural_average, plant.momentum * pushed_average
            for ahead in range(1, AHEAD + 1):
                missing -= moves * (natural_then + plant.ratio * pushed_then)
                moved_by_unit += moves * plant.ratio * (1 - plant.momentum**ahead)
                natural_then, pushed_then = average(natural_then, kept * flow), plant.momentum * pushed_then
            pushed = min(max(missing / moved_by_unit / hold, -plant.most / 4), plant.most) * hold if moves else 0.0
        elif held_by == "law":
            if step % plant.updates == 0:
                measured, seen = max(entropy + plant.noise * noise[0], 1e-3), flow * (1 + plant.flow_noise * noise[1])
                hold = plant.hold * entropy / plant.target * math.exp(plant.hold_noise * noise[2])
                law.measure(measured)
            wanted = law.aim(seen, target, plant.target_at(step + 1) - target, rate, told)
            if wanted is None:
                wanted = -seen if measured < target else 0.0
            low = -plant.most / 4 if law.engaged else 0.0
            lam = min(max(wanted / hold, low), plant.most)
            pushed, at_bound = lam * hold, law.engaged and lam != wanted / hold
            law.record_update(seen, pushed, rate, told)
        bounded.append(at_bound)
        pushed_average = average(pushed_average, pushed)
        entropy = max(entropy + moves * (natural_average + plant.ratio * pushed_average), 0.01)
    return np.array(entropies), np.array(bounded)


def _average(momentum: float, old: float, new: float) -> float:
    return momentum * old + (1 - momentum) * new


@dataclass(frozen=True)
class Outcome:
    """How a run was held, from each landing on; a target that jumps is landed on anew."""

    rms: float
    mean: float
    lands: int  # -1: never
    free: int  # step at which a run without a law passes the target; -1: never
    end: float  # mean distance in the last fifty steps, as a part of the target

    def badness(self, limit: float) -> float:
        """Return the rms in units of `limit`, or twice the mean if that is more."""
        return max(self.rms, 2 * abs(self.mean)) / limit

    def meets(self, limit: float) -> bool:
        """Return whether it landed in time, and was held."""
        late = self.free > 0 and self.lands > 1.5 * self.free + 1
        return self.badness(limit) <= 1 and not late and self.lands >= 0


def outcome(plant: Plant, seed: int, held_by: str = "law") -> Outcome:
    entropy, free = simulate(plant, seed, held_by), simulate(plant, seed, held_by=None)
    target = np.array([plant.target_at(step) for step in range(plant.steps)])
    error, near = entropy - target, np.maximum(0.02 * target, plant.noise / 2)
    jumps = np.flatnonzero(np.abs(np.diff(target)) > 0.1 * target[:-1]) + 1
    on = np.zeros(plant.steps, bool)
    for begin, end in zip([0, *jumps], [*jumps, plant.steps], strict=True):
        part = error[begin:end] if error[begin] > 0 else -error[begin:end]
        on[begin:end] = np.maximum.accumulate(part <= near[begin:end])
    held = error[on] if on.any() else np.array([np.inf])
    passes = first_of(free - target <= near)
    return Outcome(
        math.sqrt((held**2).mean()),
        float(held.mean()),
        first_of(on),
        passes,
        float(np.mean(np.abs(error / target)[-50:])),
    )


def first_of(flags: np.ndarray) -> int:
    return int(flags.argmax()) if flags.any() else -1
