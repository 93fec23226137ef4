"""Compares runs: differences of their configs, and the first step at which they differ."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_adam.reports.keys import Scope, read_key
from lightning_adam.reports.runs import Run
from lightning_adam.statistics.catalogue import Statistic

TOLERANCE = 0.1
"""The largest difference to ignore: relative to the larger value; absolute for fractions and
cosines."""
ABSENT = "-"
"""Stands for a setting that a run does not have."""


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns the settings in which runs differ: by dotted name, the value of each run.

    Differences of parameter groups that repeat one of their optimizer are omitted.

    Example:
        >>> from pathlib import Path
        >>> first = Run("a", Path(), {"lr": 0.1, "eps": 1e-8}, {}, {}, [])
        >>> config_differences([first, Run("b", Path(), {"lr": 0.2, "eps": 1e-8}, {}, {}, [])])
        {'lr': [0.1, 0.2]}
    """
    configs = [_dotted(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    settings = {name: [config.get(name, ABSENT) for config in configs] for name in names}
    differences = {
        name: values
        for name, values in settings.items()
        if not all(_is_same(value, values[0]) for value in values)
    }
    # The name of a group may contain dots, that of a setting does not.
    optimizers = {name: re.sub(r"\.param_groups\..+\.", ".", name) for name in differences}
    return {
        name: values
        for name, values in differences.items()
        if name == optimizers[name] or differences.get(optimizers[name]) != values
    }


def _is_same(value: Any, other: Any) -> bool:
    # NaN, also in a list, has the same repr but is not equal to itself.
    return bool(value == other) or repr(value) == repr(other)


def _dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class FirstDifference:
    """The first step at which two runs differ."""

    step: int
    statistic: str
    scope: Scope
    """A layer or a tensor if any is logged, otherwise a group or the model."""
    values: tuple[float, float]


def first_difference(
    first: Run, second: Run, tolerance: float = TOLERANCE
) -> FirstDifference | None:
    """Returns the first step measured by both runs at which they differ.

    If several values differ at that step, it returns the largest difference, preferably of a layer
    or a tensor.

    Args:
        first: A run.
        second: Another run.
        tolerance: The largest difference to ignore: relative to the larger value; absolute for
            fractions and cosines. 0 finds any difference (default: 0.1).

    Returns:
        The difference; None if there is none, or the runs have no step in common.

    Example:
        >>> from pathlib import Path
        >>> from lightning_adam.reports.runs import Series
        >>> def run_of(norms):
        ...     series = {"adam_update/update_norm": Series(np.arange(3), np.array(norms))}
        ...     return Run("run", Path(), {}, series, {}, [])
        >>> place = first_difference(run_of([1.0, 2.0, 3.0]), run_of([1.0, 2.1, 4.0]))
        >>> place.step, place.statistic, place.values
        (2, 'update_norm', (3.0, 4.0))
    """
    found = list(_differences(first, second, tolerance))
    if not found:
        return None
    start = min(place.step for _, place in found)
    at_start = [(distance, place) for distance, place in found if place.step == start]
    inner = [each for each in at_start if each[1].scope.is_inner]
    return max(inner or at_start, key=lambda each: each[0])[1]


def _differences(
    first: Run, second: Run, tolerance: float
) -> Iterator[tuple[float, FirstDifference]]:
    """Yields the first difference of every key with its size."""
    for key, ours in first.series.items():
        _, statistic, scope = read_key(key)
        if statistic is None or key not in second.series:
            continue
        # Hyperparameters are inputs, and a signed mean may be near 0 by chance.
        if statistic.family == "schedule" or statistic.name == "exp_avg_mean":
            continue
        theirs = second.series[key]
        steps, left, right = np.intersect1d(
            ours.steps, theirs.steps, assume_unique=True, return_indices=True
        )
        values = ours.values[left], theirs.values[right]
        distances = _distances(statistic, *values)
        (places,) = np.nonzero(distances > tolerance)
        if len(places):
            at = places[0]
            pair = float(values[0][at]), float(values[1][at])
            yield float(distances[at]), FirstDifference(int(steps[at]), statistic.name, scope, pair)


def _distances(
    statistic: Statistic, left: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns the sizes of differences; 0 if both are NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        distances = np.abs(left - right)
        if statistic.unit != "fraction" and not statistic.formula.startswith("cos"):
            distances /= np.maximum(np.abs(left), np.abs(right))
    is_same = (left == right) | (np.isnan(left) & np.isnan(right))
    # At least one value is not finite.
    distances[~np.isfinite(distances)] = np.inf
    distances[is_same] = 0
    return distances
