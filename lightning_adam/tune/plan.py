"""What is to be searched: the sweeper's config, read and checked before the first trial."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from lightning_adam.config.errors import ConfigError, as_typed, nearest, refusal, type_instead
from lightning_adam.config.schema import StageConfig, When
from lightning_adam.tune.dimensions import DIMENSIONS, Dimension
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import START, sign_of

PLACE = "hydra.sweeper"
TIED = "beta1"
"""The value of `beta2` that means the same as beta1."""

Choices = dict[str, float] | list[Any]
"""The ends of a range, or the values themselves."""


@dataclass(frozen=True)
class Stage:
    """A part of the search: some dimensions, all others as the incumbent has them.

    Attributes:
        name: As in the config.
        trials_from: The smallest budget it takes part in.
        share: Its part of what is left.
        when: What calls for it.
        space: Choices by dimension.
        try_first: Values by dimension, of points to begin with.

    Example:
        >>> stage = Stage("amsgrad", 1, 1.0, When.always, {"amsgrad": [False, True]}, ())
        >>> [point.amsgrad for point in stage.alternatives(Point(1e-3, amsgrad=False))]
        [True]
    """

    name: str
    trials_from: int
    share: float
    when: When
    space: dict[str, Choices]
    try_first: Sequence[dict[str, Any]]

    def lacking(self, point: Point) -> str:
        """Why the stage cannot be searched from a point; empty if it can."""
        for name in self.space:
            if _has(point, name):
                continue
            if name == "warmup_ratio":
                return "there is no schedule that could warm up, or it is not known which"
            if name.startswith("decay_") and point.weight_decay:
                return (
                    "weight_decay is L2 in the gradient here, where lr times weight_decay is no"
                    f" rate of decay; search weight_decay itself:"
                    f" {PLACE}.stages.{self.name}.space.{name}=null"
                    f" '+{PLACE}.stages.{self.name}.space.weight_decay={{low:1e-6,high:1e-2}}'"
                )
            return f"the optimizer has no {name}"
        return ""

    def first_points(self, point: Point) -> list[Point]:
        """The points to begin with, from an incumbent on, without itself.

        What the optimizer does not have cannot be tried: such points are left out.
        """
        found = []
        for values in self.try_first:
            if not all(_has(point, name) for name in values):
                continue
            candidate = point
            for name, value in values.items():
                tied = DIMENSIONS["beta1"].read(candidate) if value == TIED else value
                candidate = DIMENSIONS[name].write(candidate, tied)
            if candidate != point and candidate not in found:
                found.append(candidate)
        return found

    def alternatives(self, point: Point) -> list[Point] | None:
        """All points there are but `point`; None if they cannot be counted."""
        found = [point]
        for name, choices in self.space.items():
            if not isinstance(choices, list):
                return None
            dimension = DIMENSIONS[name]
            found = [dimension.write(each, choice) for each in found for choice in choices]
        unique = dict.fromkeys([*self.first_points(point), *found])
        return [each for each in unique if each != point]


@dataclass(frozen=True)
class Plan:
    """The sweeper's config, checked; what is not explained here is explained in `TuneConfig`.

    Attributes:
        stages: In their order, without those that are for larger budgets.

    Example:
        >>> from lightning_adam.config.schema import Direction, TuneConfig
        >>> config = TuneConfig(direction=Direction.minimize, study_name="mnist")
        >>> read_plan(vars(config)).n_trials
        40
    """

    direction: str
    n_trials: int
    n_seeds: int
    n_jobs: int
    study_name: str
    storage: str | None
    monitor: str | None
    optimizer: str | None
    seed_key: str
    sampler_seed: int
    stages: tuple[Stage, ...]
    too_large: dict[str, str]

    @property
    def sign(self) -> float:
        """What a metric is multiplied by, so that less is better."""
        return sign_of(self.direction)

    def part_of(self, stage: Stage, behind: Sequence[Stage], point: Point, left: int) -> int:
        """A stage's part of the trainings that are left: by shares, no more than it can use.

        Args:
            stage: The stage.
            behind: Those that come after it.
            point: The incumbent.
            left: How many trainings are left.

        Returns:
            0 if it is too little to come to something.

        Example:
            >>> from lightning_adam.config.schema import Direction, TuneConfig
            >>> stages = {
            ...     "lr": {"share": 3, "space": {"lr": {"low": 1e-4, "high": 1e-2}}},
            ...     "amsgrad": {"share": 3, "space": {"amsgrad": [False, True]}},
            ... }
            >>> config = TuneConfig(direction=Direction.minimize, study_name="mnist")
            >>> plan = read_plan({**vars(config), "stages": stages})
            >>> plan.part_of(plan.stages[0], plan.stages[1:], Point(1e-3, amsgrad=False), 20)
            18
        """
        limits = {}
        for each in (stage, *behind):
            found = each.alternatives(point)
            limits[each.name] = math.inf if found is None else len(found) + self.n_seeds - 1
        parts: dict[str, float] = {}
        open_stages = [stage, *behind]
        while open_stages:
            free = left - sum(parts.values())
            shares = sum(each.share for each in open_stages)
            full = [each for each in open_stages if free * each.share / shares >= limits[each.name]]
            if not full:
                parts |= {each.name: free * each.share / shares for each in open_stages}
                break
            parts |= {each.name: limits[each.name] for each in full}
            open_stages = [each for each in open_stages if each not in full]
        # One point with all seeds is the least that can come to something.
        part = max(round(parts[stage.name]), self.n_seeds)
        return int(part) if part <= left else 0


def read_plan(given: Mapping[str, Any]) -> Plan:
    """Reads the config of `hydra/sweeper=adam_tune`.

    Args:
        given: Its fields, as Hydra hands them to the sweeper.

    Raises:
        ConfigError: If a value cannot work.
    """
    config: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        OmegaConf.create(dict(given)), resolve=True, enum_to_str=True
    )
    if config.get("direction") is None:
        raise ConfigError(
            f"{PLACE}.direction: expected which way the number gets better that the app returns,"
            f" for it is not guessed; type {PLACE}.direction=minimize or {PLACE}.direction=maximize"
        )
    for name, example in (("n_trials", 40), ("n_seeds", 2), ("n_jobs", 1)):
        if config[name] < 1:
            raise refusal(PLACE, name, config[name], "expected a whole number above 0", example)
    if not str(config["study_name"]).strip():
        raise refusal(PLACE, "study_name", config["study_name"], "expected a name", "tune")
    if START in config["stages"]:
        raise ConfigError(
            f"{PLACE}.stages.{START}: expected another name, for the app's own settings are run"
            f" under this one; call the stage for example {PLACE}.stages.first"
        )
    stages = [read_stage(name, stage) for name, stage in config["stages"].items()]
    searched = [stage for stage in stages if stage.space]
    n_trials = config["n_trials"]
    return Plan(
        **{
            name: config[name]
            for name in (
                "direction",
                "n_trials",
                "n_seeds",
                "n_jobs",
                "study_name",
                "storage",
                "monitor",
                "optimizer",
                "seed_key",
                "sampler_seed",
            )
        },
        stages=tuple(stage for stage in searched if stage.trials_from <= n_trials),
        too_large={
            stage.name: f"it takes part from n_trials={stage.trials_from} on"
            for stage in searched
            if stage.trials_from > n_trials
        },
    )


def read_stage(name: str, given: Mapping[str, Any]) -> Stage:
    """Reads one of the stages.

    Args:
        name: What it is called.
        given: The fields of a `StageConfig`.

    Raises:
        ConfigError: If a dimension is unknown, or its choices cannot work.

    Example:
        >>> read_stage("lr", {"space": {"lr": {"low": 1e-4, "high": 1e-2}}}).share
        1.0
    """
    place = f"{PLACE}.stages.{name}"
    config = {**vars(StageConfig()), **given}
    if not config["share"] > 0:
        raise refusal(place, "share", config["share"], "expected a number above 0", 1)
    space = {
        dimension: _choices(f"{place}.space", dimension, choices)
        for dimension, choices in config["space"].items()
        if choices is not None
    }
    for values in config["try_first"]:
        _check_point(f"{place}.try_first", values)
    return Stage(
        name=name,
        trials_from=config["trials_from"],
        share=config["share"],
        when=When(config["when"]),
        space=space,
        try_first=config["try_first"],
    )


def _choices(where: str, name: str, given: object) -> Choices:
    """What was typed for a dimension, if it can be searched."""
    dimension = _dimension(where, name)
    if isinstance(given, list) and given:
        for value in given:
            if not dimension.allows(value):
                raise refusal(where, name, value, dimension.expected(), [dimension.example])
        return given
    if dimension.is_switch:
        raise refusal(where, name, given, "expected a list of truth values", [False, True])
    ends = {"low": dimension.example / 10, "high": dimension.example}
    if not isinstance(given, Mapping) or set(given) != {"low", "high"}:
        expected = "expected {low: ..., high: ...} or a list of values"
        raise refusal(where, name, given, expected, ends)
    for end, example in ends.items():
        if not dimension.allows(given[end], is_end=True):
            expected = dimension.expected(is_end=True)
            raise refusal(f"{where}.{name}", end, given[end], expected, example)
    if not given["low"] < given["high"]:
        low = given["high"] / 10
        raise refusal(f"{where}.{name}", "low", given["low"], "expected less than high", low)
    return dict(given)


def _check_point(where: str, values: Mapping[str, Any]) -> None:
    """Refuses a point to begin with that has a value which cannot work."""
    for name, value in values.items():
        dimension = _dimension(where, name)
        if dimension.allows(value) or (name, value) == ("beta2", TIED):
            continue
        instead = type_instead(where, [{name: dimension.example}])
        raise ConfigError(f"{where}.{name}={as_typed(value)}: {dimension.expected()}; {instead}")


def _dimension(where: str, name: str) -> Dimension:
    if name not in DIMENSIONS:
        close = nearest(name, DIMENSIONS, 1)
        instead = f"did you mean {close[0]}?" if close else f"there are {', '.join(DIMENSIONS)}"
        raise ConfigError(f"{where}.{name}: no such dimension of Adam; {instead}")
    return DIMENSIONS[name]


def _has(point: Point, name: str) -> bool:
    """Whether a point has a dimension, whatever its value."""
    # Steps of a warm-up are no ratio, but can be turned into one.
    is_warmup = name == "warmup_ratio" and point.warmup_steps is not None
    return is_warmup or DIMENSIONS[name].read(point) is not None
