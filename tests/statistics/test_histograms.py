"""Counts by binary exponent: folding, percentiles, and the elements that eps would dominate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_adam import AdamStatistics
from lightning_adam.statistics.histograms import (
    BINS,
    EPS_SHOWN,
    PERCENTILES,
    Histogram,
    dominated_fractions,
    fold,
    percentile,
)
from tests.statistics.cases import stepped

counts = st.dictionaries(st.integers(0, BINS - 1), st.integers(1, 10**12)).map(
    lambda occupied: [occupied.get(exponent, 0) for exponent in range(BINS)]
)


@given(counts)
def test_folding_keeps_every_element_in_64_octaves(numbers: list[int]) -> None:
    shown = fold(numbers)
    assert len(shown.counts) == 64
    assert sum(shown.counts) == sum(numbers)
    assert np.diff(shown.log2_edges).tolist() == [1.0] * 64
    for edge, number in zip(shown.log2_edges[1:-2], shown.counts[1:-1], strict=False):
        assert number == numbers[int(edge) + 127]


def test_folding_keeps_the_largest_magnitudes() -> None:
    numbers = [0] * BINS
    numbers[20], numbers[24], numbers[0], numbers[255] = 3, 5, 7, 11
    shown = fold(numbers)
    assert shown.log2_edges[0] == 1 - 127, "float32 has nothing smaller"
    assert (shown.counts[0], shown.counts[19], shown.counts[23], shown.counts[-1]) == (7, 3, 5, 11)


def denominators(eps: float) -> tuple[torch.Tensor, list[int], float]:
    """Returns √v̂ of a step, its counts, and the fraction of elements that eps dominates."""
    weight = nn.Parameter(torch.randn(50_000, dtype=torch.float64))
    scale = 10 ** (-12 * torch.rand(50_000, dtype=torch.float64))
    scale[:5000] = 0
    optimizer = stepped(
        [weight], grad=lambda *_: torch.randn(50_000).double() * scale, decoupled=True, eps=eps
    )
    metric = AdamStatistics("eps_dominated_fraction", scopes=["model"])
    metric.update(optimizer, histograms=True)
    v_hat = optimizer.state[weight]["exp_avg_sq"] / (1 - 0.999**3)
    (fraction,) = metric.compute().values()
    return v_hat.sqrt(), metric.compute_exponents()["adam_histogram/denominator"], fraction


def test_eps_curve_is_exact_at_powers_of_two_and_close_between_them() -> None:
    values, numbers, _ = denominators(1e-8)
    seen = values[values > 0]
    powers = [2.0**exponent for exponent in range(-60, 2)]
    exact = [(seen < eps).double().mean().item() for eps in powers]
    assert dominated_fractions(numbers, powers) == pytest.approx(exact, abs=1e-12)
    between = [(seen < eps).double().mean().item() for eps in EPS_SHOWN]
    assert dominated_fractions(numbers) == pytest.approx(between, abs=0.02)
    assert between[10] > 0.05, "the powers of ten are not all below or above the values"


def test_eps_curve_at_the_eps_in_use_is_the_statistic() -> None:
    """Neither counts elements without gradients."""
    for eps in (2.0**-30, 2.0**-20, 2.0**-10):
        _, numbers, fraction = denominators(eps)
        assert dominated_fractions(numbers, [eps]) == pytest.approx([fraction], abs=1e-12)
        assert sum(numbers) == 45_000


def test_eps_curve_of_no_elements_is_nan() -> None:
    assert all(map(math.isnan, dominated_fractions([0] * BINS)))
    assert all(map(math.isnan, Histogram([0, 0], [0.0, 1.0, 2.0]).fractions_below([1.0, 4.0])))


@given(
    st.lists(
        st.floats(0, 2.0**126, width=32)
        | st.integers(-60, 60).map(lambda exponent: 2.0**exponent)
        | st.just(math.inf),
        min_size=1,
        max_size=200,
    )
)
def test_folded_counts_give_the_fraction_below_each_power_of_two(magnitudes: list[float]) -> None:
    shown = fold(counted(magnitudes))
    powers = [2.0**edge for edge in shown.log2_edges[1:-1]]
    exact = [sum(each < power for each in magnitudes) / len(magnitudes) for power in powers]
    assert shown.fractions_below(powers) == pytest.approx(exact)


def test_single_octave_contains_everything_smaller() -> None:
    assert Histogram([3], [-1.0, 0.0]).fractions_below([0.1, 0.5, 2.0]) == [1.0] * 3


@given(counts)
def test_eps_curve_never_falls(numbers: list[int]) -> None:
    curve = dominated_fractions(numbers)
    assert len(curve) == 21
    if sum(numbers):
        assert curve == sorted(curve)
        assert curve[0] >= 0
        assert curve[-1] <= 1


def test_histograms_are_counted_only_if_requested() -> None:
    metric = AdamStatistics()
    weight = nn.Parameter(torch.randn(5))
    metric.update(stepped([weight], decoupled=True), histograms=True)
    assert metric.compute_exponents()
    metric.update(stepped([weight], decoupled=True))
    assert metric.compute_exponents() == {}


def test_histograms_of_model_and_groups_have_separate_keys() -> None:
    groups = [
        {"params": [nn.Parameter(torch.randn(3))], "name": "body"},
        {"params": [nn.Parameter(torch.randn(5))], "name": "head"},
    ]
    metric = AdamStatistics(optimizer_name="0")
    metric.update(stepped(groups, decoupled=True), histograms=True)
    sizes = {key: sum(numbers) for key, numbers in metric.compute_exponents().items()}
    assert len(sizes) == 12
    assert sizes["adam_histogram/optimizer/0/denominator"] == 8
    assert sizes["adam_histogram/optimizer/0/group/head/normalized_update"] == 5


def counted(magnitudes: list[float]) -> list[int]:
    """Returns the counts of magnitudes by binary exponent in float32."""
    exponents = np.array(magnitudes, dtype=np.float32).view(np.uint32) >> 23
    return np.bincount(exponents, minlength=BINS).tolist()  # type: ignore[no-any-return]


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=200), st.sampled_from(PERCENTILES))
def test_percentiles_are_exact_to_the_octave(numbers: list[float], percent: int) -> None:
    found = percentile(counted(numbers), percent)
    assert found is not None
    # The smallest value that at least this number of elements do not exceed.
    place = max(math.ceil(percent / 100 * len(numbers)), 1)
    exact = sorted(numbers)[place - 1]
    octave = math.floor(math.log2(float(np.float32(exact))))
    assert 2.0**octave <= found <= 2.0 ** (octave + 1)


def test_percentiles_of_uniform_logarithms_are_interpolated() -> None:
    numbers = [2.0 ** (exponent / 100) for exponent in range(1000)]
    for percent in PERCENTILES:
        expected = 2.0 ** (10 * percent / 100)
        assert percentile(counted(numbers), percent) == pytest.approx(expected, rel=0.01)


def test_percentiles_of_zero_infinite_and_no_elements() -> None:
    assert percentile(counted([0.0, 0.0, 1.0]), 50) == 0
    assert percentile(counted([1.0, math.inf, math.nan]), 50) == math.inf
    assert percentile(counted([]), 50) is None
