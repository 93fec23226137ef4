"""Reduction of long series and many histograms: nothing that stands out is lost."""

import base64
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lightning_adam.reports import reduction
from lightning_adam.reports.reduction import (
    STRETCHES,
    below_edges,
    gridded,
    is_logarithmic,
    octaves,
    packed,
    thinned,
)
from lightning_adam.reports.runs import Series
from lightning_adam.statistics.histograms import (
    BINS,
    Histogram,
    dominated_fractions,
    fold,
)
from tests.reports.run_files import series_of
from tests.support.tables import each_row

FEW_EXAMPLES = settings(max_examples=40, deadline=None)
Floats = NDArray[np.float64]
ODD = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@st.composite
def series(draw: st.DrawFn, size: st.SearchStrategy[int]) -> Series:
    length = draw(size)
    values = draw(hnp.arrays(np.float64, length, elements=ODD, fill=st.just(1.0)))
    return Series(np.cumsum(np.full(length, 3)), values)


# ---- Curves


@FEW_EXAMPLES
@given(series(st.integers(0, 120)), st.integers(1, 20))
def test_thinned_series_keeps_extremes_and_the_first_non_finite_value(
    whole: Series, stretches: int
) -> None:
    shown = thinned(whole, stretches)
    if len(whole.steps) <= 2 * stretches:
        assert shown is whole
        return
    assert len(shown.steps) <= 3 * stretches + 2
    assert (np.diff(shown.steps) > 0).all()
    places = np.searchsorted(whole.steps, shown.steps)
    assert np.array_equal(whole.steps[places], shown.steps)
    assert np.array_equal(whole.values[places], shown.values, equal_nan=True)
    assert {whole.steps[0], whole.steps[-1]} <= set(shown.steps)
    for start, stop in zip(*_bounds(len(whole.steps), stretches), strict=True):
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
    """Where parts of a length, which differ by one at most, begin and end."""
    bounds = [length * part // parts for part in range(parts + 1)]
    return bounds[:-1], bounds[1:]


def test_long_series_is_thinned_and_keeps_its_spikes() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(100_003)
    values[[17, 50_000, 99_999]] = [1e6, -1e6, math.nan]
    shown = thinned(Series(np.arange(100_003), values))
    assert len(shown.steps) <= 2 * STRETCHES + 3
    assert {0, 17, 50_000, 99_999, 100_002} <= set(shown.steps)
    short = series_of(dict.fromkeys(range(2 * STRETCHES), 1.0))
    assert thinned(short) is short


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
    starts, shown = gridded([series_of(row) for row in rows], columns)
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
    """The steps of each column; no column has two more than another."""
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
    """Of windows that shift."""
    found = {}
    for step in draw(st.sets(st.integers(0, 100), min_size=1, max_size=12)):
        counts = draw(st.lists(st.sampled_from([0, 0, 1, 3, 10**9]), min_size=1, max_size=6))
        lowest = draw(st.integers(-8, 8))
        found[step] = Histogram(counts, [float(lowest + at) for at in range(len(counts) + 1)])
    return found


@FEW_EXAMPLES
@given(histograms(), st.integers(1, 15))
def test_octaves_are_shares_of_the_counts(by_step: dict[int, Histogram], columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "COLUMNS", columns)
        starts, lowest, shares = octaves(by_step)
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


# ---- The share below each eps


@FEW_EXAMPLES
@given(
    hnp.arrays(
        np.float64,
        st.integers(1, 200),
        elements=st.floats(0, 1e38) | st.floats(-60, 60).map(np.exp2) | st.just(math.inf),
    )
)
def test_share_below_an_edge_matches_the_elements(magnitudes: Floats) -> None:
    at, shares = below_edges(fold(_counted(magnitudes)))
    assert len(at) == len(shares) == 63
    assert np.array_equal(np.log2(at) % 1, np.zeros(63))
    assert shares == pytest.approx([(magnitudes < edge).mean() for edge in at])
    assert shares == pytest.approx(dominated_fractions(_counted(magnitudes), at.tolist()))


def _counted(magnitudes: Floats) -> list[int]:
    """Counts by the binary exponent of float32, as `histograms.BINS` describes them."""
    exponents = np.frexp(magnitudes)[1] - 1 + 127
    exponents[(magnitudes == 0) | (exponents < 0)] = 0
    exponents[~np.isfinite(magnitudes)] = 255
    return [int(count) for count in np.bincount(exponents, minlength=BINS)]


def test_share_of_no_elements_is_nan() -> None:
    at, shares = below_edges(Histogram([0, 0, 0], [0.0, 1.0, 2.0, 3.0]))
    assert at.tolist() == [2, 4]
    assert np.isnan(shares).all()


# ---- Scales

SPAN = np.array([1.0, 1000.0])
IS_LOGARITHMIC: list[tuple[str, list[Floats], bool]] = [
    ("", [SPAN], True),
    ("gradient", [SPAN], True),
    ("fraction", [SPAN], False),
    ("", [np.array([1.0]), np.array([101.0])], True),
    ("", [np.array([1.0, 100.0])], False),
    ("", [SPAN, np.array([-1e-9])], False),
    ("", [np.append(np.tile(SPAN, 10), [-1e-9])], False),
    ("", [np.append(np.tile(SPAN, 10), [0.0, 0.0])], True),
    ("", [np.append(np.tile(SPAN, 10), [0.0] * 3)], False),
    ("", [np.array([math.nan, math.inf, -math.inf, 1.0, 1000.0])], True),
    ("", [np.zeros(3)], False),
    ("", [np.array([])], False),
]
"""Units, values of several series, and whether their axis is logarithmic."""


def test_axis_is_logarithmic_where_positive_values_span_decades() -> None:
    with each_row() as row:
        for unit, values, expected in IS_LOGARITHMIC:
            with row((unit, values)):
                assert is_logarithmic(unit, values) is expected


@FEW_EXAMPLES
@given(st.lists(st.floats(1e-3, 1e3), min_size=1), st.integers(-20, 20), st.randoms())
def test_scale_and_order_of_values_do_not_change_the_axis(
    values: list[float], exponent: int, random: Any
) -> None:
    expected = max(values) > 100 * min(values)
    assert is_logarithmic("", [np.array(values)]) is expected
    random.shuffle(values)
    assert is_logarithmic("", [np.array([each]) * 2.0**exponent for each in values]) is expected


# ---- Bytes


@FEW_EXAMPLES
@given(
    st.sampled_from(["<f8", ">f8", "<f4", ">f4", "<i8"]),
    st.lists(st.integers(-(2**53), 2**53) | st.floats(width=32), max_size=20),
)
def test_packed_numbers_are_decoded_to_the_same_numbers(dtype: str, numbers: list[float]) -> None:
    if "i" in dtype:
        numbers = [int(each) for each in numbers if math.isfinite(each) and abs(each) <= 2**53]
    array = np.array(numbers).astype(dtype)
    parts = packed(array)
    assert parts.keys() == {"type", "bytes"}
    assert parts["type"] == ("float32" if "f4" in dtype else "float64")
    decoded = np.frombuffer(
        base64.b64decode(parts["bytes"]), np.dtype(parts["type"]).newbyteorder("<")
    )
    assert np.array_equal(decoded, array, equal_nan=True)
