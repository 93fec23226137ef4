"""Histograms by binary exponent, their percentiles, and the elements that an eps would dominate."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

QUANTITIES = {
    "grad": "|g|, the gradient that the step used, clipped and unscaled.",
    "exp_avg": "|m̂|, the first moment, bias-corrected.",
    "denominator": "√v̂, the denominator before eps is added.",
    "normalized_update": "|u|, the step in units of the learning rate.",
}
"""The quantities with a histogram over active elements. Symbols are those of `catalogue.py`."""

BINS = 256
"""The number of exponents of float32: bin 0 counts zeros and subnormals, bin 255 infinities and
NaN, and bin k magnitudes from 2^(k-127) to below 2^(k-126)."""

DENOMINATOR_POSITION = [*QUANTITIES].index("denominator")
"""The index of √v̂ in `QUANTITIES`."""
HARMLESS = 0.01
"""The fraction of elements that a harmless eps may dominate."""
SHOWN_BINS = 64
EPS_SHOWN = [float(f"1e{exponent}") for exponent in range(-20, 1)]
"""The values of eps in the curve of `dominated_fractions`."""
PERCENTILES = (1, 50, 99)
PERCENTILE_FAMILIES = {"denominator": "moments", "normalized_update": "update"}
"""The quantities with percentiles, and the families of their keys."""


class Histogram(NamedTuple):
    """Counts by octave, with the log2 of the edges.

    The first octave also contains everything smaller, including zeros.
    """

    counts: Sequence[int]
    log2_edges: Sequence[float]

    def fractions_below(self, magnitudes: Sequence[float]) -> list[float]:
        """Returns the fraction of elements below each magnitude.

        Exact at powers of two. Within an octave, log magnitudes are assumed to be uniform.

        Args:
            magnitudes: The magnitudes, above 0.

        Returns:
            The fractions; NaN if there are no elements.

        Example:
            >>> Histogram([1, 1, 2], [-3.0, -2.0, -1.0, 0.0]).fractions_below([0.1, 0.5, 1.0])
            [0.25, 0.5, 1.0]
        """
        total = sum(self.counts)
        if not total:
            return [math.nan] * len(magnitudes)
        edges = self.log2_edges
        below = [count / total for count in itertools.accumulate(self.counts)]
        # The first octave counts as below, because it may contain smaller magnitudes.
        below.insert(0, below[0])
        shares = []
        for magnitude in magnitudes:
            exponent = min(max(math.log2(magnitude), edges[0]), edges[-1])
            place = max(bisect.bisect_left(edges, exponent), 1)
            part = (exponent - edges[place - 1]) / (edges[place] - edges[place - 1])
            shares.append(below[place - 1] + part * (below[place] - below[place - 1]))
        return shares


def fold(counts: Sequence[int]) -> Histogram:
    """Returns counts in 64 octaves, the last of which has the largest magnitude.

    Smaller magnitudes and zeros are counted in the first octave, infinities and NaN in the last.

    Args:
        counts: Counts by binary exponent, see `BINS`.

    Example:
        >>> counts = [0] * BINS
        >>> counts[127] = 5
        >>> shown = fold(counts)
        >>> shown.counts[-1], shown.log2_edges[-2:]
        (5, [0.0, 1.0])
    """
    occupied = [exponent for exponent in range(BINS - 1) if counts[exponent]]
    top = max([SHOWN_BINS, *occupied])
    first = top - SHOWN_BINS + 1
    shown = [sum(counts[: first + 1]), *counts[first + 1 : top + 1]]
    shown[-1] += counts[-1]
    return Histogram(shown, [float(exponent - 127) for exponent in range(first, top + 2)])


def magnitude_above(counts: Sequence[int], share: float) -> float | None:
    """Returns the largest magnitude with less than a given fraction of elements below it.

    Args:
        counts: Counts by binary exponent, see `BINS`.
        share: The fraction, above 0.

    Returns:
        The magnitude, one of eight per decade from 1e-20 to 1; None if there is none.

    Example:
        >>> counts = [0] * BINS
        >>> counts[127 - 10] = 100
        >>> magnitude_above(counts, 0.01)
        0.000749894...
    """
    magnitudes = [10 ** (eighth / 8) for eighth in range(-160, 1)]
    below = dominated_fractions(counts, magnitudes)
    within = [each for each, lower in zip(magnitudes, below, strict=True) if lower < share]
    return max(within, default=None)


def dominated_fractions(counts: Sequence[int], eps: Sequence[float] = EPS_SHOWN) -> list[float]:
    """Returns the fraction of elements with √v̂ below eps, for each eps.

    Args:
        counts: Counts of `denominator` by binary exponent, see `BINS`.
        eps: The values, above 0 (default: the powers of ten from 1e-20 to 1).

    Returns:
        The fractions; NaN if there are no elements.

    Example:
        >>> counts = [0] * BINS
        >>> counts[127 - 10] = counts[127] = 2
        >>> dominated_fractions(counts, [1e-8, 2.0**-9, 2.0])
        [0.0, 0.5, 1.0]
    """
    return Histogram(counts, range(-127, BINS - 126)).fractions_below(eps)


def percentile(counts: Sequence[int], percent: float) -> float | None:
    """Returns a percentile of the magnitudes.

    Exact to the octave, in which log magnitudes are assumed to be uniform.

    Args:
        counts: Counts by binary exponent, see `BINS`.
        percent: The percentage, above 0.

    Returns:
        The magnitude: 0 for zero and subnormal elements, infinity for infinite and NaN ones; None
        if there are no elements.

    Example:
        >>> counts = [0] * BINS
        >>> counts[127], counts[129] = 50, 50
        >>> [percentile(counts, percent) for percent in (25, 50, 100)]
        [1.4142135623730951, 2.0, 8.0]
    """
    wanted = percent / 100 * sum(counts)
    if not wanted:
        return None
    exponent, below = 0, 0
    while below + counts[exponent] < wanted:
        below += counts[exponent]
        exponent += 1
    if exponent == 0:
        return 0.0
    if exponent == BINS - 1:
        return math.inf
    return float(2.0 ** (exponent - 127 + (wanted - below) / counts[exponent]))


def percentiles(exponents: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Returns the percentiles of √v̂ and |u| by key.

    Args:
        exponents: Counts by key, from `AdamStatistics.compute_exponents`.

    Example:
        >>> counts = [0] * BINS
        >>> counts[127] = 100
        >>> percentiles({"adam_histogram/group/decay/denominator": counts})
        {'adam_moments/group/decay/denominator_p1': 1.006..., ...
    """
    found = {}
    for key, counts in exponents.items():
        scope, _, quantity = key.removeprefix("adam_histogram/").rpartition("/")
        for percent in PERCENTILES if quantity in PERCENTILE_FAMILIES else ():
            value = percentile(counts, percent)
            parts = (f"adam_{PERCENTILE_FAMILIES[quantity]}", scope, f"{quantity}_p{percent}")
            if value is not None:
                found["/".join(filter(None, parts))] = value
    return found
