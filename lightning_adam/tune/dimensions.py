"""The dimensions that are searched: how each is sampled, and what it means for a point.

To add one, declare it in `DIMENSIONS`, and name it at `StageConfig.space`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lightning_adam.tune.point import Point, rounded


@dataclass(frozen=True)
class Dimension:
    """One number of a point, or what is made of several.

    Attributes:
        coordinate: What Optuna is told it is called.
        axis: What is written below its axis.
        example: A value that works, for who has typed another.
        read: A point's value; None if it has none.
        write: The point with another value.
        to_coordinate: From the value to what is sampled, on the scale it is sampled on.
        to_value: Back.
        bounds: What a value has to lie between, both excluded.
        may_be_zero: Whether 0 is a value too, though it has no place on a logarithmic scale.
        is_whole: Whether coordinates are whole numbers.
        is_switch: Whether its values are true and false, of which there is no range.

    Example:
        >>> DIMENSIONS["beta1"].read(Point(1e-3, betas=(0.9, 0.999)))
        0.9
    """

    coordinate: str
    axis: str
    example: Any
    read: Callable[[Point], Any]
    write: Callable[[Point, Any], Point]
    to_coordinate: Callable[[Any], Any] = float
    to_value: Callable[[Any], Any] = rounded
    bounds: tuple[float, float] = (0.0, math.inf)
    may_be_zero: bool = False
    is_whole: bool = False
    is_switch: bool = False

    def allows(self, value: object, *, is_end: bool = False) -> bool:
        """Whether a value can be tried.

        Args:
            value: Anything that was typed.
            is_end: Whether it is an end of a range, which 0 never is (default: False).

        Example:
            >>> DIMENSIONS["beta1"].allows(0), DIMENSIONS["beta1"].allows(0, is_end=True)
            (True, False)
        """
        if isinstance(value, bool) or self.is_switch:
            return isinstance(value, bool) and self.is_switch
        if not isinstance(value, int | float):
            return False
        low, high = self.bounds
        return low < value < high or (value == 0 and self.may_be_zero and not is_end)

    def requirement(self, *, is_end: bool = False) -> str:
        """Returns what a value must be, as a predicate.

        Example:
            >>> DIMENSIONS["warmup_ratio"].requirement()
            'must be a number above 0 and below 1, or 0'
        """
        if self.is_switch:
            return "must be true or false"
        low, high = self.bounds
        below = f" and below {high:g}" if math.isfinite(high) else ""
        return f"must be a number above {low:g}{below}" + (
            ", or 0" if self.may_be_zero and not is_end else ""
        )

    def distribution(self, choices: Mapping[str, float] | list[Any]) -> BaseDistribution:
        """What Optuna samples from.

        Args:
            choices: `{"low": ..., "high": ...}`, or the values themselves.

        Example:
            >>> DIMENSIONS["beta1"].distribution({"low": 0.5, "high": 0.75})
            FloatDistribution(high=0.5, log=True, low=0.25, step=None)
        """
        if isinstance(choices, list):
            return CategoricalDistribution(choices)
        low, high = sorted(self.to_coordinate(choices[end]) for end in ("low", "high"))
        if self.is_whole:
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log=True)

    def sampled(self, point: Point, coordinate: Any, choices: object) -> Point:
        """The point at a coordinate that was sampled.

        Example:
            >>> decades = {"low": 1e-9, "high": 1e-3}
            >>> DIMENSIONS["eps"].sampled(Point(1e-3, eps=1e-8), -6, decades).eps
            1e-06
        """
        value = coordinate if isinstance(choices, list) else self.to_value(coordinate)
        return self.write(point, value)


def _beta(place: int, example: float) -> Dimension:
    def read(point: Point) -> float | None:
        return None if point.betas is None else point.betas[place]

    def write(point: Point, value: float) -> Point:
        assert point.betas is not None
        other = point.betas[1 - place]
        return point.with_values(betas=(value, other) if place == 0 else (other, value))

    return Dimension(
        coordinate=f"one_minus_beta{place + 1}",
        axis=f"beta{place + 1}, by 1 - beta{place + 1}",
        example=example,
        read=read,
        write=write,
        to_coordinate=_one_minus,
        to_value=lambda coordinate: _one_minus(rounded(coordinate)),
        bounds=(0.0, 1.0),
        may_be_zero=True,
    )


def _one_minus(value: float) -> float:
    # Without the digits that the subtraction makes up: 1 - 0.9 is 0.09999999999999998.
    return float(f"{1 - value:.12g}")


def _decay_per_step(point: Point) -> float | None:
    """Lr times weight_decay, if that is what a step takes away; 0 without decay."""
    if point.weight_decay is None or point.decoupled_weight_decay is None:
        return None
    if point.weight_decay and not point.decoupled_weight_decay:
        return None
    return point.lr * point.weight_decay


def _decaying(point: Point, per_step: float) -> Point:
    decay = rounded(per_step / point.lr)
    return point.with_values(weight_decay=decay, decoupled_weight_decay=True)


def _decay_timescale(point: Point) -> float | None:
    per_step = _decay_per_step(point)
    return 1 / per_step if per_step else per_step


def _field(name: str) -> dict[str, Any]:
    return {
        "coordinate": name,
        "read": lambda point: getattr(point, name),
        "write": lambda point, value: point.with_values(**{name: value}),
    }


DIMENSIONS: dict[str, Dimension] = {
    "lr": Dimension(**_field("lr"), axis="learning rate", example=1e-3),
    "beta1": _beta(0, example=0.9),
    "beta2": _beta(1, example=0.99),
    "eps": Dimension(
        **{**_field("eps"), "coordinate": "log10_eps"},
        axis="eps",
        example=1e-8,
        to_coordinate=lambda eps: int(f"{eps:.0e}".partition("e")[2]),
        to_value=lambda exponent: float(f"1e{exponent}"),
        is_whole=True,
    ),
    "weight_decay": Dimension(
        **_field("weight_decay"), axis="weight_decay", example=0.1, may_be_zero=True
    ),
    "decay_per_step": Dimension(
        "decay_per_step",
        axis="lr · weight_decay, the share that a step takes away",
        example=1e-4,
        read=_decay_per_step,
        write=_decaying,
        may_be_zero=True,
    ),
    "decay_timescale": Dimension(
        "decay_timescale",
        axis="1 / (lr · weight_decay), in steps",
        example=1e4,
        read=_decay_timescale,
        write=lambda point, timescale: _decaying(point, 1 / timescale),
    ),
    "warmup_ratio": Dimension(
        "warmup_ratio",
        axis="share of the training that warms up",
        example=0.1,
        read=lambda point: point.warmup_ratio,
        write=lambda point, ratio: point.with_values(warmup_ratio=ratio, warmup_steps=None),
        bounds=(0.0, 1.0),
        may_be_zero=True,
    ),
    "amsgrad": Dimension(**_field("amsgrad"), axis="amsgrad", example=True, is_switch=True),
}
"""All that a stage may search, by the name it has in `space`."""


def holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution could have given a value.

    Example:
        >>> holds(FloatDistribution(0.1, 0.5), 0.6)
        False
    """
    if value is None:
        return False
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return bool(distribution.low <= value <= distribution.high)
