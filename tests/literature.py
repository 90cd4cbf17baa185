"""The controls of the literature once more, in numpy, straight from their formulas."""

import math

import numpy as np


def covariances(logps, advantages, mask):
    kept = mask.astype(bool)
    return (advantages - advantages[kept].mean()) * (logps - logps[kept].mean())


def steer(p, old_p, entropy, advantage, mask, kind, low, high):
    """Weights of all tokens; `advantage` is given per token."""
    omega = np.where(mask == 1, advantage / old_p * p * (1 - p) * (np.log(p) + entropy), 0)
    sizes = np.abs(omega)[mask == 1]
    k = -math.log(low) / max(sizes.max(), 0.02)
    weights = {
        "exponential": np.exp(-k * np.abs(omega)),
        "asymmetric": np.exp(-k * omega),
        "linear": high - (np.abs(omega) - sizes.min()) * (high - low) / (sizes.max() - sizes.min()),
    }
    return np.clip(weights[kind], low, high)


def ce_gppo(r, advantage, beta_low=0.75, beta_high=1.0, low=0.2, high=0.2, dual=3.0):
    """What the gradient of log p is multiplied with."""
    if advantage < 0 and r > dual:
        return 0.0
    if advantage < 0 and r < 1 - low:
        return beta_low * (1 - low) * advantage
    if advantage > 0 and r > 1 + high:
        return beta_high * (1 + high) * advantage
    return r * advantage


def bapo(r, advantage, mask, target=1.0, lows=(0.6, 0.8), highs=(1.2, 2.0), step=0.05):
    """The bounds, by the loop of the paper."""
    kept = mask.astype(bool)
    r, advantage = r[kept], advantage[kept]

    def short(low, high):
        gain = sum(min(x, high) * a for x, a in zip(r, advantage, strict=True) if a >= 0)
        loss = sum(max(x, low) * -a for x, a in zip(r, advantage, strict=True) if a < 0)
        return gain < target * loss

    (low, low_end), (high, high_end) = lows, highs
    while short(low, high) and low < low_end - 1e-9:
        low += step
    while short(low, high) and high < high_end - 1e-9:
        high += step
    return low, high


def dcpo(q, low=0.16, high=0.2, most=10.0):
    return (1 + math.sqrt(max(1 - 4 * low / q, 0))) / 2, min((1 + math.sqrt(1 + 4 * high / q)) / 2, most)


def repo(logp, advantage, zeta):
    if advantage > 0:
        return max(advantage * (1 - zeta * logp), 0)
    return min(advantage * (1 + zeta * logp), 0)


def dynamic_bounds(p, done, schedule, epsilon=0.2):
    """(E-, E+) of a token at the share `done` of a run."""
    upper = (1 + 0.5) / (1 + 0.25 * p) - 1
    lower = 1 - (1 - 0.3) / (1 - 0.13 * p)
    l = 1 - 2 * done  # noqa: E741
    if schedule == "increase_decrease":
        if done <= 0.5:
            return epsilon, l * upper + (1 - l) * epsilon
        return (1 + l) * lower - l * epsilon, epsilon
    if done <= 0.5:
        return epsilon, l * epsilon + (1 - l) * upper
    return (1 + l) * lower - l * epsilon, upper


def entropic(entropies, target, proportional, integral):
    """EntroPIC's alpha at each step; a step without an entropy repeats the last one."""
    alphas, errors = [], []
    for entropy in entropies:
        if math.isnan(entropy):
            alphas.append(alphas[-1])
            continue
        error = entropy - target
        alphas.append(min(1, max(-1, proportional * error + integral * sum(errors))))
        errors.append(error)
    return alphas


def asym_grpo(advantage, p, positive=0.9, negative=0.4):
    if advantage > 0:
        return math.exp(positive * (math.log(1 - p) - math.log(p)))
    if advantage < 0:
        return -math.exp(negative * (math.log(p) - math.log(1 - p)))
    return 0.0
