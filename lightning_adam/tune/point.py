"""What is tuned: a point is one setting of Adam, and knows the overrides that bring it about."""

import math
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_adam.config.errors import ConfigError, format_value

OPTIMIZER_KEYS = {"lr", "weight_decay_on", "groups", "layer_decay", "resume"}
"""What makes a node an optimizer's config, `adam`, `adamw` or `custom`, wherever it stands."""
SCHEDULER_KEYS = {"name", "warmup_steps", "warmup_ratio", "total_steps"}
"""What makes a node the config of a schedule that warms up."""


@dataclass(frozen=True)
class Point:
    """Settings of Adam; None stands for what the optimizer or the schedule does not have.

    Example:
        >>> Point(lr=1e-3, betas=(0.9, 0.999)).with_values(lr=3e-4).lr
        0.0003
    """

    lr: float
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    decoupled_weight_decay: bool | None = None
    amsgrad: bool | None = None
    warmup_ratio: float | None = None
    warmup_steps: int | None = None

    def with_values(self, **values: Any) -> "Point":
        """The same with other values.

        Example:
            >>> Point(lr=1e-3, eps=1e-8).with_values(eps=1e-6).eps
            1e-06
        """
        return replace(self, **values)


@dataclass(frozen=True)
class Places:
    """Where the optimizer's and the schedule's config stand in the app's config.

    Attributes:
        optimizer: `optimizer`, `model.optimizer`.
        scheduler: `scheduler`; None without a schedule that can warm up.

    Example:
        >>> Places("model.optimizer").overrides(Point(1e-3), Point(3e-4))
        ['model.optimizer.lr=0.0003']
    """

    optimizer: str
    scheduler: str | None = None

    def overrides(self, start: Point, point: Point) -> list[str]:
        """What is typed to get from the app's own settings to a point.

        Args:
            start: The settings of the app's config.
            point: Those that are wanted.
        """
        typed = [
            f"{self.optimizer}.{name}={format_value(getattr(point, name))}"
            for name in (
                "lr",
                "betas",
                "eps",
                "weight_decay",
                "decoupled_weight_decay",
                "amsgrad",
            )
            if getattr(point, name) != getattr(start, name)
        ]
        typed += [
            f"{self.scheduler}.{name}={format_value(getattr(point, name))}"
            for name in ("warmup_steps", "warmup_ratio")
            if getattr(point, name) != getattr(start, name)
        ]
        return typed


def find_places(config: DictConfig, given: str | None) -> Places:
    """Where the configs of the groups `lightning_adam/optimizer` and `scheduler` stand.

    Args:
        config: The app's config, composed.
        given: The optimizer's place, if it was typed.

    Raises:
        ConfigError: If there is no optimizer's config, or more than one and none was typed.

    Example:
        >>> from lightning_adam.config.optimizer import AdamConfig
        >>> config = OmegaConf.create({"model": {"optimizer": OmegaConf.structured(AdamConfig)}})
        >>> find_places(config, None)
        Places(optimizer='model.optimizer', scheduler=None)
    """
    optimizers = _nodes_with(config, OPTIMIZER_KEYS)
    if given is not None and given not in optimizers:
        found = ", ".join(optimizers) or "none"
        raise ConfigError(
            f"hydra.sweeper.optimizer={given} is not the path of an optimizer's config, which are:"
            f" {found}",
            f"Use for example hydra.sweeper.optimizer={optimizers[0]}" if optimizers else "",
        )
    if not optimizers:
        raise ConfigError(
            "The config has no optimizer of the group lightning_adam/optimizer to tune",
            "Add it to the defaults list, for example `- lightning_adam/optimizer: adamw`",
        )
    if given is None and len(optimizers) > 1:
        raise ConfigError(
            f"The config has several optimizers: {', '.join(optimizers)}",
            f"Choose one, for example hydra.sweeper.optimizer={optimizers[0]}",
        )
    schedules = _nodes_with(config, SCHEDULER_KEYS)
    optimizer = given or optimizers[0]
    # Of several schedules, the one beside the optimizer; which of others is its own is not guessed.
    beside = [each for each in schedules if _parent(each) == _parent(optimizer)]
    nearest = beside if len(schedules) > 1 else schedules
    return Places(optimizer, nearest[0] if len(nearest) == 1 else None)


def read_point(config: DictConfig, places: Places) -> Point:
    """The settings that the app's config holds.

    Args:
        config: The app's config, composed.
        places: Where Adam's configs stand in it.

    Raises:
        ConfigError: If the learning rate is missing.

    Example:
        >>> from lightning_adam.config.optimizer import AdamConfig
        >>> config = OmegaConf.create({"optimizer": OmegaConf.structured(AdamConfig(lr=0.01))})
        >>> read_point(config, Places("optimizer")).lr
        0.01
    """
    node = OmegaConf.select(config, places.optimizer)
    if OmegaConf.is_missing(node, "lr") or node.lr is None:
        raise ConfigError(
            f"{places.optimizer}.lr is required as the start of the search",
            f"Use for example {places.optimizer}.lr=1e-3",
        )
    betas = node.get("betas")
    ratio, steps = None, None
    if places.scheduler is not None:
        schedule = OmegaConf.select(config, places.scheduler)
        # The share that steps are of the training is not known here.
        ratio, steps = schedule.warmup_ratio, schedule.warmup_steps
        if ratio is None and steps is None:
            ratio = 0.0
    return Point(
        lr=float(node.lr),
        betas=None if betas is None else (float(betas[0]), float(betas[1])),
        eps=node.get("eps"),
        weight_decay=node.get("weight_decay"),
        decoupled_weight_decay=node.get("decoupled_weight_decay"),
        amsgrad=node.get("amsgrad"),
        warmup_ratio=ratio,
        warmup_steps=steps,
    )


def rounded(value: float) -> float:
    """To three digits: what is typed in the end is short.

    Example:
        >>> rounded(0.00123456)
        0.00123
    """
    return float(f"{value:.3g}") if math.isfinite(value) else value


def _nodes_with(config: DictConfig, keys: set[str], prefix: str = "") -> list[str]:
    """The places of all mappings that have these keys."""
    found = []
    for name in map(str, config):
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        node = config[name]
        if isinstance(node, DictConfig):
            place = f"{prefix}{name}"
            if keys <= set(map(str, node)):
                found.append(place)
            else:
                found += _nodes_with(node, keys, f"{place}.")
    return found


def _parent(place: str) -> str:
    return place.rpartition(".")[0]
