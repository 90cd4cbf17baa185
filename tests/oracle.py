"""The formulas of flow.py once more, in numpy and float64, one token at a time and straight from the definitions."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    z = np.exp(logits - logits.max())
    return z / z.sum()


def entropy(p: np.ndarray) -> float:
    return float(-sum(x * np.log(x) for x in p if x > 0))


def flow(p: np.ndarray, token: int, advantage: float, estimator: str) -> float:
    """d_t of one token sampled from the distribution p."""
    pi, h = p[token], entropy(p)
    if estimator == "sampled":
        return -advantage * (1 - pi) ** 2 * (np.log(pi) + h)
    if estimator == "steer":
        return -advantage * (1 - pi) * (np.log(pi) + h)
    if estimator == "own_logit":
        return -advantage * pi * (1 - pi) * (np.log(pi) + h)
    if estimator == "exact":
        return -advantage * (pi * (np.log(pi) + h) - sum(x**2 * (np.log(x) + h) for x in p))
    if estimator == "expected":
        return -advantage * sum(x * (1 - x) ** 2 * (np.log(x) + h) for x in p)
    raise KeyError(estimator)


def flows(p: np.ndarray, tokens: np.ndarray, advantages: np.ndarray, mask: np.ndarray, estimator: str) -> np.ndarray:
    """d_t of all tokens (B, T) sampled from p (B, T, V); 0 where the mask is 0."""
    if estimator == "covariance":
        logps = np.log(np.take_along_axis(p, tokens[..., None], -1)[..., 0])
        return covariance_flow(logps, np.broadcast_to(advantages[:, None], logps.shape), mask)
    flow_of = np.vectorize(lambda b, t: flow(p[b, t], tokens[b, t], advantages[b], estimator), otypes=[float])
    return flow_of(*np.indices(tokens.shape)) * mask


def covariance_flow(logps: np.ndarray, advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The covariance estimator needs all tokens at once; 0 where the mask is 0."""
    kept = mask.astype(bool)
    mean_a, mean_l = advantages[kept].mean(), logps[kept].mean()
    return np.where(kept, -(advantages - mean_a) * (logps - mean_l), 0.0)


def lambda_star(flow: np.ndarray) -> float:
    up, down = flow[flow > 0].sum(), -flow[flow < 0].sum()
    return 0.0 if up == 0 or down == 0 else (down - up) / (down + up)


def weights(flow: np.ndarray, lam: float) -> np.ndarray:
    return np.array([1 + lam if d > 0 else 1 - lam if d < 0 else 1.0 for d in flow.ravel()]).reshape(flow.shape)
