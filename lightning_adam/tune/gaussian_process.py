"""A Gaussian process over hyperparameters and the length of the run.

The kernel is Matérn 5/2 over the coordinates, times an exponential kernel over the length in
octaves, plus a trend that is linear in the length and smoother over the coordinates. So shorter
runs are worse, by an amount that depends on the coordinates, and correlate less with the full run.
The length scales are fixed, because a few dozen runs cannot fit one per coordinate. A common factor
and the noise are fitted by maximum likelihood.
"""

import copy
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

Array = NDArray[np.float64]

NOISES = (0.003, 0.02, 0.08, 0.3, 1.0)
"""Candidates for the variance of the noise, relative to that of the losses."""
SCALES = (0.7, 1.0, 1.6)
"""Candidates for the factor of the length scales."""
OCTAVE = 0.12
"""Decay of the correlation with the length: exp(-0.12) per octave."""
TREND_SCALE = 3.0
"""Length scales of the trend, relative to the others."""
JITTER = 1e-9


class Warp:
    """Compresses large losses, so that failures do not hide the differences between the others.

    It is `log(1 + (loss - smallest) / scale)`, where the scale is half the distance from the
    smallest to the median. A loss that is not finite becomes the largest of the others plus half a
    standard deviation.

    Args:
        losses: All losses, shape (n,); some finite.

    Example:
        >>> Warp(np.array([1.0, 2.0, 3.0, 1e6, np.nan]))(np.array([1.0, 1.5])).round(2).tolist()
        [0.0, 0.51]
    """

    def __init__(self, losses: Array) -> None:
        finite = losses[np.isfinite(losses)]
        self.low = float(finite.min()) if len(finite) else 0.0
        distance = float(np.median(finite)) - self.low if len(finite) else 0.0
        self.scale = distance / 2 or 1.0

    def __call__(self, losses: Array) -> Array:
        """Returns the warped losses."""
        warped = np.log1p(np.maximum(losses - self.low, 0.0) / self.scale)
        known = warped[np.isfinite(warped)]
        worst = known.max() + 0.5 * known.std() if len(known) else 0.0
        return np.where(np.isfinite(warped), warped, worst)

    def slope(self, loss: float) -> float:
        """Returns the derivative of the loss with respect to the warped loss."""
        return max(loss - self.low, 0.0) + self.scale


class GaussianProcess:
    """A Gaussian process conditioned on runs.

    Args:
        x: Coordinates of the runs, shape (n, d).
        lengths: Lengths of the runs in octaves below a full run, shape (n,).
        losses: Losses of the runs, shape (n,), lower is better; nan or inf for a failed run.
        length_scales: Length scales of the coordinates, shape (d,).

    Example:
        >>> x = np.array([[-4.0], [-3.0], [-2.0], [-1.0]])
        >>> process = GaussianProcess(x, np.zeros(4), (x[:, 0] + 2) ** 2, np.ones(1))
        >>> mean, deviation = process.predict(np.array([[-2.0], [2.0]]))
        >>> bool(mean[0] < mean[1]), bool(deviation[0] < deviation[1])
        (True, True)
    """

    def __init__(self, x: Array, lengths: Array, losses: Array, length_scales: Array) -> None:
        self.x, self.lengths = x, lengths
        self.warp = Warp(losses)
        warped = self.warp(losses)
        self.center, self.deviation = warped.mean(), warped.std() or 1.0
        z = (warped - self.center) / self.deviation
        fits = []
        for scale, self.noise in itertools.product(SCALES, NOISES):
            self._scales = length_scales * scale
            fits.append((self._condition(z), self.noise, scale))
        _, self.noise, scale = max(fits)
        self._scales = length_scales * scale
        self._condition(z)

    def _condition(self, z: Array) -> float:
        """Conditions the process on standardized losses, and returns their log likelihood."""
        kernel = self._kernel(self.x, self.lengths, self.x, self.lengths)
        self._z = z
        self._lower = cholesky(kernel + (self.noise + JITTER) * np.eye(len(z)), lower=True)
        self._weights = cho_solve((self._lower, True), z)
        return float(-0.5 * z @ self._weights - np.log(np.diag(self._lower)).sum())

    def with_expected(self, x: Array, lengths: Array) -> "GaussianProcess":
        """Returns the process with more runs, whose losses are its own expectations."""
        if len(x) == 0:
            return self
        cross = self._kernel(x, lengths, self.x, self.lengths)
        z = np.append(self._z, cross @ self._weights)
        grown = copy.copy(self)
        grown.x, grown.lengths = np.vstack([self.x, x]), np.append(self.lengths, lengths)
        grown._condition(z)
        return grown

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Returns the mean and standard deviation of the warped loss of full runs, without noise.

        Args:
            x: Coordinates, shape (m, d).
        """
        mean, explained = self._explained(x)
        variance = 1.0 - (explained**2).sum(0)
        return mean, np.sqrt(np.maximum(variance, 1e-12)) * self.deviation

    def difference(self, worse: Array, better: Array) -> tuple[float, float]:
        """Returns the mean and standard deviation of the difference in warped loss.

        Args:
            worse: Coordinates, shape (d,).
            better: Coordinates, shape (d,).
        """
        x = np.stack([worse, better])
        mean, explained = self._explained(x)
        covariance = self._kernel(x, np.zeros(2), x, np.zeros(2)) - explained.T @ explained
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        return float(mean[0] - mean[1]), float(np.sqrt(max(variance, 1e-12))) * self.deviation

    def _explained(self, x: Array) -> tuple[Array, Array]:
        cross = self._kernel(x, np.zeros(len(x)), self.x, self.lengths)
        mean = cross @ self._weights * self.deviation + self.center
        return mean, solve_triangular(self._lower, cross.T, lower=True)

    def _kernel(self, a: Array, lengths_a: Array, b: Array, lengths_b: Array) -> Any:
        distance = np.sqrt(5 * (((a[:, None] - b[None]) / self._scales) ** 2).sum(-1))
        apart = np.abs(lengths_a[:, None] - lengths_b[None])
        trend = np.outer(lengths_a, lengths_b) * _matern(distance / TREND_SCALE)
        return _matern(distance) * np.exp(-OCTAVE * apart) + trend


def _matern(distance: Array) -> Array:
    """Returns the Matérn 5/2 kernel of sqrt(5) times the distance in length scales."""
    return (1 + distance + distance**2 / 3) * np.exp(-distance)
