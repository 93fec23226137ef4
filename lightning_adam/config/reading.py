"""What a user hands us → a checked config: of the optimizer and of the scheduler.

What is wrong is refused under the field's full name in the user's config.

Imports neither torch nor lightning.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_adam._compat.omegaconf import full_key
from lightning_adam.config.errors import ConfigError, nearest, refusal, type_instead
from lightning_adam.config.forms import check_arguments, factory_of, name_of, typed, values_of
from lightning_adam.config.schema import (
    SCHEDULERS,
    AdamConfig,
    CustomSchedulerConfig,
    GroupConfig,
    Interval,
    LayerDecayConfig,
    Resume,
    SchedulerConfig,
    WeightDecayOn,
)

OURS = ("weight_decay_on", "groups", "layer_decay", "resume")
"""The fields of an optimizer's config that are ours, whatever the optimizer is."""
MATCHERS = ("match", "regex", "module_class")
TOTAL_STEPS = "total_steps"
"""As an argument of a custom scheduler: the optimizer steps that the trainer will take."""


@dataclass(frozen=True)
class CustomOptimizer:
    """Any Adam-like class by its `_target_`; all keys but ours go to it.

    Ours are `weight_decay_on`, `groups`, `layer_decay` and `resume`, which mean what they mean for
    Adam.
    """

    factory: functools.partial[Any]
    weight_decay_on: WeightDecayOn
    groups: list[GroupConfig]
    layer_decay: LayerDecayConfig
    resume: Resume


@dataclass(frozen=True)
class CustomScheduler:
    """A scheduler class, with the arguments it is called with."""

    factory: functools.partial[Any]
    interval: Interval | None
    frequency: int
    monitor: str
    count_skipped_steps: bool


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
        lightning_adam.config.errors.ConfigError: optimizer.lrr=1: no such field; ...
    """
    where = full_key(node, "optimizer")
    custom = factory_of(node, where, OURS)
    if custom is None:
        config = _adam(values_of(node, where), where)
        if config.fused and config.foreach:
            raise refusal(where, "foreach", True, "expected not both fused and foreach", None)
        return config, where
    factory, ours = custom
    if {entry.name for entry in fields(AdamConfig)} <= {*factory.keywords, *ours}:
        raise _merged(where, name_of(factory), "lightning_adam/optimizer")
    check_arguments(factory, where)
    config = _adam(ours, where)
    return CustomOptimizer(
        factory, config.weight_decay_on, config.groups, config.layer_decay, config.resume
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
    custom = factory_of(node, where, ours)
    if custom is not None:
        return _custom_scheduler(*custom, where), where
    values = values_of(node, where)
    name = values.get("name")
    kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else type(node)
    presets = {config: preset for preset, config in SCHEDULERS.items()}
    if kind in presets and str(name) in SCHEDULERS and name != presets[kind]:
        raise ConfigError(
            f"{where}.name={name}: expected {presets[kind]}, the shape of the fields beside it;"
            f" type lightning_adam/scheduler={name}"
        )
    if name == CustomSchedulerConfig.name:
        expected = "expected the class of a scheduler"
        raise refusal(where, "_target_", None, expected, "torch.optim.lr_scheduler.OneCycleLR")
    if name is None:
        raise ConfigError(
            f"{where}.name: expected one of {', '.join(SCHEDULERS)};"
            f" {type_instead(f'+{where}.name', 'cosine')}"
        )
    if str(name) not in SCHEDULERS:
        expected = f"expected one of {', '.join(SCHEDULERS)}"
        close = nearest(str(name), SCHEDULERS, 1)
        raise refusal(where, "name", name, expected, close[0] if close else "cosine")
    config = typed(values, SCHEDULERS[name], where)
    _check_either(config, where, "warmup_steps", "warmup_ratio")
    _check_either(config, where, "decay_steps", "decay_ratio")
    return config, where


def _adam(values: dict[str, Any], where: str) -> AdamConfig:
    """An Adam config with its groups and its layer decay, each checked under its own name."""
    values = dict(values)
    groups = values.pop("groups", [])
    layer_decay = values.pop("layer_decay", {})
    config = typed(values, AdamConfig, where)
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        example = [{"name": "head", "match": "net.head.*", "lr_scale": 10}]
        raise refusal(where, "groups", groups, "expected a list of groups", example)
    config.groups = [
        typed(group, GroupConfig, f"{where}.groups.{index}") for index, group in enumerate(groups)
    ]
    _check_group_names(config.groups, where)
    for index, group in enumerate(config.groups):
        _check_matcher(group, f"{where}.groups.{index}")
    if not isinstance(layer_decay, dict):
        raise refusal(where, "layer_decay", layer_decay, "expected pattern and rate", {})
    config.layer_decay = typed(layer_decay, LayerDecayConfig, f"{where}.layer_decay")
    _check_layer_decay(config.layer_decay, f"{where}.layer_decay")
    return config


def _custom_scheduler(
    factory: functools.partial[Any], ours: Mapping[str, Any], where: str
) -> CustomScheduler:
    if ours.get("name", CustomSchedulerConfig.name) != CustomSchedulerConfig.name:
        if str(ours["name"]) in SCHEDULERS:
            raise _merged(where, name_of(factory), "lightning_adam/scheduler")
        expected = "expected custom beside a _target_"
        raise refusal(where, "name", ours["name"], expected, CustomSchedulerConfig.name)
    check_arguments(factory, where)
    config = typed(ours, CustomSchedulerConfig, where)
    counts_steps = TOTAL_STEPS in factory.keywords.values()
    if counts_steps and config.interval is Interval.epoch:
        expected = f"expected step, for an argument is {TOTAL_STEPS}"
        raise refusal(where, "interval", config.interval, expected, Interval.step)
    interval = Interval.step if counts_steps else config.interval
    return CustomScheduler(
        factory, interval, config.frequency, config.monitor, config.count_skipped_steps
    )


def _merged(where: str, target: str, preset: str) -> ConfigError:
    """A `_target_` among the fields of a preset comes from a config group of the user's own."""
    return ConfigError(
        f"{where}._target_={target}: expected the fields of {preset} alone, but a node of your own"
        " is merged with them; take one of the two out of the defaults list, or, for a class of"
        f" your own, type {preset}=custom"
    )


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
        except (re.error, OverflowError, RecursionError) as error:
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
