"""What is left of a run's numbers for a picture of it, whatever its length."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_adam.reports.runs import Series
from lightning_adam.statistics.histograms import Histogram

STRETCHES = 1000
"""A curve of more than twice as many points keeps the smallest and the largest of each stretch."""
COLUMNS = 400
"""A map of more steps than these has columns of several steps."""
LOG_SPAN = 100
"""A panel whose values span more than this is logarithmic."""

Floats = NDArray[np.float64]


def thinned(series: Series, stretches: int = STRETCHES) -> Series:
    """A series of which the smallest, the largest and the first non-finite of each stretch is left.

    Args:
        series: It is returned as it is if it has no more than two points a stretch.
        stretches: How many, with as many points each (default: 1000).

    Example:
        >>> spike = np.where(np.arange(10_000) == 5_000, 9.0, 1.0)
        >>> shown = thinned(Series(np.arange(10_000), spike))
        >>> len(shown.values) <= 2 * STRETCHES, shown.steps[shown.values == 9.0]
        (True, array([5000]))
    """
    length = len(series.steps)
    if length <= 2 * stretches:
        return series
    kept = {0, length - 1}
    bounds = np.linspace(0, length, stretches + 1).astype(int)
    for start, stop in itertools.pairwise(bounds):
        part = series.values[start:stop]
        finite = np.isfinite(part)
        if not finite.all():
            kept.add(start + int(np.argmin(finite)))
        if finite.any():
            kept.add(start + int(np.argmin(np.where(finite, part, np.inf))))
            kept.add(start + int(np.argmax(np.where(finite, part, -np.inf))))
    places = sorted(kept)
    return Series(series.steps[places], series.values[places])


def gridded(rows: Sequence[Series], columns: int) -> tuple[NDArray[np.int64], Floats]:
    """Series as the rows of a map; of several steps in a column the largest magnitude counts.

    Args:
        rows: The series.
        columns: How many there may be.

    Returns:
        The first step of each column, and the values, NaN where there is none.

    Example:
        >>> steps, values = gridded([Series(np.arange(4), np.array([1.0, -2.0, 3.0, 1.0]))], 2)
        >>> steps, values
        (array([0, 2]), array([[-2.,  3.]]))
    """
    steps = np.unique(np.concatenate([row.steps for row in rows]))
    bounds = np.linspace(0, len(steps), min(columns, len(steps)) + 1).astype(int)
    values = np.full((len(rows), len(steps)), np.nan)
    for values_of_row, row in zip(values, rows, strict=True):
        values_of_row[np.searchsorted(steps, row.steps)] = row.values
    if len(bounds) <= len(steps):
        parts = [values[:, start:stop] for start, stop in itertools.pairwise(bounds)]
        values = np.stack([_largest_magnitudes(part) for part in parts], axis=1)
    return steps[bounds[:-1]], values


def _largest_magnitudes(values: Floats) -> Floats:
    places = np.argmax(np.nan_to_num(np.abs(values), nan=-1.0, posinf=np.inf), axis=1)
    largest: Floats = values[np.arange(len(values)), places]
    return largest


def octaves(by_step: Mapping[int, Histogram]) -> tuple[NDArray[np.int64], int, Floats]:
    """Histograms as a map; those of several steps in a column are added up.

    Args:
        by_step: The histograms.

    Returns:
        The first step of each column, the exponent of the lowest edge, and the share of the
        elements by octave and column.

    Example:
        >>> first, second = Histogram([3, 1], [0.0, 1.0, 2.0]), Histogram([2, 2], [1.0, 2.0, 3.0])
        >>> steps, lowest, shares = octaves({0: first, 10: second})
        >>> lowest, shares.tolist()
        (0, [[0.75, 0.0], [0.25, 0.5], [0.0, 0.5]])
    """
    steps = np.array(sorted(by_step))
    lowest = min(int(by_step[step].log2_edges[0]) for step in by_step)
    highest = max(int(by_step[step].log2_edges[-1]) for step in by_step)
    counts = np.zeros((highest - lowest, len(steps)))
    for column, step in enumerate(steps):
        first = int(by_step[step].log2_edges[0]) - lowest
        counts[first : first + len(by_step[step].counts), column] = by_step[step].counts
    bounds = np.linspace(0, len(steps), min(COLUMNS, len(steps)) + 1).astype(int)
    counts = np.add.reduceat(counts, bounds[:-1], axis=1)
    occupied = np.flatnonzero(counts.any(axis=1))
    if len(occupied):
        counts = counts[occupied[0] : occupied[-1] + 1]
        lowest += int(occupied[0])
    with np.errstate(invalid="ignore"):
        return steps[bounds[:-1]], lowest, counts / counts.sum(axis=0)


def below_edges(histogram: Histogram) -> tuple[Floats, Floats]:
    """The share of the elements below every power of two between a histogram's octaves.

    Example:
        >>> below_edges(Histogram([1, 1, 2], [-3.0, -2.0, -1.0, 0.0]))
        (array([0.25, 0.5 ]), array([0.25, 0.5 ]))
    """
    counts = np.asarray(histogram.counts, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shares = np.cumsum(counts) / counts.sum()
    return np.exp2(histogram.log2_edges[1:-1]), shares[:-1]


def is_logarithmic(unit: str, values: Sequence[Floats]) -> bool:
    """Whether the values span decades: positive but for a few zeros, and no shares of a whole.

    Example:
        >>> values = [np.array([1e-4, 1.0])]
        >>> is_logarithmic("gradient", values), is_logarithmic("fraction", values)
        (True, False)
    """
    every = np.concatenate(values)
    every = every[np.isfinite(every)]
    positive = every[every > 0]
    if unit == "fraction" or not len(positive) or len(positive) < 0.9 * len(every):
        return False
    return bool(every.min() >= 0 and positive.max() / LOG_SPAN > positive.min())


def compact(values: Floats) -> NDArray[Any]:
    """In half the bytes, where nothing but digits is lost by it.

    Example:
        >>> compact(np.array([0.1, 0.0])).dtype, compact(np.array([1e-50, 0.0])).dtype
        (dtype('float32'), dtype('float64'))
    """
    magnitudes = np.abs(values[np.isfinite(values) & (values != 0)])
    range_of = np.finfo(np.float32)
    is_small = ((magnitudes >= range_of.tiny) & (magnitudes <= range_of.max)).all()
    return values.astype(np.float32) if is_small else values


def packed(array: NDArray[Any]) -> dict[str, Any]:
    """An array as page.js reads it: the name of its type, and its bytes in base64.

    Example:
        >>> packed(np.array([1.0]))
        {'type': 'float64', 'bytes': 'AAAAAAAA8D8='}
    """
    if array.dtype == np.int64:
        # JavaScript's numbers hold 53 bits.
        array = array.astype(np.float64)
    little_endian = array.astype(array.dtype.newbyteorder("<"))
    return {
        "type": array.dtype.name,
        "bytes": base64.b64encode(little_endian.tobytes()).decode("ascii"),
    }
