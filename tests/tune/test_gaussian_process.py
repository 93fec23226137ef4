"""The Gaussian process, compared with scikit-learn's and with textbook formulas."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
from sklearn.gaussian_process.kernels import Matern  # type: ignore[import-untyped]

from lightning_adam.tune.gaussian_process import (
    JITTER,
    NOISES,
    OCTAVE,
    SCALES,
    TREND_SCALE,
    Array,
    GaussianProcess,
    Warp,
)

LENGTH_SCALES = np.array([0.6, 1.5, 0.25])
RNG = np.random.default_rng(0)
X, QUERIES = RNG.normal(size=(14, 3)), RNG.normal(size=(6, 3))
LOSSES = (X**2).sum(1) + 0.3 * RNG.normal(size=14)
OCTAVES = RNG.choice([0.0, np.log2(3), 3.0], size=14)


def reference(scale: float, noise: float) -> GaussianProcessRegressor:
    kernel = Matern(length_scale=LENGTH_SCALES * scale, nu=2.5)
    return GaussianProcessRegressor(kernel, alpha=noise + JITTER, optimizer=None)


def standardized(process: GaussianProcess) -> Array:
    return np.asarray((process.warp(LOSSES) - process.center) / process.deviation)


def kernel(a: Array, octaves_a: Array, b: Array, octaves_b: Array, scale: float) -> Array:
    matern = Matern(LENGTH_SCALES * scale, nu=2.5)(a, b)
    trend = Matern(LENGTH_SCALES * scale * TREND_SCALE, nu=2.5)(a, b)
    apart = np.abs(octaves_a[:, None] - octaves_b[None])
    return np.asarray(matern * np.exp(-OCTAVE * apart) + trend * np.outer(octaves_a, octaves_b))


def test_full_runs_are_predicted_as_by_scikit_learn() -> None:
    process = GaussianProcess(X, np.zeros(14), LOSSES, LENGTH_SCALES)
    z = standardized(process)
    fits = {
        (scale, noise): reference(scale, noise).fit(X, z) for scale in SCALES for noise in NOISES
    }
    best = max(fits, key=lambda each: fits[each].log_marginal_likelihood_value_)
    assert process.noise == best[1]
    mean, deviation = fits[best].predict(QUERIES, return_std=True)
    found = process.predict(QUERIES)
    assert found[0] == pytest.approx(mean * process.deviation + process.center)
    assert found[1] == pytest.approx(deviation * process.deviation)
    _, covariance = fits[best].predict(QUERIES[:2], return_cov=True)
    gain, error = process.difference(QUERIES[0], QUERIES[1])
    assert gain == pytest.approx((mean[0] - mean[1]) * process.deviation)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert error == pytest.approx(np.sqrt(variance) * process.deviation)


def test_short_runs_match_the_closed_form() -> None:
    process = GaussianProcess(X, OCTAVES, LOSSES, LENGTH_SCALES)
    z = standardized(process)
    found = {}
    for scale in SCALES:
        for noise in NOISES:
            matrix = kernel(X, OCTAVES, X, OCTAVES, scale) + (noise + JITTER) * np.eye(14)
            inverse = np.linalg.inv(matrix)
            likelihood = -0.5 * z @ inverse @ z - 0.5 * np.linalg.slogdet(matrix)[1]
            cross = kernel(QUERIES, np.zeros(6), X, OCTAVES, scale)
            variance = 1 - np.einsum("ij,jk,ik->i", cross, inverse, cross)
            found[likelihood] = noise, cross @ inverse @ z, np.sqrt(variance)
    noise, mean, deviation = found[max(found)]
    assert process.noise == noise
    predicted = process.predict(QUERIES)
    assert predicted[0] == pytest.approx(mean * process.deviation + process.center)
    assert predicted[1] == pytest.approx(deviation * process.deviation)


def test_running_run_keeps_the_mean_and_lowers_the_uncertainty() -> None:
    process = GaussianProcess(X, OCTAVES, LOSSES, LENGTH_SCALES)
    grown = process.with_expected(QUERIES[:2], np.zeros(2))
    before, after = process.predict(QUERIES), grown.predict(QUERIES)
    assert after[0] == pytest.approx(before[0])
    assert (after[1][:2] < 0.9 * before[1][:2]).all()
    assert (after[1] <= before[1] + 1e-9).all()


def test_failed_and_huge_losses_do_not_hide_other_differences() -> None:
    good = np.array([1.0, 1.1, 1.2, 1.3])
    rest = Warp(good)(good)
    losses = np.append(good, [1e9, np.nan, np.inf])
    warped = Warp(losses)(losses)
    assert (np.diff(warped[:5]) > 0).all()
    assert warped[5] == warped[6] > warped[4]
    # A Gaussian process depends on differences relative to the whole range.
    share = (warped[3] - warped[0]) / (warped[4] - warped[0])
    assert share > 1e-2 * (rest[3] - rest[0])
    assert Warp(np.array([np.nan, np.nan]))(np.array([np.nan])).tolist() == [0.0]


def test_slope_is_the_derivative_of_the_inverse() -> None:
    warp = Warp(np.array([1.0, 2.0, 3.0, 8.0]))
    for loss in (1.5, 2.0, 7.0):
        rise = np.diff(warp(np.array([loss - 1e-6, loss + 1e-6])))[0]
        assert warp.slope(loss) == pytest.approx(2e-6 / rise, rel=1e-4)


def test_single_and_equal_runs_are_predicted() -> None:
    for count in (1, 5):
        process = GaussianProcess(
            np.zeros((count, 3)), np.zeros(count), np.ones(count), LENGTH_SCALES
        )
        mean, deviation = process.predict(QUERIES)
        assert mean == pytest.approx(np.zeros(6))
        assert np.isfinite(deviation).all()
