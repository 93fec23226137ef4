"""The typed configs: what can be set, its default, and what a value must be.

Hydra composes the dataclasses of this file (`conf/lightning_adam/`), so an unknown key or a value
of the wrong type is refused before the job starts. What a type cannot say (a length, a range) is
checked by `read_optimizer`, `read_scheduler` and `read_monitor`, under the field's full name.

Imports neither torch nor lightning: this file is loaded by every Hydra app of the environment.
"""

import difflib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from hydra.errors import CompactHydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_adam._private.omegaconf import full_key


class ConfigError(ValueError, CompactHydraException):
    """A setting that cannot work: what was given, what was expected, what to type instead.

    Hydra prints a `CompactHydraException` as its message alone, without a traceback.
    """

    def __repr__(self) -> str:
        """The sentence alone: what Hydra quotes when `instantiate` meets the error."""
        return str(self)


class WeightDecayOn(str, Enum):
    """Which parameters weight decay pulls on."""

    matrices = "matrices"
    """Parameters of two or more dimensions that are neither embeddings nor normalisation."""
    all = "all"
    """Every parameter that is trained."""


class Scope(str, Enum):
    """A set of tensors that a statistic is given for."""

    model = "model"
    """All tensors of the optimizer together."""
    group = "group"
    """The tensors of one of `optimizer.param_groups`."""


@dataclass
class AdamConfig:
    """Adam and AdamW, in torch's own words; the presets `adam` and `adamw` differ in the decay.

    Example:
        >>> AdamConfig(lr=3e-4, betas=[0.9, 0.95]).eps
        1e-08
    """

    lr: float = 1e-3
    """Peak learning rate, above 0 (default: 1e-3)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and the second moment, each in [0, 1) (default: [0.9, 0.999])."""
    eps: float = 1e-8
    """Added to the denominator, above 0, and not 0 in the parameters' dtype (default: 1e-8)."""
    weight_decay: float = 0.0
    """Strength of weight decay, at least 0 (default: 0 for `adam`, 0.01 for `adamw`)."""
    amsgrad: bool = False
    """Divide by the largest second moment so far (Reddi et al. 2018) (default: false)."""
    maximize: bool = False
    """Ascend instead of descend (default: false)."""
    decoupled_weight_decay: bool = False
    """Shrink the weights (AdamW) instead of adding to the gradient (Adam with L2) (default: false
    for `adam`, true for `adamw`; Loshchilov & Hutter 2019)."""
    fused: bool | None = None
    """torch's fused kernel; null takes it wherever it works (default: null)."""
    foreach: bool | None = None
    """torch's multi-tensor implementation; null leaves the choice to us (default: null)."""
    capturable: bool = False
    """Safe to capture in a CUDA graph (default: false)."""
    weight_decay_on: WeightDecayOn = WeightDecayOn.matrices
    """Which parameters decay: `matrices` or `all` (default: matrices)."""


@dataclass
class SchedulerConfig:
    """What every schedule shares: a linear warm-up from 0, then the shape that `name` names."""

    name: str = MISSING
    """The shape."""
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up (default: null, no warm-up)."""
    warmup_ratio: float | None = None
    """The warm-up as a share of all steps, in [0, 1]; instead of `warmup_steps` (default: null)."""
    total_steps: int | None = None
    """Optimizer steps of the whole schedule (default: null, the steps the trainer will take)."""


@dataclass
class ConstantConfig(SchedulerConfig):
    """The peak learning rate throughout, after the warm-up.

    Example:
        >>> ConstantConfig(warmup_steps=100).name
        'constant'
    """

    name: str = "constant"


@dataclass
class LinearConfig(SchedulerConfig):
    """A straight line from the peak to `min_lr_ratio` of it.

    Example:
        >>> LinearConfig().min_lr_ratio
        0.0
    """

    name: str = "linear"
    min_lr_ratio: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1] (default: 0)."""


@dataclass
class CosineConfig(SchedulerConfig):
    """Half a cosine from the peak to `min_lr_ratio` of it (Loshchilov & Hutter 2017, no restarts).

    Example:
        >>> CosineConfig(warmup_ratio=0.05).warmup_ratio
        0.05
    """

    name: str = "cosine"
    min_lr_ratio: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1] (default: 0)."""


@dataclass
class MonitorConfig:
    """The arguments of `lightning_adam.AdamMonitor`.

    Example:
        >>> [scope.value for scope in MonitorConfig().scopes]
        ['model', 'group']
    """

    _target_: str = "lightning_adam.AdamMonitor"
    every_n_steps: int | None = None
    """Measure the first optimizer step and every n-th (default: null, the trainer's
    `log_every_n_steps`)."""
    scopes: list[Scope] = field(default_factory=lambda: [Scope.model, Scope.group])
    """What the statistics are given for (default: [model, group])."""


SCHEDULERS: dict[str, type[SchedulerConfig]] = {
    config.name: config for config in (ConstantConfig, LinearConfig, CosineConfig)
}

Config = TypeVar("Config")


def refusal(where: str, name: str, value: object, expected: str, instead: object) -> ConfigError:
    """The one form of a refusal: field and value given, what was expected, what to type.

    Example:
        >>> print(refusal("optimizer", "lr", -1.0, "expected a number above 0", 0.001))
        optimizer.lr=-1.0: expected a number above 0; type for example optimizer.lr=0.001
    """
    typed = shlex.quote(f"{where}.{name}={_as_typed(instead)}")
    return ConfigError(f"{where}.{name}={_as_typed(value)}: {expected}; type for example {typed}")


def read_optimizer(node: Any) -> tuple[AdamConfig, str]:
    """Checks an optimizer config in any of its forms.

    Args:
        node: A composed Hydra node, a dict, or an `AdamConfig`.

    Returns:
        The config, and the full name of its place (`model.optimizer`).

    Raises:
        ConfigError: If a key is unknown or a value is out of range.

    Example:
        >>> read_optimizer({"lr": 0.01, "betas": [0.9, 0.95]})[0].betas
        [0.9, 0.95]
        >>> read_optimizer({"lrr": 0.01})
        Traceback (most recent call last):
        lightning_adam.schema.ConfigError: optimizer.lrr: no such field; did you mean optimizer.lr?
    """
    where = full_key(node, "optimizer")
    config = _typed(_values(node, where), AdamConfig, where)
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise refusal(where, "lr", config.lr, "expected a finite number above 0", 0.001)
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise refusal(where, "betas", config.betas, "expected two numbers in [0, 1)", [0.9, 0.999])
    if not (math.isfinite(config.eps) and config.eps > 0):
        raise refusal(where, "eps", config.eps, "expected a finite number above 0", 1e-8)
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        expected = "expected a number of at least 0"
        raise refusal(where, "weight_decay", config.weight_decay, expected, 0.01)
    if config.fused and config.foreach:
        expected = "expected not both fused and foreach"
        raise refusal(where, "foreach", True, expected, None)
    return config, where


def read_scheduler(node: Any) -> tuple[SchedulerConfig, str]:
    """Checks a scheduler config in any of its forms; `name` says which shape it is.

    Args:
        node: A composed Hydra node, a dict, or one of the scheduler dataclasses.

    Returns:
        The config, and the full name of its place.

    Raises:
        ConfigError: If the name or a key is unknown, or a value is out of range.

    Example:
        >>> read_scheduler({"name": "cosine", "warmup_steps": 10})[0].warmup_steps
        10
    """
    where = full_key(node, "scheduler")
    values = _values(node, where)
    if values.get("name") not in SCHEDULERS:
        expected = f"expected one of {', '.join(SCHEDULERS)}"
        raise refusal(where, "name", values.get("name"), expected, "cosine")
    config = _typed(values, SCHEDULERS[values["name"]], where)
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        expected = "expected warmup_steps or warmup_ratio, not both"
        raise refusal(where, "warmup_ratio", config.warmup_ratio, expected, None)
    if config.warmup_steps is not None and config.warmup_steps < 0:
        expected = "expected an integer of at least 0"
        raise refusal(where, "warmup_steps", config.warmup_steps, expected, 100)
    if config.total_steps is not None and config.total_steps < 1:
        expected = "expected an integer of at least 1"
        raise refusal(where, "total_steps", config.total_steps, expected, 1000)
    for name, instead in (("warmup_ratio", 0.05), ("min_lr_ratio", 0.1)):
        ratio = getattr(config, name, None)
        if ratio is not None and not 0 <= ratio <= 1:
            raise refusal(where, name, ratio, "expected a number in [0, 1]", instead)
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
    config = _typed(_values(node, where), MonitorConfig, where)
    if config.every_n_steps is not None and config.every_n_steps < 1:
        expected = "expected an integer of at least 1"
        raise refusal(where, "every_n_steps", config.every_n_steps, expected, 50)
    return config


def _values(node: Any, where: str) -> dict[str, Any]:
    """The node as a plain dict, its interpolations resolved in the config it belongs to."""
    if isinstance(node, type) or not (is_dataclass(node) or isinstance(node, Mapping)):
        raise ConfigError(f"{where}={node!r}: expected a config node, a dict or a dataclass")
    try:
        if not isinstance(node, DictConfig):
            node = (
                OmegaConf.structured(node) if is_dataclass(node) else OmegaConf.create(dict(node))
            )
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_sentence(error)}") from error
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _typed(values: dict[str, Any], schema: type[Config], where: str) -> Config:
    """The values as an instance of their dataclass, converted and checked by OmegaConf."""
    defaults = schema()
    names = [entry.name for entry in fields(defaults)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ConfigError(f"{where}.{name}: no such field; {_nearest(name, names, where)}")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        name = str(error.full_key).partition("[")[0]
        instead = getattr(defaults, name)
        raise refusal(where, name, values[name], _sentence(error), instead) from error
    assert isinstance(typed, schema)
    return typed


def _nearest(name: str, names: list[str], where: str) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {where}.{close[0]}?"
    return f"the fields are {', '.join(names)}"


def _sentence(error: OmegaConfBaseException) -> str:
    """OmegaConf's message without the lines that repeat key and type."""
    return str(error).partition("\n")[0]


def _as_typed(value: object) -> str:
    """A value as it is typed on Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    return str(value)
