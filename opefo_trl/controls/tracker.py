"""Predicts entropy, and solves for the push that moves it as wanted.

The flow of a batch predicts the direction of entropy, not how far it moves: that depends on the learning rate, the
optimizer and the model. `EntropyTracker` learns it from one number a step, the measured entropy, with a Kalman filter:

    H' = H + g_n u_n + g_c u_c + r b

u_n and u_c are the predicted flows of the rewards ("natural") and of the control's push, averaged as the optimizer
averages gradients and multiplied by the learning rate; g_n and g_c are what such a flow achieves, and b is a drift for
whatever the flows miss. Updates cause the drift too, so r is the learning rate, in units of the largest one so far,
summed over the updates between two measurements. From the estimate, `aim` finds the push that gives the wanted change
of entropy:

- far above the target nothing is held back: entropy falls freely;
- near it, the fall is braked as a car is, at a constant rate, so that it ends on the target in finite time;
- from then on a part of the distance is closed in each step, from above and from below alike, and the drift leaves no
  bias.

Pure numbers, without torch. Our own work; the constants were chosen on simulated runs (tests/plants.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__: list[str] = []  # of use inside this package only

# Part of the distance to the target that a step closes, once landed, at the largest learning rate of the run. It falls
# as the root of the rate: with small updates, the scatter of the measurements alone would keep lambda at its bounds.
_CLOSING = 0.4
# Steps for which a push is chosen as if it stayed the same. In one step an optimizer that averages lets little of it
# through: lambda would go from bound to bound after the scatter of the measurements.
_AHEAD = 2
_SMOOTHING = 0.95  # of the natural flow, whose estimate from one batch scatters by half
_BRAKING = 10.0, 5.0  # steps in which a fall is brought to rest, and the fewest of them, at the start of a run
_LEAST_MOMENTUM = 0.8  # assumed at least: if an optimizer averages more than it is said to, entropy would swing
_FIRST_NOISE = 0.1  # first guess of the standard deviation of a measurement, as a part of the entropy; then learned
_FORGETTING = 0.9  # of the noise
_WANDER_ENTROPY = 0.05  # variance a step of the entropy itself at the largest rate, in units of the measurement's
_WANDER_DRIFT = 3e-3  # variance a step of the drift, in units of the measurement's
_DRIFT_KEPT = 0.98  # of the drift, a step: kept for ever, it and a steady push could explain each other away
_WANDER_GAIN = 0.03  # standard deviation a step of a gain, as a part of it
_FIRST_STEP = 0.1  # standard deviation of the entropy's change at the first step, as a part of the entropy
_GUESS = 0.03  # change of entropy a step by the natural flow, as a part of it, where nothing is known yet
_KNOWN = 0.5  # a gain is known if its standard deviation is a smaller part of it
# The push's gain over the natural one, in units of it. It is often more, but a guess that is too low pushes too hard
# and is found out at once; one that is too high hardly pushes, and is found out late.
_MORE_MEAN, _MORE_DEVIATION = 0.5, 3.0
_LEAST_GAIN, _MOST_GAIN = 0.002, 50.0  # bounds of the push's gain, in units of the first natural gain that was known

_ENTROPY, _GAIN, _MORE, _DRIFT = range(4)  # places in the state: the push's gain is the natural one and `_MORE`


class EntropyTracker:
    """
    Learns how far predicted flow moves entropy, and solves for the push that moves it to a target.

    `measure` the entropy of each rollout; for each update on it, `aim` for a push and then `record_update`.

    Attributes:
        engaged (`bool`): whether entropy has come so near its target that it is no longer left to itself.
    """

    def __init__(self) -> None:
        self.engaged = False
        self._landed = False  # whether entropy has come down to its target, or began below it
        self._mean = np.zeros(4)
        self._covariance = np.zeros((4, 4))
        self._noise = 0.0  # variance of a measurement; 0 before the first one
        self._measured = 0
        self._unit = 0.0  # the first natural gain that was known; 0 before
        self._guessed_at = 0.0  # learning rate at which the gains were guessed; 0 if they are known, or not yet used
        self._peak_rate = 0.0  # the largest learning rate so far
        self._fall = 0.0  # of entropy, an update, in the last few steps
        self._smooth_natural: float | None = None
        self._natural = self._pushed = self._weight = 0.0  # averages as the optimizer's first moment takes them
        self._moved = (0.0, 0.0, 0.0)  # u_n, u_c and r of the updates since the last measurement
        self._updates = 0  # since the last measurement

    @property
    def entropy(self) -> float:
        """The estimate of the last measured entropy."""
        return float(self._mean[_ENTROPY])

    def measure(self, entropy: float) -> None:
        """Take in the entropy of a rollout, before it is trained on; a number that is not finite is ignored."""
        if not math.isfinite(entropy):
            return
        if self._noise == 0:
            self._mean[_ENTROPY] = entropy
            self._measured = 1
            self._noise = max(_FIRST_NOISE * entropy, 1e-6) ** 2
            self._covariance[_ENTROPY, _ENTROPY], self._covariance[_DRIFT, _DRIFT] = self._noise, 1e-3 * self._noise
            return
        self._measured += 1
        natural, pushed, rates = self._moved
        updates = max(self._updates, 1)
        self._moved, self._updates = (0.0, 0.0, 0.0), 0
        self._widen(entropy, natural, pushed)
        before = self.entropy
        forecast = np.eye(4)
        forecast[_ENTROPY] = 1.0, natural + pushed, pushed, rates
        forecast[_DRIFT, _DRIFT] = _DRIFT_KEPT
        mean = forecast @ self._mean
        covariance = forecast @ self._covariance @ forecast.T + np.diag(self._wander(rates))
        surprise = entropy - mean[_ENTROPY]
        variance = covariance[_ENTROPY, _ENTROPY] + self._noise
        gain = covariance[:, _ENTROPY] / variance
        self._mean = mean + gain * surprise
        self._covariance = covariance - np.outer(gain, covariance[_ENTROPY])
        unexplained = self._noise / variance * min(surprise**2, 9 * variance)
        self._noise = float(_FORGETTING * self._noise + (1 - _FORGETTING) * unexplained)
        self._learn_unit(_KNOWN)
        if not self.engaged:
            self._fall = 0.8 * self._fall + 0.2 * max(before - self.entropy, 0.0) / updates

    def aim(self, natural: float, target: float, slope: float, rate: float, momentum: float) -> float | None:
        """
        Return the flow that the push of this step should have, per token; None where entropy is still far above its
        target, and as long as nothing was measured.

        Args:
            natural (`float`): predicted flow of the rewards, per token.
            target (`float`): entropy to hold, in nats.
            slope (`float`): change of the target to the next step.
            rate (`float`): learning rate of the coming update.
            momentum (`float`): decay of the optimizer's first moment.
        """
        if rate <= 0 or self._noise == 0:
            return None
        momentum = max(momentum, _LEAST_MOMENTUM)
        last = natural if self._smooth_natural is None else self._smooth_natural
        self._smooth_natural = _SMOOTHING * last + (1 - _SMOOTHING) * natural
        relative_rate = self._relative(rate)
        wanted = self._wanted_change(target, _CLOSING * math.sqrt(relative_rate))
        if wanted is None:
            return None
        self._learn_unit(1.0)
        if self._unit == 0 or 0 < self._guessed_at < rate:  # a warm-up's first rates say little
            if natural == 0:
                return None
            self._guess_gain(abs(natural), rate)
        natural_gain, push_gain = rate * self._gains()[0], rate * self._trusted_push_gain()
        drift = relative_rate * float(self._mean[_DRIFT])
        missing, moved_by_unit = wanted + _AHEAD * (slope - drift), 0.0
        expected, pushed, weight = self._natural, self._pushed, self._weight
        for ahead in range(1, _AHEAD + 1):
            expected = momentum * expected + (1 - momentum) * self._smooth_natural
            pushed, weight = momentum * pushed, momentum * weight + 1 - momentum
            missing -= (natural_gain * expected + push_gain * pushed) / weight
            moved_by_unit += push_gain * (1 - momentum**ahead) / weight
        return missing / moved_by_unit

    def record_update(self, natural: float, pushed: float, rate: float, momentum: float) -> None:
        """Take in the flows of an update that is about to be made, per token: the rewards' own and the push's."""
        momentum = max(momentum, _LEAST_MOMENTUM)
        self._natural = momentum * self._natural + (1 - momentum) * natural
        self._pushed = momentum * self._pushed + (1 - momentum) * pushed
        self._weight = momentum * self._weight + 1 - momentum
        u_natural, u_pushed, rates = self._moved
        scale = rate / self._weight
        self._updates += 1
        rates += self._relative(rate)
        self._moved = u_natural + scale * self._natural, u_pushed + scale * self._pushed, rates

    def _relative(self, rate: float) -> float:
        """Take in a learning rate, and return it in units of the largest one so far."""
        self._peak_rate = max(self._peak_rate, rate)
        return rate / self._peak_rate if rate else 0.0

    def _wanted_change(self, target: float, closing: float) -> float | None:
        """Return the change of entropy that the next `_AHEAD` steps should make, for a target that stands still; None:
        any. `closing` is the part of the distance that a step closes, once landed."""
        missing = target - self._expected_entropy()
        self._landed |= missing >= -0.5 * self._deviation(_ENTROPY)
        if self._landed:
            self.engaged = True
            return (1 - (1 - closing) ** _AHEAD) * missing
        fall = max(self._fall, 1e-4 * target)
        braking = min(_BRAKING[0], max(_BRAKING[1], self._measured - 1))
        if -missing > fall * braking * (2.0 if self.engaged else 0.5):
            return None  # far away: let it fall
        self.engaged = True
        return -_AHEAD * min(fall, math.sqrt(2 * fall * -missing / braking))

    def _expected_entropy(self) -> float:
        """Return the estimate, moved by the updates that were made since the last measurement."""
        natural, pushed, rates = self._moved
        natural_gain, push_gain = self._gains()
        return self.entropy + natural_gain * natural + push_gain * pushed + rates * float(self._mean[_DRIFT])

    def _learn_unit(self, deviation: float) -> None:
        """Take the natural gain for known, if its standard deviation is a smaller part of it than given."""
        if (self._unit == 0 or self._guessed_at) and 0 < self._deviation(_GAIN) < deviation * self._mean[_GAIN]:
            if self._unit == 0:
                self._mean[_MORE] = _MORE_MEAN * self._mean[_GAIN]
            self._unit, self._guessed_at = float(self._mean[_GAIN]), 0.0

    def _gains(self) -> tuple[float, float]:
        natural, more = float(self._mean[_GAIN]), float(self._mean[_MORE])
        return max(natural, 0.0), min(max(natural + more, _LEAST_GAIN * self._unit), _MOST_GAIN * self._unit)

    def _trusted_push_gain(self) -> float:
        """Return the push's gain, but no more than a first guess from the natural one, its deviation added, as long as
        it is not known: taken for too high, it leads to weak pushes, which teach nothing."""
        natural, push = self._gains()
        both = self._covariance[_GAIN:_DRIFT, _GAIN:_DRIFT].sum()  # variance of the two parts of the push's gain
        if both < (_KNOWN * push) ** 2:
            return push
        guess = (1 + _MORE_MEAN) * (natural + self._deviation(_GAIN))
        return min(push, max(guess, _LEAST_GAIN * self._unit))

    def _deviation(self, place: int) -> float:
        return math.sqrt(max(self._covariance[place, place], 0.0))

    def _wander(self, rates: float) -> list[float]:
        """Return the variance that a step adds to each part of the state."""
        natural = max(self._unit, abs(self._mean[_GAIN]))
        pushed = 0.0
        if self._covariance[_MORE, _MORE] > 0:
            pushed = max(natural, abs(self._mean[_GAIN] + self._mean[_MORE]))
        entropy, drift = _WANDER_ENTROPY * self._noise * rates**2, _WANDER_DRIFT * self._noise
        return [entropy, (_WANDER_GAIN * natural) ** 2, (_WANDER_GAIN * pushed) ** 2, drift]

    def _widen(self, entropy: float, natural: float, pushed: float) -> None:
        """Give a gain its first uncertainty, when a flow has moved entropy for the first time."""
        if self._covariance[_GAIN, _GAIN] == 0 and natural:
            self._covariance[_GAIN, _GAIN] = (_FIRST_STEP * entropy / natural) ** 2
        if self._covariance[_MORE, _MORE] == 0 and pushed and self._unit:
            self._covariance[_MORE, _MORE] = (_MORE_DEVIATION * self._unit) ** 2

    def _guess_gain(self, natural: float, rate: float) -> None:
        """Guess the gains of a run that is at its target before it has shown what moves it."""
        self._unit, self._guessed_at = _GUESS * max(self.entropy, 1e-6) / (rate * natural), rate
        self._mean[_GAIN], self._mean[_MORE] = self._unit, _MORE_MEAN * self._unit
        for place in (_GAIN, _MORE):
            self._covariance[place, :] = self._covariance[:, place] = 0.0
        self._covariance[_GAIN, _GAIN] = self._unit**2
        self._covariance[_MORE, _MORE] = (_MORE_DEVIATION * self._unit) ** 2

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON; floats survive it bit for bit."""
        state = {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}
        return {**state, "_mean": self._mean.tolist(), "_covariance": self._covariance.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in vars(self):
            setattr(self, name, state[name])
        self._mean, self._covariance = np.array(state["_mean"]), np.array(state["_covariance"])
        self._moved = tuple(state["_moved"])
