"""A Gaussian process over hyperparameters and the length of the run.

The kernel is Matérn 5/2 over the coordinates, times an exponential kernel over the length in
octaves, plus a trend that is linear in the length and smoother over the coordinates: shorter runs
are worse, more so where training gets on, and resemble the full run less the shorter they are.
Length scales are given, as a few dozen runs cannot fit one for each coordinate; a common factor
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
"""Variances of the noise that are tried, relative to that of the losses."""
SCALES = (0.7, 1.0, 1.6)
"""Factors of the length scales that are tried."""
OCTAVE = 0.12
"""How fast the correlation falls with the length: exp(-0.12) an octave."""
TREND_SCALE = 3.0
"""Length scales of the trend, relative to the others."""
JITTER = 1e-9


class Warp:
    """Compresses losses above the median, so that failures do not flatten the rest.

    `log(1 + (loss - smallest) / scale)`, with half the distance from the smallest to the median as
    the scale. A loss that is not finite counts as the worst of the others, and half a standard
    deviation more.

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
        """The warped losses."""
        warped = np.log1p(np.maximum(losses - self.low, 0.0) / self.scale)
        known = warped[np.isfinite(warped)]
        worst = known.max() + 0.5 * known.std() if len(known) else 0.0
        return np.where(np.isfinite(warped), warped, worst)

    def slope(self, loss: float) -> float:
        """Units of the loss for one of the warped loss, at a loss."""
        return max(loss - self.low, 0.0) + self.scale


class GaussianProcess:
    """The process, conditioned on runs.

    Args:
        x: Coordinates of the runs, shape (n, d).
        lengths: Lengths of the runs in octaves below a full run, shape (n,).
        losses: Their losses, shape (n,), less being better; nan for a run that failed.
        length_scales: Of the coordinates, shape (d,).

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
        """The process with more runs, whose losses are what it expects of them."""
        if len(x) == 0:
            return self
        cross = self._kernel(x, lengths, self.x, self.lengths)
        z = np.append(self._z, cross @ self._weights)
        grown = copy.copy(self)
        grown.x, grown.lengths = np.vstack([self.x, x]), np.append(self.lengths, lengths)
        grown._condition(z)
        return grown

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the warped loss of full runs, without noise.

        Args:
            x: Coordinates, shape (m, d).
        """
        mean, explained = self._explained(x)
        variance = 1.0 - (explained**2).sum(0)
        return mean, np.sqrt(np.maximum(variance, 1e-12)) * self.deviation

    def difference(self, worse: Array, better: Array) -> tuple[float, float]:
        """Mean and standard deviation of by how much the loss at one place exceeds another's.

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
    """Matérn 5/2, of a distance in length scales times the root of 5."""
    return (1 + distance + distance**2 / 3) * np.exp(-distance)
