"""Detects spikes of the loss, of the gradient norm, and of the gradient norm of each tensor.

Imports neither torch nor lightning.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 128
"""Number of earlier values to compare with, as in OLMo-core's `SkipStepOptimizer`."""
MIN_VALUES = WINDOW // 2
"""Number of earlier values that a comparison needs."""
DEVIATIONS = 6.0
"""Standard deviations above the mean that make a spike, as in OLMo-core's `SkipStepOptimizer`."""
MAX_STREAK = 16
"""Number of consecutive spikes after which they count as the new level."""
ALPHA = 0.97
"""Decay of a tensor's moving averages (ZClip, arXiv 2504.02507)."""
TENSOR_WARMUP = 25
"""Number of earlier values that a comparison with the averages needs (ZClip, arXiv 2504.02507)."""


class SpikeWindow:
    """Compares a value with the 128 before it.

    Spikes do not enter the window, so that the second step of a spike is compared with the steps
    before the spike. After 16 consecutive spikes, the window starts anew at the new level.

    References:
        `SkipStepOptimizer` of allenai/OLMo-core: 6 standard deviations over 128 steps.

    Example:
        >>> window = SpikeWindow()
        >>> deviations = [window.add(1.0 + step % 3) for step in range(100)]
        >>> max(deviations[MIN_VALUES:]) < 2, window.add(9.0) > 6, window.streak
        (True, True, 1)
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.streak = 0
        """The number of consecutive spikes up to the last value."""

    def add(self, value: float) -> float:
        """Adds a value, and returns how many standard deviations it is above the mean.

        Returns NaN if there are fewer than 64 earlier values, or if the value is not finite.
        """
        if not math.isfinite(value):
            return math.nan
        deviation = self._deviation(value)
        self.streak = self.streak + 1 if deviation > DEVIATIONS else 0
        if self.streak > MAX_STREAK:
            self._values.clear()
            self.streak = 0
        if not self.streak:
            self._values.append(value)
        return deviation

    def _deviation(self, value: float) -> float:
        number = len(self._values)
        if number < MIN_VALUES:
            return math.nan
        mean = math.fsum(self._values) / number
        squares = math.fsum((each - mean) ** 2 for each in self._values)
        deviation = math.sqrt(squares / (number - 1))
        # A floor, as nearly equal values differ only by rounding.
        return (value - mean) / max(deviation, 1e-6 * abs(mean), 1e-300)

    def state(self) -> list[Any]:
        """Returns the state to store in a checkpoint."""
        return [list(self._values), self.streak]

    def restore(self, state: Iterable[Any]) -> None:
        """Restores the state from a checkpoint."""
        values, self.streak = state
        self._values = deque(values, maxlen=WINDOW)


class TensorSpikes:
    """Compares the gradient norm of each tensor with its own moving average.

    References:
        z-scores on moving averages: ZClip, arXiv 2504.02507; for each tensor: AdaGC, arXiv
        2502.11034.

    Example:
        >>> spikes = TensorSpikes()
        >>> for step in range(100):
        ...     spikes.add({"weight": 1.0 + 0.1 * (step % 3), "bias": 1.0})
        >>> spikes.add({"weight": 9.0, "bias": 1.0})
        >>> spikes.scores["weight"] > 6, spikes.times_largest["weight"] > 2
        (True, True)
    """

    def __init__(self) -> None:
        self._averages: dict[str, list[float]] = {}
        """By tensor: mean, variance, maximum and number of values."""
        self.scores: dict[str, float] = {}
        """By tensor: standard deviations above the mean, after 25 values."""
        self.times_largest: dict[str, float] = {}
        """By tensor: the value as a multiple of the earlier maximum, after 25 values."""

    def add(self, values: Mapping[str, float]) -> None:
        """Adds a value of each tensor; ignores values that are 0 or not finite."""
        names = [name for name, value in values.items() if 0 < value < math.inf]
        known = [self._averages.get(name, (math.nan, 0.0, 0.0, 0.0)) for name in names]
        rows = np.array(known, dtype=np.float64).reshape(-1, 4)
        value = np.array([values[name] for name in names], dtype=np.float64)
        is_new = np.isnan(rows[:, 0])
        mean, variance, largest, number = np.where(is_new, [value, 0 * value] * 2, rows.T)
        with np.errstate(all="ignore"):
            deviation = np.sqrt(variance)
            scores = (value - mean) / np.maximum(deviation, 1e-3 * mean)
            times_largest = value / largest
        is_known = number >= TENSOR_WARMUP
        self.scores = _select(names, scores, is_known)
        self.times_largest = _select(names, times_largest, is_known)
        # As in ZClip, a spike enters the averages clipped.
        clipped = np.where(is_known, np.minimum(value, mean + DEVIATIONS * deviation), value)
        mean_now = ALPHA * mean + (1 - ALPHA) * clipped
        variance = ALPHA * variance + (1 - ALPHA) * (clipped - mean_now) ** 2
        # The first gradients are not representative of later ones.
        largest = np.where(number > 1, np.maximum(largest, value), value)
        rows = np.stack([mean_now, variance, largest, number + 1], 1)
        self._averages.update(zip(names, rows.tolist(), strict=True))

    def state(self) -> dict[str, list[float]]:
        """Returns the state to store in a checkpoint."""
        return {name: list(values) for name, values in self._averages.items()}

    def restore(self, state: Mapping[str, Iterable[float]]) -> None:
        """Restores the state from a checkpoint."""
        self._averages = {name: list(values) for name, values in state.items()}


def _select(
    names: Iterable[str], values: npt.NDArray[np.float64], is_chosen: npt.NDArray[np.bool_]
) -> dict[str, float]:
    pairs = zip(names, values.tolist(), is_chosen.tolist(), strict=True)
    return {name: value for name, value, chosen in pairs if chosen}
