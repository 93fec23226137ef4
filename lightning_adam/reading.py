"""A config in any of its forms → a checked dataclass.

A form is a composed Hydra node, typed or not, a dict, a dataclass instance, or the
`functools.partial` that Hydra makes of a node with `_target_` and `_partial_: true`. What no type
can say (a length, a range) is checked here, under the field's full name.

Imports neither torch nor lightning.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lightning_adam._private.omegaconf import full_key
from lightning_adam.errors import ConfigError, nearest, refusal, type_instead, unknown_field
from lightning_adam.schema import (
    SCHEDULERS,
    AdamConfig,
    CustomSchedulerConfig,
    GroupConfig,
    Interval,
    LayerDecayConfig,
    MonitorConfig,
    SchedulerConfig,
    WeightDecayOn,
)

GROUPING = ("weight_decay_on", "groups", "layer_decay")
"""The fields that say which parameters stand together: ours, whatever the optimizer is."""
MATCHERS = ("match", "regex", "module_class")
TOTAL_STEPS = "total_steps"
"""As an argument of a custom scheduler: the optimizer steps that the trainer will take."""

Config = TypeVar("Config")


class Range(NamedTuple):
    """What a field's value may be, beyond its type."""

    accepts: Callable[[Any], bool]
    expected: str
    instead: object


def _above_0(instead: float) -> Range:
    return Range(lambda value: 0 < value < math.inf, "expected a finite number above 0", instead)


def _not_negative(instead: float) -> Range:
    expected = "expected a finite number of at least 0"
    return Range(lambda value: 0 <= value < math.inf, expected, instead)


def _share(instead: float) -> Range:
    return Range(lambda value: 0 <= value <= 1, "expected a number in [0, 1]", instead)


def _share_above_0(instead: float) -> Range:
    return Range(lambda value: 0 < value <= 1, "expected a number above 0 and at most 1", instead)


def _integer(lowest: int, instead: int) -> Range:
    return Range(
        lambda value: value >= lowest, f"expected an integer of at least {lowest}", instead
    )


RANGES: dict[str, Range] = {
    "lr": _above_0(0.001),
    "betas": Range(
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "expected two numbers in [0, 1)",
        [0.9, 0.999],
    ),
    "eps": _above_0(1e-8),
    "weight_decay": _not_negative(0.01),
    "lr_scale": _above_0(0.1),
    "rate": _share_above_0(0.75),
    "warmup_steps": _integer(0, 100),
    "warmup_ratio": _share(0.05),
    "total_steps": _integer(1, 1000),
    "min_lr_ratio": _share(0.1),
    "power": _above_0(2.0),
    "timescale": _integer(1, 10_000),
    "decay_steps": _integer(1, 100),
    "decay_ratio": _share_above_0(0.1),
    "factor": Range(lambda factor: 0 < factor < 1, "expected a number above 0 and below 1", 0.1),
    "patience": _integer(0, 10),
    "threshold": _not_negative(1e-4),
    "cooldown": _integer(0, 0),
    "frequency": _integer(1, 1),
    "every_n_steps": _integer(1, 50),
}
"""The ranges of all fields, of whatever config: a name means the same everywhere."""


@dataclass(frozen=True)
class CustomOptimizer:
    """Any Adam-like class by its `_target_`; all keys but ours go to it.

    Ours are `weight_decay_on`, `groups` and `layer_decay`, which mean what they mean for Adam.
    """

    factory: functools.partial[Any]
    weight_decay_on: WeightDecayOn
    groups: list[GroupConfig]
    layer_decay: LayerDecayConfig


@dataclass(frozen=True)
class CustomScheduler:
    """A scheduler class, with the arguments it is called with."""

    factory: functools.partial[Any]
    interval: Interval | None
    frequency: int
    monitor: str


def read_optimizer(node: Any) -> tuple[AdamConfig | CustomOptimizer, str]:
    """Checks an optimizer config in any of its forms.

    Args:
        node: A composed Hydra node, a dict, an `AdamConfig` or a `functools.partial`.

    Returns:
        The config, and the full name of its place (`model.optimizer`).

    Raises:
        ConfigError: If a key is unknown or a value is out of range.

    Example:
        >>> read_optimizer({"lr": 0.01, "betas": [0.9, 0.95]})[0].betas
        [0.9, 0.95]
        >>> read_optimizer({"lrr": 1})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_adam.errors.ConfigError: optimizer.lrr=1: no such field; type for example ...
    """
    where = full_key(node, "optimizer")
    custom = _custom(node, where, AdamConfig, "lightning_adam/optimizer", GROUPING)
    if custom is None:
        config = _adam(_values(node, where), where)
        if config.fused and config.foreach:
            raise refusal(where, "foreach", True, "expected not both fused and foreach", None)
        return config, where
    factory, ours = custom
    config = _adam(ours, where)
    return CustomOptimizer(
        factory, config.weight_decay_on, config.groups, config.layer_decay
    ), where


def read_scheduler(node: Any) -> tuple[SchedulerConfig | CustomScheduler, str]:
    """Checks a scheduler config in any of its forms; `name` says which shape it is.

    Args:
        node: A composed Hydra node, a dict, one of the scheduler dataclasses or a
            `functools.partial`.

    Returns:
        The config, and the full name of its place.

    Raises:
        ConfigError: If the name or a key is unknown, or a value is out of range.

    Example:
        >>> read_scheduler({"name": "cosine", "warmup_steps": 10})[0].warmup_steps
        10
    """
    where = full_key(node, "scheduler")
    ours = [entry.name for entry in fields(CustomSchedulerConfig)]
    custom = _custom(node, where, SchedulerConfig, "lightning_adam/scheduler", ours)
    if custom is not None:
        return _custom_scheduler(*custom, where), where
    values = _values(node, where)
    name = values.get("name")
    if name == CustomSchedulerConfig.name:
        expected = "expected the class of a scheduler"
        raise refusal(where, "_target_", None, expected, "torch.optim.lr_scheduler.OneCycleLR")
    if name not in SCHEDULERS:
        expected = f"expected one of {', '.join(SCHEDULERS)}"
        close = nearest(str(name), SCHEDULERS, 1)
        raise refusal(where, "name", name, expected, close[0] if close else "cosine")
    config = _typed(values, SCHEDULERS[name], where)
    _check_either(config, where, "warmup_steps", "warmup_ratio")
    _check_either(config, where, "decay_steps", "decay_ratio")
    return config, where


def read_monitor(node: Any) -> MonitorConfig:
    """Checks the monitor's settings.

    Args:
        node: A composed Hydra node, a dict, or a `MonitorConfig`.

    Raises:
        ConfigError: If a key is unknown or a value is out of range.

    Example:
        >>> read_monitor({"every_n_steps": 10}).every_n_steps
        10
    """
    where = full_key(node, "adam_monitor")
    return _typed(_values(node, where), MonitorConfig, where)


def _values(node: Any, where: str) -> dict[str, Any]:
    """The node as a plain dict, its interpolations resolved in the config it belongs to."""
    if isinstance(node, type) or not (is_dataclass(node) or isinstance(node, Mapping)):
        raise ConfigError(
            f"{where}={node!r}: expected a config node, a dict, a dataclass or a functools.partial,"
            f" such as {{'lr': 0.001}} or {{'name': 'cosine'}}"
        )
    try:
        if is_dataclass(node):
            node = {entry.name: getattr(node, entry.name) for entry in fields(node)}
        if not isinstance(node, DictConfig):
            node = OmegaConf.create(dict(node))
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _refused(error, where) from error
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _adam(values: dict[str, Any], where: str) -> AdamConfig:
    """An Adam config with its groups and its layer decay, each checked under its own name."""
    values = dict(values)
    groups = values.pop("groups", [])
    layer_decay = values.pop("layer_decay", {})
    config = _typed(values, AdamConfig, where)
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        example = [{"name": "head", "match": "net.head.*", "lr_scale": 10}]
        raise refusal(where, "groups", groups, "expected a list of groups", example)
    config.groups = [
        _typed(group, GroupConfig, f"{where}.groups.{index}") for index, group in enumerate(groups)
    ]
    _check_group_names(config.groups, where)
    for index, group in enumerate(config.groups):
        _check_matcher(group, f"{where}.groups.{index}")
    if not isinstance(layer_decay, dict):
        raise refusal(where, "layer_decay", layer_decay, "expected pattern and rate", {})
    config.layer_decay = _typed(layer_decay, LayerDecayConfig, f"{where}.layer_decay")
    _check_layer_decay(config.layer_decay, f"{where}.layer_decay")
    return config


def _typed(values: Mapping[str, Any], schema: type[Config], where: str) -> Config:
    """The values as an instance of their dataclass: the names, the types and the ranges checked."""
    defaults = schema()
    names = [entry.name for entry in fields(defaults)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise unknown_field(where, name, values[name], names)
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(values)))
    except MissingMandatoryValue as error:
        raise _refused(error, where) from error
    except OmegaConfBaseException as error:
        name = re.split(r"[.\[]", str(error.full_key))[0]
        instead = RANGES[name].instead if name in RANGES else getattr(defaults, name)
        raise refusal(where, name, values[name], _sentence(error), instead) from error
    assert isinstance(typed, schema)
    for name in names:
        value = getattr(typed, name)
        if value is not None and name in RANGES and not RANGES[name].accepts(value):
            raise refusal(where, name, value, RANGES[name].expected, RANGES[name].instead)
    return typed


def _refused(error: OmegaConfBaseException, where: str) -> ConfigError:
    """A value that is missing, or that OmegaConf cannot resolve or hold."""
    key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or ""))
    if not key.startswith(where):
        key = f"{where}.{key}".rstrip(".")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key}=???: expected a value; type {key}=VALUE")
    return ConfigError(f"{key}: expected a value, but {_sentence(error)}; type {key}=VALUE")


def _sentence(error: OmegaConfBaseException) -> str:
    """OmegaConf's message without the lines that repeat key and type."""
    return str(error).partition("\n")[0]


def _custom(
    node: Any, where: str, schema: type, preset: str, ours: Iterable[str]
) -> tuple[functools.partial[Any], dict[str, Any]] | None:
    """What to call, and the values that are ours; None for a node without a `_target_`."""
    if isinstance(node, functools.partial):
        factory = node
        own = {name: _plain(node.keywords[name]) for name in ours if name in node.keywords}
    elif isinstance(node, Mapping) and "_target_" in node:
        values = _values(node, where)
        _check_unmerged(node, values, where, schema, preset)
        own = {name: values.pop(name) for name in ours if name in values}
        factory = _located(values, where)
    else:
        return None
    arguments = {name: _plain(value) for name, value in factory.keywords.items() if name not in own}
    _check_arguments(factory.func, arguments, where)
    return functools.partial(factory.func, *factory.args, **arguments), own


def _check_unmerged(
    node: Mapping[str, Any], values: dict[str, Any], where: str, schema: type, preset: str
) -> None:
    """A `_target_` in one of our typed nodes comes from a config group of the user's own."""
    merged = OmegaConf.get_type(node) if isinstance(node, DictConfig) else dict
    if merged is not None and issubclass(merged, schema):
        raise ConfigError(
            f"{where}._target_={values['_target_']}: expected the fields of {merged.__name__}"
            f" alone, but a config group of your own is merged with {preset}; take one of the two"
            f" out of the defaults list, or, for a class of your own, type {preset}=custom"
        )


def _located(values: dict[str, Any], where: str) -> functools.partial[Any]:
    try:
        factory = instantiate({**values, "_partial_": True, "_convert_": "all"})
    except (HydraException, ImportError, AttributeError, TypeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"{where}._target_={values['_target_']}: expected something to import and call, but"
            f" {cause}; type {where}._target_=package.module.Class"
        ) from error
    assert isinstance(factory, functools.partial)
    return factory


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Refuses an argument that the target does not take, as far as its signature tells."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    # The first is what the target is built over: the parameters, or the optimizer.
    names = [parameter.name for parameter in parameters][1:]
    for name, value in arguments.items():
        if name not in names:
            raise unknown_field(where, name, value, names)


def _custom_scheduler(
    factory: functools.partial[Any], ours: Mapping[str, Any], where: str
) -> CustomScheduler:
    config = _typed(ours, CustomSchedulerConfig, where)
    if config.name != CustomSchedulerConfig.name:
        expected = "expected custom beside a _target_"
        raise refusal(where, "name", config.name, expected, CustomSchedulerConfig.name)
    counts_steps = TOTAL_STEPS in factory.keywords.values()
    if counts_steps and config.interval is Interval.epoch:
        expected = f"expected step, for an argument is {TOTAL_STEPS}"
        raise refusal(where, "interval", config.interval, expected, Interval.step)
    interval = Interval.step if counts_steps else config.interval
    return CustomScheduler(factory, interval, config.frequency, config.monitor)


def _check_group_names(groups: list[GroupConfig], where: str) -> None:
    taken = ["decay", "no_decay"]
    for index, group in enumerate(groups):
        place = f"{where}.groups.{index}"
        if not re.fullmatch(r"[A-Za-z0-9_.]+", group.name):
            expected = "expected letters, digits, _ and . alone"
            raise refusal(place, "name", group.name, expected, "head")
        names = [group.name, f"{group.name}_no_decay"]
        if not set(names).isdisjoint(taken):
            expected = f"expected another name than {', '.join(taken)}"
            raise refusal(place, "name", group.name, expected, f"{group.name}_{index}")
        taken += names


def _check_matcher(group: GroupConfig, where: str) -> None:
    given = [matcher for matcher in MATCHERS if getattr(group, matcher) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: expected exactly one of {', '.join(MATCHERS)}, but the group {group.name}"
            f" has {' and '.join(given) or 'none'}; "
            + (
                type_instead(f"{where}.{given[-1]}", None)
                if given
                else type_instead(f"{where}.match", "net.head.*")
            )
        )
    if group.regex is not None:
        try:
            re.compile(group.regex)
        except re.error as error:
            expected = f"expected a regular expression, but {error}"
            raise refusal(where, "regex", group.regex, expected, r"head\.") from error


def _check_layer_decay(layer_decay: LayerDecayConfig, where: str) -> None:
    pattern, rate = layer_decay.pattern, layer_decay.rate
    if pattern is None and rate is not None:
        raise refusal(where, "pattern", None, "expected one beside a rate", "net.blocks.*")
    if rate is None and pattern is not None:
        raise refusal(where, "rate", None, "expected one beside a pattern", 0.75)
    if pattern is not None and "*" not in pattern.split("."):
        expected = "expected a * where the layer's number stands"
        raise refusal(where, "pattern", pattern, expected, f"{pattern.rstrip('.')}.*")


def _check_either(config: SchedulerConfig, where: str, steps: str, ratio: str) -> None:
    if getattr(config, steps, None) is not None and getattr(config, ratio, None) is not None:
        expected = f"expected {steps} or {ratio}, not both"
        raise refusal(where, ratio, getattr(config, ratio), expected, None)
