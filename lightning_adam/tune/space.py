"""The search space: the coordinates of a configuration, and random proposals.

The scales are logarithmic: the learning rate, 1 - beta, eps, and the timescale of the weight decay.
That is 1 / (lr * weight_decay), in lengths of the run (Wang & Aitchison 2024, arXiv 2405.13698), so
a shorter run decays its weights as far as a full one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution

from lightning_adam.config.tune import Range, SpaceConfig
from lightning_adam.tune.configuration import Configuration
from lightning_adam.tune.gaussian_process import Array
from lightning_adam.tune.runs import MIN_LENGTH

UNKNOWN_STEPS = 1000
"""Assumed steps of a full run if no Trainer reports them."""
HORIZON = 0.32
"""The best learning rate falls with this power of the length of the run (Bjorck et al. 2024,
arXiv 2409.19913). The learning rates of short runs are corrected for it."""
DRAWS = 600
"""Candidates for the next configuration."""
NEAR_BEST = 0.8
"""Fraction of the candidates that start from the best configuration, not from the defaults."""
NEAR_AN_END = 0.08
"""Distance from an end of a range within which a value is at the end, as a fraction."""


@dataclass(frozen=True)
class Dimension:
    """A coordinate of the space.

    Attributes:
        name: Name in `hydra.sweeper.space`.
        read: Returns the value of a configuration, given the run's steps.
        write: Returns the configuration with another value, given the run's steps.
        default: The center of the prior.
        step: Standard deviation of a move, in decades if logarithmic.
        length_scale: Length scale in the Gaussian process, in decades if logarithmic.
        weight: Relative frequency with which proposals move the coordinate.
        param: Name as a parameter of the Optuna trial.
        complement: Whether the coordinate is that of 1 minus the value.
        is_log: Whether the scale is logarithmic.

    Example:
        >>> beta1 = DIMENSIONS["beta1"]
        >>> beta1.coordinate(beta1.read(Configuration(1e-3, betas=(0.9, 0.99)), 100))
        -1.0
    """

    name: str
    read: Callable[[Configuration, float], float]
    write: Callable[[Configuration, float, float], Configuration]
    default: float
    step: float
    length_scale: float
    weight: float
    param: str
    complement: bool = False
    is_log: bool = True

    def coordinate(self, value: float) -> float:
        """Converts a value to its coordinate."""
        value = _complement(value) if self.complement else value
        return math.log10(min(max(value, 1e-30), 1e30)) if self.is_log else value

    def value(self, coordinate: float) -> float:
        """Converts a coordinate to a value of three digits."""
        value = float(f"{10**coordinate if self.is_log else coordinate:.3g}")
        return _complement(value) if self.complement else value


def _complement(value: float) -> float:
    # Rounds away the error of the subtraction: 1 - 0.9 is 0.09999999999999998.
    return float(f"{1 - value:.12g}")


def _timescale(configuration: Configuration, steps: float) -> float:
    decay = configuration.lr * (configuration.weight_decay or 0.0) * steps
    return 1 / decay if decay else math.inf


def _with_timescale(configuration: Configuration, timescale: float, steps: float) -> Configuration:
    decay = 1 / (timescale * configuration.lr * steps)
    return replace(configuration, weight_decay=float(f"{decay:.3g}"))


def _warmup_ratio(configuration: Configuration, steps: float) -> float:
    if configuration.warmup_steps is not None:
        return configuration.warmup_steps / steps
    return configuration.warmup_ratio or 0.0


def _field(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "param": name,
        "read": lambda configuration, _: float(getattr(configuration, name) or 0.0),
        "write": lambda configuration, value, _: replace(configuration, **{name: value}),
    }


def _beta(index: int) -> dict[str, Any]:
    def write(configuration: Configuration, value: float, _: float) -> Configuration:
        assert configuration.betas is not None
        betas = list(configuration.betas)
        betas[index] = value
        return replace(configuration, betas=(betas[0], betas[1]))

    return {
        "name": f"beta{index + 1}",
        "param": f"one_minus_beta{index + 1}",
        "complement": True,
        "read": lambda configuration, _: configuration.betas[index],
        "write": write,
    }


DIMENSIONS = {
    each.name: each
    for each in (
        Dimension(**_field("lr"), default=1e-3, step=0.5, length_scale=0.6, weight=0.35),
        Dimension(**_beta(0), default=0.85, step=0.5, length_scale=0.6, weight=0.2),
        Dimension(**_beta(1), default=0.99, step=0.5, length_scale=1.5, weight=0.12),
        Dimension(**_field("eps"), default=1e-8, step=1.5, length_scale=2.0, weight=0.2),
        Dimension(
            "decay_timescale",
            _timescale,
            _with_timescale,
            default=3.0,
            step=0.6,
            length_scale=1.5,
            weight=0.13,
            param="decay_timescale",
        ),
        Dimension(**_field("weight_decay"), default=0.0, step=0.8, length_scale=1.5, weight=0.13),
        Dimension(
            "warmup_ratio",
            _warmup_ratio,
            lambda configuration, value, _: replace(
                configuration, warmup_ratio=value, warmup_steps=None
            ),
            default=0.2,
            step=0.18,
            length_scale=0.25,
            weight=0.2,
            param="warmup_ratio",
            is_log=False,
        ),
    )
}
"""The dimensions by name, in the order in which a report shows them."""


class Space:
    """The searched dimensions with their ranges.

    Args:
        start: The configuration of the app, which also has the values that are not searched.
        config: The configured ranges.
        steps: Optimizer steps of a full run; None if unknown.
        search_eps: Whether eps is searched.

    Example:
        >>> space = Space(Configuration(1e-3, betas=(0.9, 0.999)), SpaceConfig(), 1000, False)
        >>> [each.name for each in space.dimensions]
        ['lr', 'beta1', 'beta2']
        >>> space.configuration(np.array([-2.0, -1.0, -2.0]), length=1.0).betas
        (0.9, 0.99)
    """

    def __init__(
        self, start: Configuration, config: SpaceConfig, steps: int | None, search_eps: bool
    ) -> None:
        self.start = start
        self.steps = steps or UNKNOWN_STEPS
        self._is_timescale_known = steps is not None
        ranges = _ranges(start, config, search_eps)
        self.dimensions = [DIMENSIONS[name] for name in ranges]
        ends = [
            sorted(each.coordinate(end) for end in (limits.low, limits.high))
            for each, limits in zip(self.dimensions, ranges.values(), strict=True)
        ]
        self.low, self.high = (np.array([each[end] for each in ends]) for end in (0, 1))
        self.step, self.length_scale, self.weight = (
            np.array([getattr(each, name) for each in self.dimensions])
            for name in ("step", "length_scale", "weight")
        )
        defaults = np.array([each.coordinate(each.default) for each in self.dimensions])
        lr = np.array([each.name == "lr" for each in self.dimensions])
        self._horizon = HORIZON * lr
        self.default: Array = np.clip(defaults, self.low, self.high)

    def coordinates(self, configuration: Configuration, length: float = 1.0) -> Array:
        """Returns the coordinates of a configuration, shape (d,), clipped to the ranges.

        Args:
            configuration: The hyperparameters.
            length: Fraction of a full run that they were used for (default: 1).
        """
        steps = self.steps * length
        found = [each.coordinate(each.read(configuration, steps)) for each in self.dimensions]
        x = np.array(found) + self._horizon * math.log10(length)
        clipped: Array = np.clip(x, self.low, self.high)
        return clipped

    def configuration(self, x: Array, length: float) -> Configuration:
        """Returns the configuration at coordinates, for a run of the given length.

        Weight decay at the weak end of its range is 0.
        """
        configuration, has_decay = self.start, True
        x = np.clip(x - self._horizon * math.log10(length), self.low, self.high)
        for each, coordinate, low, high in zip(
            self.dimensions, x, self.low, self.high, strict=True
        ):
            value = each.value(float(coordinate))
            configuration = each.write(configuration, value, self.steps * length)
            has_decay &= each.name != "decay_timescale" or coordinate < high
            has_decay &= each.name != "weight_decay" or coordinate > low
        return configuration if has_decay else replace(configuration, weight_decay=0.0)

    def index(self, name: str) -> int | None:
        """Returns the index of a dimension; None if it is not searched."""
        names = [each.name for each in self.dimensions]
        return names.index(name) if name in names else None

    def draw(self, best: Array, rng: np.random.Generator, use_prior: bool) -> Array:
        """Returns the coordinates of random candidates, shape (draws, d).

        With the prior, they differ from the best configuration or the defaults in one to three
        coordinates. Without it, they are uniform in the ranges.
        """
        count = len(self.low)
        if not use_prior:
            return rng.uniform(self.low, self.high, size=(DRAWS, count))
        near_best = rng.random(DRAWS) < NEAR_BEST
        draws = np.where(near_best[:, None], best, self.default)
        weight = self.weight / self.weight.sum()
        for row in draws:
            size = min(int(rng.integers(1, 4)), count)
            moved = rng.choice(count, size, replace=False, p=weight)
            row[moved] += rng.normal(size=size) * self.step[moved]
        clipped: Array = np.clip(draws, self.low, self.high)
        return clipped

    def params(
        self, configuration: Configuration, length: float
    ) -> tuple[dict[str, float], dict[str, BaseDistribution]]:
        """Returns the parameters of an Optuna trial, and their distributions.

        A value outside of its range, such as one of the app's, widens the range.
        """
        params: dict[str, float] = {}
        distributions: dict[str, BaseDistribution] = {}
        steps = self.steps * length
        for each, low, high in zip(self.dimensions, self.low, self.high, strict=True):
            if each.name == "decay_timescale" and not self._is_timescale_known:
                continue
            value = min(each.coordinate(each.read(configuration, steps)), high + 1)
            value, first, last = (
                float(10**end if each.is_log else end)
                for end in (value, min(low, value), max(high, value))
            )
            params[each.param] = value
            distributions[each.param] = FloatDistribution(first, last, log=each.is_log)
        params["length"] = length
        distributions["length"] = FloatDistribution(min(MIN_LENGTH, length), 1.0, log=True)
        return params, distributions

    def at_an_end(self, configuration: Configuration) -> list[tuple[str, str]]:
        """Returns the names of the dimensions at an end of their range, with `low` or `high`.

        The end that turns off weight decay or warm-up does not count.
        """
        found = []
        x = self.coordinates(configuration)
        for each, coordinate, low, high in zip(
            self.dimensions, x, self.low, self.high, strict=True
        ):
            position = (coordinate - low) / (high - low)
            off = {"warmup_ratio": 0.0, "weight_decay": 0.0, "decay_timescale": 1.0}
            is_off = abs(position - off.get(each.name, math.inf)) < 0.5
            if NEAR_AN_END <= position <= 1 - NEAR_AN_END or is_off:
                continue
            is_low = (position < NEAR_AN_END) != each.complement
            found.append((each.name, "low" if is_low else "high"))
        return found


def _ranges(start: Configuration, config: SpaceConfig, search_eps: bool) -> dict[str, Range]:
    """Returns the ranges of the dimensions that the optimizer and the schedule have."""
    has = {
        "lr": True,
        "beta1": start.betas is not None,
        "beta2": start.betas is not None,
        "eps": start.eps is not None and search_eps,
        "decay_timescale": start.weight_decay is not None and bool(start.decoupled_weight_decay),
        "weight_decay": start.weight_decay is not None and not start.decoupled_weight_decay,
        "warmup_ratio": start.warmup_ratio is not None or start.warmup_steps is not None,
    }
    ranges: Sequence[tuple[str, Range | None]] = [
        (name, getattr(config, name)) for name in DIMENSIONS
    ]
    return {name: each for name, each in ranges if each is not None and has[name]}
