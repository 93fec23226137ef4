"""Downsampling of long series and many histograms keeps extreme values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_adam.reports import downsampling
from lightning_adam.reports.downsampling import (
    BUCKETS,
    downsample_minmax,
    grid,
    octave_shares,
    pack,
)
from lightning_adam.reports.runs import Series
from lightning_adam.statistics.histograms import Histogram
from tests.reports.parsed_report import unpack
from tests.reports.run_files import series_of

FEW_EXAMPLES = settings(max_examples=40, deadline=None)
ODD = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@st.composite
def series(draw: st.DrawFn, size: st.SearchStrategy[int]) -> Series:
    length = draw(size)
    values = draw(hnp.arrays(np.float64, length, elements=ODD, fill=st.just(1.0)))
    return Series(np.cumsum(np.full(length, 3)), values)


# ---- Curves


@FEW_EXAMPLES
@given(series(st.integers(0, 120)), st.integers(1, 20))
def test_downsampled_series_keeps_extremes_and_the_first_non_finite_value(
    whole: Series, buckets: int
) -> None:
    shown = downsample_minmax(whole, buckets)
    if len(whole.steps) <= 2 * buckets:
        assert shown is whole
        return
    assert len(shown.steps) <= 3 * buckets + 2
    assert (np.diff(shown.steps) > 0).all()
    places = np.searchsorted(whole.steps, shown.steps)
    assert np.array_equal(whole.steps[places], shown.steps)
    assert np.array_equal(whole.values[places], shown.values, equal_nan=True)
    assert {whole.steps[0], whole.steps[-1]} <= set(shown.steps)
    for start, stop in zip(*_bounds(len(whole.steps), buckets), strict=True):
        part = whole.values[start:stop]
        is_kept = np.isin(np.arange(start, stop), places)
        finite = np.isfinite(part)
        if finite.any():
            kept = part[is_kept & finite]
            assert kept.min() == part[finite].min()
            assert kept.max() == part[finite].max()
        if not finite.all():
            assert is_kept[np.argmin(finite)], "the first that is not finite"


def _bounds(length: int, parts: int) -> tuple[list[int], list[int]]:
    """Returns the bounds of parts with lengths that differ by at most one."""
    bounds = [length * part // parts for part in range(parts + 1)]
    return bounds[:-1], bounds[1:]


def test_long_series_is_downsampled_and_keeps_its_spikes() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(100_003)
    values[[17, 50_000, 99_999]] = [1e6, -1e6, math.nan]
    shown = downsample_minmax(Series(np.arange(100_003), values))
    assert len(shown.steps) <= 2 * BUCKETS + 3
    assert {0, 17, 50_000, 99_999, 100_002} <= set(shown.steps)
    short = series_of(dict.fromkeys(range(2 * BUCKETS), 1.0))
    assert downsample_minmax(short) is short


# ---- Maps


ROWS = st.lists(
    st.dictionaries(st.integers(0, 60), ODD, min_size=1, max_size=30), min_size=1, max_size=4
)


@FEW_EXAMPLES
@given(ROWS, st.integers(1, 25))
def test_column_of_a_map_shows_the_largest_magnitude_of_its_steps(
    rows: list[dict[int, float]], columns: int
) -> None:
    steps = sorted({step for row in rows for step in row})
    starts, shown = grid([series_of(row) for row in rows], columns)
    assert shown.shape == (len(rows), len(starts))
    assert len(starts) == min(columns, len(steps))
    parts = _parts(steps, starts.tolist())
    for row, values in zip(rows, shown, strict=True):
        for part, value in zip(parts, values.tolist(), strict=True):
            there = [row[step] for step in part if not math.isnan(row.get(step, math.nan))]
            if there:
                assert value in there
                assert abs(value) == max(map(abs, there))
            else:
                assert math.isnan(value)


def _parts(steps: list[int], starts: list[int]) -> list[list[int]]:
    """Returns the steps of each column; their numbers differ by at most one."""
    assert starts[0] == steps[0]
    ends = [*starts[1:], math.inf]
    parts = [
        [step for step in steps if start <= step < end]
        for start, end in zip(starts, ends, strict=True)
    ]
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
    return parts


@st.composite
def histograms(draw: st.DrawFn) -> dict[int, Histogram]:
    """Returns histograms with shifting windows."""
    found = {}
    for step in draw(st.sets(st.integers(0, 100), min_size=1, max_size=12)):
        counts = draw(st.lists(st.sampled_from([0, 0, 1, 3, 10**9]), min_size=1, max_size=6))
        lowest = draw(st.integers(-8, 8))
        found[step] = Histogram(counts, [float(lowest + at) for at in range(len(counts) + 1)])
    return found


@FEW_EXAMPLES
@given(histograms(), st.integers(1, 15))
def test_octaves_are_fractions_of_the_counts(by_step: dict[int, Histogram], columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downsampling, "COLUMNS", columns)
        starts, lowest, shares = octave_shares(by_step)
    assert len(starts) == min(columns, len(by_step))
    assert shares.shape[1] == len(starts)
    counted = 0
    for part, column in zip(_parts(sorted(by_step), starts.tolist()), shares.T, strict=True):
        direct: dict[int, int] = {}
        for step in part:
            counts, edges = by_step[step]
            for edge, count in zip(edges, counts, strict=False):
                direct[int(edge)] = direct.get(int(edge), 0) + count
        elements = sum(direct.values())
        counted += elements
        if not elements:
            assert np.isnan(column).all()
            continue
        assert column.sum() == pytest.approx(1)
        there = {lowest + at: share for at, share in enumerate(column.tolist()) if share}
        expected = {edge: count / elements for edge, count in direct.items() if count}
        assert there == pytest.approx(expected)
    if counted:
        occupied = [bool(row.any()) for row in np.nan_to_num(shares)]
        assert occupied[0], "no empty octaves below"
        assert occupied[-1], "no empty octaves above"


# ---- Bytes


@FEW_EXAMPLES
@given(st.lists(ODD, max_size=20))
def test_packed_values_are_exact_or_rounded_to_float32(values: list[float]) -> None:
    array = np.array(values)
    parts = pack(array)
    found = unpack(parts)
    assert found.dtype.name == parts["type"]
    if parts["type"] == "float64":
        assert np.array_equal(found, array, equal_nan=True)
    else:
        # 0 stays 0, and nothing overflows or loses digits as a subnormal number.
        np.testing.assert_allclose(found, array, rtol=2**-24, atol=0)


@FEW_EXAMPLES
@given(st.lists(st.integers(-(2**53), 2**53) | st.integers(0, 2**32 - 1), max_size=20))
def test_packed_steps_are_exact(steps: list[int]) -> None:
    parts = pack(np.array(steps, dtype=np.int64))
    assert unpack(parts).tolist() == steps
    assert (parts["type"] == "uint32") is all(0 <= step < 2**32 for step in steps)
