"""What is to be searched: the sweeper's config, read and checked before the first trial."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_adam.config.errors import ConfigPath, format_value, nearest
from lightning_adam.config.tune import PATH, StageConfig, When, parse_tune
from lightning_adam.tune.dimensions import DIMENSIONS, Dimension
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import START, sign_of

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
                    f" {PATH}.stages.{self.name}.space.{name}=null"
                    f" '+{PATH}.stages.{self.name}.space.weight_decay={{low:1e-6,high:1e-2}}'"
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
        >>> from lightning_adam.config.tune import Direction, TuneConfig
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
            >>> from lightning_adam.config.tune import Direction, TuneConfig
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
    config = parse_tune(given).config
    assert config.direction is not None
    if START in config.stages:
        raise (PATH / "stages" / START).error(
            "is the name of the run with the app's own settings",
            f"Rename the stage, for example to {PATH / 'stages' / 'first'}",
        )
    stages = [build_stage(name, stage) for name, stage in config.stages.items()]
    searched = [stage for stage in stages if stage.space]
    n_trials = config.n_trials
    return Plan(
        direction=config.direction.value,
        n_trials=n_trials,
        n_seeds=config.n_seeds,
        n_jobs=config.n_jobs,
        study_name=config.study_name,
        storage=config.storage,
        monitor=config.monitor,
        optimizer=config.optimizer,
        seed_key=config.seed_key,
        sampler_seed=config.sampler_seed,
        stages=tuple(stage for stage in searched if stage.trials_from <= n_trials),
        too_large={
            stage.name: f"it takes part from n_trials={stage.trials_from} on"
            for stage in searched
            if stage.trials_from > n_trials
        },
    )


def build_stage(name: str, config: StageConfig) -> Stage:
    """Validates the search space of a stage.

    Args:
        name: The stage's name.
        config: Its config.

    Raises:
        ConfigError: If a dimension is unknown, or its choices are invalid.

    Example:
        >>> build_stage("lr", StageConfig(space={"lr": {"low": 1e-4, "high": 1e-2}})).share
        1.0
    """
    path = PATH / "stages" / name
    space = {
        dimension: _choices(path / "space" / dimension, dimension, choices)
        for dimension, choices in config.space.items()
        if choices is not None
    }
    for values in config.try_first:
        _check_point(path / "try_first", values)
    return Stage(
        name=name,
        trials_from=config.trials_from,
        share=config.share,
        when=config.when,
        space=space,
        try_first=config.try_first,
    )


def _choices(path: ConfigPath, name: str, given: object) -> Choices:
    """The choices for a dimension, validated."""
    dimension = _dimension(path, name)
    if isinstance(given, list) and given:
        for value in given:
            if not dimension.allows(value):
                problem = f"has {format_value(value)}, which {dimension.requirement()}"
                raise path.invalid(given, problem, [dimension.example])
        return given
    if dimension.is_switch:
        raise path.invalid(given, "must be a list of true and false", [False, True])
    ends = {"low": dimension.example / 10, "high": dimension.example}
    if not isinstance(given, Mapping) or set(given) != {"low", "high"}:
        raise path.invalid(given, "must be {low: ..., high: ...} or a list of values", ends)
    for end, example in ends.items():
        if not dimension.allows(given[end], is_end=True):
            problem = dimension.requirement(is_end=True)
            raise (path / end).invalid(given[end], problem, example)
    if not given["low"] < given["high"]:
        example = given["high"] / 10
        raise (path / "low").invalid(given["low"], "must be less than high", example)
    return dict(given)


def _check_point(path: ConfigPath, values: Mapping[str, Any]) -> None:
    """Raises if an initial point has an invalid value."""
    for name, value in values.items():
        dimension = _dimension(path / name, name)
        if not dimension.allows(value) and (name, value) != ("beta2", TIED):
            suggestion = path.suggest([{name: dimension.example}])
            problem = dimension.requirement()
            raise (path / name).error(problem, suggestion, value=value)


def _dimension(path: ConfigPath, name: str) -> Dimension:
    if name not in DIMENSIONS:
        close = nearest(name, DIMENSIONS, 1)
        suggestion = f"Did you mean {close[0]}?" if close else f"Use {', '.join(DIMENSIONS)}"
        raise path.error("is not a hyperparameter of the search", suggestion)
    return DIMENSIONS[name]


def _has(point: Point, name: str) -> bool:
    """Whether a point has a dimension, whatever its value."""
    # Steps of a warm-up are no ratio, but can be turned into one.
    is_warmup = name == "warmup_ratio" and point.warmup_steps is not None
    return is_warmup or DIMENSIONS[name].read(point) is not None
