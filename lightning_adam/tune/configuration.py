"""The tuned hyperparameters, and their paths in the app's config."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lightning_adam.config.errors import ConfigError, format_value

OPTIMIZER_KEYS = {"lr", "weight_decay_on", "groups", "layer_decay", "resume"}
"""Keys that identify a node as a config of `lightning_adam/optimizer`."""
SCHEDULER_KEYS = {"name", "warmup_steps", "warmup_ratio", "total_steps"}
"""Keys that identify a node as a config of `lightning_adam/scheduler` with a warm-up."""
DECOUPLED = {"AdamW", "NAdamW", "RAdamW"}
"""Optimizers that always decouple the weight decay, so they have no argument for it."""


@dataclass(frozen=True)
class Configuration:
    """Hyperparameters of Adam and its schedule; None for those that the app does not have."""

    lr: float
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    decoupled_weight_decay: bool | None = None
    amsgrad: bool | None = None
    warmup_ratio: float | None = None
    warmup_steps: int | None = None

    def changes(self, other: "Configuration") -> dict[str, Any]:
        """Returns the hyperparameters of another configuration that differ from this one.

        Example:
            >>> Configuration(1e-3).changes(Configuration(3e-4))
            {'lr': 0.0003}
        """
        return {
            each.name: getattr(other, each.name)
            for each in fields(self)
            if getattr(self, each.name) != getattr(other, each.name)
        }


@dataclass(frozen=True)
class ConfigPaths:
    """Paths of the optimizer and the schedule in the app's config.

    Attributes:
        optimizer: Path of the optimizer, such as `model.optimizer`.
        scheduler: Path of the schedule; None without one that can warm up.
        absent: Arguments of the optimizer that its node does not set (default: none).

    Example:
        >>> paths = ConfigPaths("model.optimizer", absent=frozenset({"betas"}))
        >>> paths.overrides(Configuration(1e-3), Configuration(1e-3, (0.9, 0.99)))
        ['++model.optimizer.betas=[0.9,0.99]']
    """

    optimizer: str
    scheduler: str | None = None
    absent: frozenset[str] = frozenset()

    def values(self, start: Configuration, configuration: Configuration) -> dict[str, Any]:
        """Returns the values to set in the app's config, by their paths.

        Args:
            start: The configuration of the app.
            configuration: The configuration to apply.
        """
        return {
            f"{self.scheduler if name.startswith('warmup') else self.optimizer}.{name}": value
            for name, value in start.changes(configuration).items()
        }

    def overrides(self, start: Configuration, configuration: Configuration) -> list[str]:
        """Returns the same values as overrides of Hydra."""
        return [
            f"{'++' if path.rpartition('.')[2] in self.absent else ''}{path}={format_value(value)}"
            for path, value in self.values(start, configuration).items()
        ]


def find_paths(config: DictConfig, given: str | None) -> ConfigPaths:
    """Finds the configs of the optimizer and the schedule.

    An optimizer is a node of `lightning_adam/optimizer`, or one with an Adam-like `_target_`, such
    as `torch.optim.Adam`, and `_partial_: true`.

    Args:
        config: The app's composed config.
        given: The optimizer's path; None if the user has not set it.

    Raises:
        ConfigError: If there is no optimizer, or if there are several and `given` is None.

    Example:
        >>> config = OmegaConf.create(
        ...     {"model": {"optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3}}}
        ... )
        >>> find_paths(config, None).optimizer
        'model.optimizer'
    """
    nodes = _nodes(config)
    optimizers = [path for path, node in nodes.items() if _is_adam(node)]
    if given is not None and given not in optimizers:
        raise ConfigError(
            f"hydra.sweeper.optimizer={given} is not the path of an Adam's config; those are:"
            f" {', '.join(optimizers) or 'none'}",
            f"Use for example hydra.sweeper.optimizer={optimizers[0]}" if optimizers else "",
        )
    if not optimizers:
        raise _no_optimizer(nodes)
    if given is None and len(optimizers) > 1:
        raise ConfigError(
            f"The config has several optimizers: {', '.join(optimizers)}",
            f"Choose one, for example hydra.sweeper.optimizer={optimizers[0]}",
        )
    optimizer = given or optimizers[0]
    schedules = [path for path, node in nodes.items() if set(map(str, node)) >= SCHEDULER_KEYS]
    # Of several schedules, use only the one next to the optimizer.
    siblings = [each for each in schedules if _parent(each) == _parent(optimizer)]
    candidates = siblings if len(schedules) > 1 else schedules
    scheduler = candidates[0] if len(candidates) == 1 else None
    absent = frozenset(_arguments(nodes[optimizer])) - set(map(str, nodes[optimizer]))
    return ConfigPaths(optimizer, scheduler, absent)


def read_configuration(config: DictConfig, paths: ConfigPaths) -> Configuration:
    """Returns the hyperparameters in the app's config.

    Args:
        config: The app's composed config.
        paths: Paths of the optimizer and the schedule.

    Raises:
        ConfigError: If the learning rate is missing.

    Example:
        >>> from lightning_adam.config.optimizer import AdamConfig
        >>> config = OmegaConf.create({"optimizer": OmegaConf.structured(AdamConfig(lr=0.01))})
        >>> read_configuration(config, ConfigPaths("optimizer")).lr
        0.01
    """
    node = OmegaConf.select(config, paths.optimizer)
    present = {str(name) for name in node if not OmegaConf.is_missing(node, str(name))}
    values = {**_arguments(node), **{name: node[name] for name in present}}
    if not isinstance(values.get("lr"), int | float):
        raise ConfigError(
            f"{paths.optimizer}.lr is required as the start of the search",
            f"Use for example {paths.optimizer}.lr=1e-3",
        )
    target = str(values.get("_target_", "")).rpartition(".")[2]
    if target in DECOUPLED:
        values["decoupled_weight_decay"] = True
    betas = values.get("betas")
    ratio, steps = None, None
    if paths.scheduler is not None:
        schedule = OmegaConf.select(config, paths.scheduler)
        # warmup_steps stays: the length of the run is unknown before the first one.
        ratio, steps = schedule.warmup_ratio, schedule.warmup_steps
        if ratio is None and steps is None:
            ratio = 0.0
    return Configuration(
        lr=float(values["lr"]),
        betas=None if betas is None else (float(betas[0]), float(betas[1])),
        eps=values.get("eps"),
        weight_decay=values.get("weight_decay"),
        decoupled_weight_decay=values.get("decoupled_weight_decay"),
        amsgrad=values.get("amsgrad"),
        warmup_ratio=ratio,
        warmup_steps=steps,
    )


def _nodes(config: DictConfig, prefix: str = "") -> dict[str, DictConfig]:
    """Returns all mappings of a config by their paths."""
    found = {}
    for name in map(str, config):
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        node = config[name]
        if isinstance(node, DictConfig):
            found[f"{prefix}{name}"] = node
            found |= _nodes(node, f"{prefix}{name}.")
    return found


def _is_adam(node: Mapping[Any, Any]) -> bool:
    return set(map(str, node)) >= OPTIMIZER_KEYS or bool(_arguments(node))


def _arguments(node: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the tuned arguments of a node's target, with their defaults.

    Empty if the target is not Adam-like, that is, has no betas.
    """
    target = node.get("_target_")
    if not isinstance(target, str) or "adam" not in target.lower():
        return {}
    try:
        parameters = inspect.signature(get_class(target)).parameters
    except Exception:
        # The app itself reports the error.
        return {}
    if "betas" not in parameters:
        return {}
    names = {each.name for each in fields(Configuration)} & set(parameters)
    return {
        name: parameters[name].default
        for name in names
        if parameters[name].default is not inspect.Parameter.empty
    }


def _no_optimizer(nodes: Mapping[str, DictConfig]) -> ConfigError:
    others = [path for path in nodes if path.rpartition(".")[2].startswith("optim")]
    package = f"@{others[0]}" if others else ""
    found = f"; {others[0]} is another optimizer" if others else ""
    return ConfigError(
        f"The config has no Adam to tune{found}",
        f"Add it to the defaults list, for example `- lightning_adam/optimizer{package}: adamw`",
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
