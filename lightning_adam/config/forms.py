"""A config in any of its forms → plain values, checked by name, type and range.

A form is a composed Hydra node, typed or not, a dict, a dataclass instance, or the
`functools.partial` that Hydra makes of a node with `_target_` and `_partial_: true`.

Imports neither torch nor lightning.
"""

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lightning_adam.config.errors import ConfigError, nearest, refusal, unknown_field

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
    "histograms_every_n_steps": _integer(1, 500),
    "layer_depth": _integer(1, 2),
    "flight_recorder": _integer(1, 200),
}
"""The ranges of all fields, of whatever config: a name means the same everywhere."""


def values_of(node: Any, where: str) -> dict[str, Any]:
    """The node as a plain dict, its interpolations resolved in the config it belongs to.

    Args:
        node: A composed Hydra node, typed or not, a dict or a dataclass instance.
        where: The full name of its place.

    Raises:
        ConfigError: If it is none of these, or a value is missing or cannot be resolved.

    Example:
        >>> values_of(OmegaConf.create({"lr": 0.1, "eps": "${.lr}"}), "optimizer")
        {'lr': 0.1, 'eps': 0.1}
    """
    if isinstance(node, type) or not (is_dataclass(node) or isinstance(node, Mapping)):
        shown = " ".join(repr(node).split())
        raise ConfigError(
            f"{where}={shown[:80]}: expected a config node, a dict, a dataclass or a"
            f" functools.partial, such as {{'lr': 0.001}} or {{'name': 'cosine'}}"
        )
    try:
        if is_dataclass(node):
            node = {entry.name: getattr(node, entry.name) for entry in fields(node)}
        if not isinstance(node, DictConfig):
            node = OmegaConf.create({name: _number(value) for name, value in node.items()})
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _refused(error, where) from None
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def typed(given: Mapping[str, Any], schema: type[Config], where: str) -> Config:
    """The values as an instance of their dataclass: the names, the types and the ranges checked.

    Args:
        given: The values by field.
        schema: The dataclass.
        where: The full name of its place.

    Raises:
        ConfigError: If a name is none of the fields, or a value has the wrong type or range.

    Example:
        >>> from lightning_adam.config.schema import LayerDecayConfig
        >>> typed({"pattern": "net.*", "rate": "0.5"}, LayerDecayConfig, "optimizer.layer_decay")
        LayerDecayConfig(pattern='net.*', rate=0.5)
    """
    defaults = schema()
    names = [entry.name for entry in fields(defaults)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            raise unknown_field(where, name, given[name], names)
    node = OmegaConf.structured(schema)
    for name, value in given.items():
        try:
            node = OmegaConf.merge(node, {name: value})
        # omegaconf 2.4 raises a TypeError where a list stands for a dict.
        except (OmegaConfBaseException, TypeError) as error:
            instead = RANGES[name].instead if name in RANGES else getattr(defaults, name)
            words = re.search(r"expected one of \[(.*)\]", str(error))
            if words:
                close = nearest(str(value), words[1].split(", "), 1, cutoff=0.0)[0]
                instead = [close] if isinstance(getattr(defaults, name), list) else close
            raise refusal(where, name, value, _sentence(error), instead) from None
    try:
        config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise _refused(error, where) from None
    assert isinstance(config, schema)
    for name in names:
        _check_range(getattr(config, name), where, name, getattr(defaults, name))
    return config


def _check_range(value: Any, where: str, name: str, default: object) -> None:
    limits = RANGES.get(name, Range(lambda value: True, "", default))
    if isinstance(value, list) and any(isinstance(each, list | dict) for each in value):
        expected = "expected a list without lists in it"
    elif isinstance(value, int) and abs(value) >= 2**63:
        expected = "expected an integer below 2**63"
    elif value is not None and not limits.accepts(value):
        expected = limits.expected
    else:
        return
    raise refusal(where, name, value, expected, limits.instead)


def factory_of(
    node: Any, where: str, ours: Iterable[str]
) -> tuple[functools.partial[Any], dict[str, Any]] | None:
    """What a node with a `_target_` or a `functools.partial` calls, and the values that are ours.

    Args:
        node: Any form of a config.
        where: The full name of its place.
        ours: The keys that are not the target's.

    Returns:
        What to call, with its arguments, and our values; None for a node without a `_target_`.

    Raises:
        ConfigError: If the target cannot be imported.

    Example:
        >>> node = {"_target_": "fractions.Fraction", "denominator": 4, "groups": []}
        >>> factory, own = factory_of(node, "optimizer", ["groups"])
        >>> factory(3), own
        (Fraction(3, 4), {'groups': []})
    """
    if isinstance(node, functools.partial):
        factory = node
        own = {name: _plain(node.keywords[name]) for name in ours if name in node.keywords}
    elif isinstance(node, Mapping) and "_target_" in node:
        theirs = values_of(node, where)
        own = {name: theirs.pop(name) for name in ours if name in theirs}
        factory = _located(theirs, where)
    else:
        return None
    arguments = {name: _plain(value) for name, value in factory.keywords.items() if name not in own}
    return functools.partial(factory.func, *factory.args, **arguments), own


def _located(theirs: Mapping[str, Any], where: str) -> functools.partial[Any]:
    try:
        factory = instantiate({**theirs, "_partial_": True, "_convert_": "all"})
    except (HydraException, ImportError, AttributeError, TypeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"{where}._target_={theirs['_target_']}: expected something to import and call, but"
            f" {cause}; type {where}._target_=package.module.Class"
        ) from error
    assert isinstance(factory, functools.partial)
    return factory


def _number(value: Any) -> Any:
    """A scalar of numpy, as sweeps produce them, as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_arguments(factory: functools.partial[Any], where: str) -> None:
    """Refuses an argument that the target does not take, as far as its signature tells.

    Raises:
        ConfigError: If there is one.

    Example:
        >>> from fractions import Fraction
        >>> check_arguments(functools.partial(Fraction, denominator=4), "optimizer")
    """
    try:
        parameters = list(inspect.signature(factory.func).parameters.values())
    except (TypeError, ValueError):
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    # The first is what the target is built over: the parameters, or the optimizer.
    names = [parameter.name for parameter in parameters][1:]
    for name, value in factory.keywords.items():
        if name not in names:
            raise unknown_field(where, name, value, names)


def _refused(error: OmegaConfBaseException, where: str) -> ConfigError:
    """A value that is missing, or that OmegaConf cannot resolve or hold.

    OmegaConf's error is not raised as its cause: Hydra would print it below our sentence.
    """
    key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or ""))
    if not key.startswith(where):
        key = f"{where}.{key}".rstrip(".")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key}=???: expected a value; type {key}=VALUE")
    return ConfigError(f"{key}: expected a value, but {_sentence(error)}; type {key}=VALUE")


def _sentence(error: Exception) -> str:
    """OmegaConf's message without the lines that repeat key and type."""
    return str(error).partition("\n")[0]


def name_of(factory: functools.partial[Any]) -> str:
    """The target's name with its path, the shortest that leads to it.

    Example:
        >>> name_of(functools.partial(OmegaConf))
        'omegaconf.OmegaConf'
    """
    target: Any = factory.func
    name = getattr(target, "__qualname__", type(target).__qualname__)
    parts = str(target.__module__).split(".")
    paths = (".".join(parts[:length]) for length in range(1, len(parts)))
    for path in paths:
        if getattr(sys.modules.get(path), name, None) is target:
            return f"{path}.{name}"
    return f"{target.__module__}.{name}"
