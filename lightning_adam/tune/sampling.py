"""A new point of a stage's space, as Optuna's Gaussian process proposes it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from lightning_adam.tune.dimensions import DIMENSIONS, holds
from lightning_adam.tune.plan import Choices
from lightning_adam.tune.point import Point

RANDOM_FIRST = 2
"""Points that are drawn at random before the process has enough to learn from."""
DRAWS = 200
"""How often a point is drawn that is not known yet, before there is taken to be none."""

Space = Mapping[str, Choices]
Seen = tuple[Mapping[str, Any], float | None]
"""Where a training stood in the space, and what it came to, less being better: not a number if it
failed, None if it is under way."""


def propose(space: Space, incumbent: Point, seen: Sequence[Seen], seed: int) -> Point | None:
    """The next point to try.

    The process learns from what is over, a failure being as bad as the worst that still counts,
    and expects what is under way to be as others nearby.

    Args:
        space: What is searched.
        incumbent: All else is as this has it.
        seen: What is known, the incumbent included.
        seed: Of the process.

    Returns:
        A point whose place is none of those that were seen; None if there is no other.

    Example:
        >>> parabola = [({"lr": lr}, abs(math.log10(lr) + 2)) for lr in (1e-4, 1e-3, 0.05, 0.1)]
        >>> point = propose({"lr": {"low": 1e-5, "high": 0.1}}, Point(1e-3), parabola, seed=0)
        >>> 1e-3 < point.lr < 0.05
        True
        >>> known = [({"lr": 1e-3}, 0.1), ({"lr": 1e-2}, 0.2)]
        >>> propose({"lr": [1e-3, 1e-2]}, Point(1e-3), known, seed=0) is None
        True
    """
    distributions = space_distributions(space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=RANDOM_FIRST)
    study = optuna.create_study(sampler=sampler)
    values = bounded([value for _, value in seen])
    for (coordinates, _), value in zip(seen, values, strict=True):
        if all(holds(distributions[name], coordinates.get(name)) for name in distributions):
            study.add_trial(
                optuna.create_trial(
                    state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
                    value=value,
                    params=dict(coordinates),
                    distributions=distributions,
                )
            )
    known = [dict(coordinates) for coordinates, _ in seen]
    for _ in range(DRAWS):
        sampled = study.ask(distributions).params
        point = incumbent
        for name, choices in space.items():
            dimension = DIMENSIONS[name]
            point = dimension.sampled(point, sampled[dimension.coordinate], choices)
        if coordinates_of(space, point) not in known:
            return point
        # What is known exactly is not tried again: the neighbourhood of the best is left.
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
        seed += 1
    return None


def coordinates_of(space: Space, point: Point) -> dict[str, Any]:
    """Where a point stands in a space, as Optuna samples it, without what it does not have.

    Example:
        >>> coordinates_of({"beta1": {"low": 0.5, "high": 0.99}}, Point(1e-3, betas=(0.9, 0.999)))
        {'one_minus_beta1': 0.1}
    """
    found = {}
    for name, choices in space.items():
        dimension = DIMENSIONS[name]
        value = dimension.read(point)
        if isinstance(choices, list) and value is not None:
            found[dimension.coordinate] = value
        elif value:
            found[dimension.coordinate] = dimension.to_coordinate(value)
    return found


def space_distributions(space: Space) -> dict[str, BaseDistribution]:
    """What Optuna samples a space from, by coordinate.

    Example:
        >>> space_distributions({"amsgrad": [False, True]})
        {'amsgrad': CategoricalDistribution(choices=(False, True))}
    """
    return {
        DIMENSIONS[name].coordinate: DIMENSIONS[name].distribution(choices)
        for name, choices in space.items()
    }


def bounded(values: Sequence[float | None]) -> list[float | None]:
    """What is far worse than the middle is brought near, and so is a failure.

    A diverged training would else flatten all differences among the good ones.

    Example:
        >>> bounded([1.0, 2.0, 3.0, 1e6, math.nan, None])
        [1.0, 2.0, 3.0, 7.0, 7.0, None]
    """
    finite = sorted(each for each in values if each is not None and math.isfinite(each))
    if not finite:
        return [None if each is None else 0.0 for each in values]
    middle = finite[len(finite) // 2]
    worst = min(finite[-1], middle + 2 * (middle - finite[0])) if middle > finite[0] else finite[-1]
    return [
        None if each is None else min(each, worst) if math.isfinite(each) else worst
        for each in values
    ]
