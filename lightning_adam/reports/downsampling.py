"""Downsampling of curves and heat maps, so that a report has bounded size."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_adam.reports.runs import Series
from lightning_adam.statistics.histograms import Histogram

BUCKETS = 1000
"""Longer curves keep the smallest and the largest value of this number of buckets."""
COLUMNS = 400
"""Largest number of columns of a heat map; with more steps, a column has several steps."""

Floats = NDArray[np.float64]


def downsample_minmax(series: Series, buckets: int = BUCKETS) -> Series:
    """Returns the smallest, the largest and the first non-finite value of each bucket.

    Args:
        series: The series. It is returned unchanged if it has at most two points per bucket.
        buckets: Number of buckets with equal numbers of points (default: 1000).

    Example:
        >>> spike = np.where(np.arange(10_000) == 5_000, 9.0, 1.0)
        >>> shown = downsample_minmax(Series(np.arange(10_000), spike))
        >>> len(shown.values) <= 2 * BUCKETS, shown.steps[shown.values == 9.0]
        (True, array([5000]))
    """
    length = len(series.steps)
    if length <= 2 * buckets:
        return series
    indexes = {0, length - 1}
    bounds = np.linspace(0, length, buckets + 1).astype(int)
    for start, stop in itertools.pairwise(bounds):
        part = series.values[start:stop]
        finite = np.isfinite(part)
        if not finite.all():
            indexes.add(start + int(np.argmin(finite)))
        if finite.any():
            indexes.add(start + int(np.argmin(np.where(finite, part, np.inf))))
            indexes.add(start + int(np.argmax(np.where(finite, part, -np.inf))))
    places = sorted(indexes)
    return Series(series.steps[places], series.values[places])


def grid(rows: Sequence[Series], columns: int) -> tuple[NDArray[np.int64], Floats]:
    """Returns series as rows of a heat map, with the largest magnitude of the steps of a column.

    Args:
        rows: The series.
        columns: The largest number of columns.

    Returns:
        The first step of each column, and the values, NaN for missing ones.

    Example:
        >>> steps, values = grid([Series(np.arange(4), np.array([1.0, -2.0, 3.0, 1.0]))], 2)
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


def octave_shares(by_step: Mapping[int, Histogram]) -> tuple[NDArray[np.int64], int, Floats]:
    """Returns histograms as a heat map, with the sum over the steps of a column.

    Args:
        by_step: The histograms by step.

    Returns:
        The first step of each column, the exponent of the lowest edge, and the fraction of elements
        by octave and column.

    Example:
        >>> first, second = Histogram([3, 1], [0.0, 1.0, 2.0]), Histogram([2, 2], [1.0, 2.0, 3.0])
        >>> steps, lowest, shares = octave_shares({0: first, 10: second})
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


def pack(array: NDArray[Any]) -> dict[str, Any]:
    """Returns an array for page.js: its type, and its bytes in base64.

    Uses 32 bits if they can represent all steps, or the magnitudes of all values.

    Example:
        >>> pack(np.array([1.0]))
        {'type': 'float32', 'bytes': 'AACAPw=='}
        >>> [pack(np.array(each))["type"] for each in ([1e-50], [3], [2**40])]
        ['float64', 'uint32', 'float64']
    """
    if array.dtype.kind == "f":
        magnitudes = np.abs(array[np.isfinite(array) & (array != 0)])
        range_of = np.finfo(np.float32)
        is_within = ((magnitudes >= range_of.tiny) & (magnitudes <= range_of.max)).all()
        dtype = "float32" if is_within else "float64"
    else:
        # Numbers in JavaScript have 53 bits.
        fits = not array.size or (array.min() >= 0 and array.max() < 2**32)
        dtype = "uint32" if fits else "float64"
    little_endian = array.astype(np.dtype(dtype).newbyteorder("<"))
    return {"type": dtype, "bytes": base64.b64encode(little_endian.tobytes()).decode("ascii")}
