"""Config → learning-rate scheduler: the shapes, and how long they last."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_adam._compat.torch import record_lrs
from lightning_adam.config.errors import ConfigError, refusal
from lightning_adam.config.forms import name_of
from lightning_adam.config.reading import TOTAL_STEPS, CustomScheduler, read_scheduler
from lightning_adam.config.schema import (
    Decay,
    InverseSqrtConfig,
    PlateauConfig,
    StepwiseConfig,
    WSDConfig,
)
from lightning_adam.optim.param_groups import peak_lr

UNTIMED = ("constant", "inverse_sqrt")
"""The shapes that need no end."""


def constant(step: float, length: float) -> float:
    """The peak.

    Example:
        >>> constant(3, 10)
        1.0
    """
    return 1.0


def linear(step: float, length: float, min_lr_ratio: float = 0.0) -> float:
    """A straight line down.

    Example:
        >>> linear(5, 10, min_lr_ratio=0.5)
        0.75
    """
    return _down_to(min_lr_ratio, 1 - _progress(step, length))


def cosine(step: float, length: float, min_lr_ratio: float = 0.0) -> float:
    """Half a cosine down.

    Example:
        >>> cosine(5, 10, min_lr_ratio=0.5)
        0.75
    """
    return _down_to(min_lr_ratio, (1 + math.cos(math.pi * _progress(step, length))) / 2)


def polynomial(step: float, length: float, power: float, min_lr_ratio: float) -> float:
    """A power of what is left.

    Example:
        >>> polynomial(5, 10, power=2.0, min_lr_ratio=0.0)
        0.25
    """
    return _down_to(min_lr_ratio, (1 - _progress(step, length)) ** power)


def inverse_sqrt(step: float, length: float, timescale: int) -> float:
    """One over a square root, without an end.

    Example:
        >>> inverse_sqrt(30, math.inf, timescale=10)
        0.5
    """
    return math.sqrt(timescale / (timescale + step))


def wsd(step: float, length: float, decay_steps: int, decay: str, min_lr_ratio: float) -> float:
    """The peak, and a way down in the last `decay_steps`.

    Example:
        >>> [wsd(step, 10, decay_steps=4, decay="linear", min_lr_ratio=0.0) for step in (6, 8, 10)]
        [1.0, 0.5, 0.0]
    """
    progress = _progress(step - (length - decay_steps), decay_steps)
    return _down_to(min_lr_ratio, DECAYS[decay](progress))


DECAYS: dict[str, Callable[[float], float]] = {
    Decay.cosine.value: lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    Decay.linear.value: lambda progress: 1 - progress,
    Decay.sqrt.value: lambda progress: 1 - math.sqrt(progress),
}
SHAPES: dict[str, Callable[..., float]] = {
    shape.__name__: shape for shape in (constant, linear, cosine, polynomial, inverse_sqrt, wsd)
}
"""The multiplier at a step after the warm-up, given the steps from there to the end."""


@dataclass(frozen=True)
class Schedule:
    """The multiplier of the peak learning rate at a step, with its settings resolved.

    All of it is plain: the scheduler saves it in a checkpoint and restores it.

    Example:
        >>> schedule = Schedule("linear", warmup_steps=2, total_steps=10, arguments={})
        >>> [schedule(step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.875, 0.75]
    """

    name: str
    warmup_steps: int
    total_steps: int | None
    arguments: dict[str, Any]

    def __call__(self, step: int) -> float:
        """The multiplier after `step` optimizer steps (0 before the first)."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        end = math.inf if self.total_steps is None else self.total_steps
        return SHAPES[self.name](
            step - self.warmup_steps, end - self.warmup_steps, **self.arguments
        )


def build_scheduler(optimizer: Optimizer, scheduler: Any, total_steps: int | None) -> LRScheduler:
    """Builds a learning-rate scheduler.

    Args:
        optimizer: Whose groups' learning rates are scheduled, each from its own peak.
        scheduler: The scheduler config: a composed Hydra node, a dict, a dataclass, or, with a
            `_target_` or as a `functools.partial`, any scheduler class.
        total_steps: Optimizer steps of the run, None if it has no end. The schedule is as long,
            unless the config's own `total_steps` says otherwise.

    Returns:
        The scheduler. The shapes are to be stepped once after each optimizer step, `plateau` with
        its metric after each validation. Groups that the optimizer gets later are scheduled too.

    Raises:
        ConfigError: If the shape or a ratio needs a length and there is none, or if the warm-up is
            longer than the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=10.0)
        >>> config = {"name": "cosine", "warmup_steps": 2}
        >>> build_scheduler(optimizer, config, total_steps=10).get_last_lr()
        [0.0]
    """
    config, where = read_scheduler(scheduler)
    built: LRScheduler
    if isinstance(config, CustomScheduler):
        built = _custom(optimizer, config, where, total_steps)
    elif isinstance(config, PlateauConfig):
        built = _plateau(optimizer, config)
    else:
        assert isinstance(config, StepwiseConfig)
        built = LambdaLR(optimizer, _schedule(config, where, total_steps))
    if isinstance(built, ReduceLROnPlateau):
        for group in optimizer.param_groups:
            # As the other schedulers do: else the peak is not known any more after a reduction.
            group["initial_lr"] = group["lr"]
    add = optimizer.add_param_group

    def add_scheduled(group: dict[str, Any]) -> None:
        add(group)
        cover_later_groups(built)

    optimizer.add_param_group = add_scheduled  # type: ignore[method-assign,assignment]
    return built


def _schedule(config: StepwiseConfig, where: str, total_steps: int | None) -> Schedule:
    end = total_steps if config.total_steps is None else config.total_steps
    if end is None and (config.name not in UNTIMED or config.warmup_ratio):
        raise ConfigError(
            f"{where}.name={config.name}: expected a run with an end, but the number of optimizer"
            f" steps is not known; type {where}.total_steps=N, or give the Trainer max_steps"
        )
    warmup_steps = config.warmup_steps or 0
    if config.warmup_ratio is not None and end is not None:
        warmup_steps = round(config.warmup_ratio * end)
    for steps in (total_steps, end):
        if steps is not None and warmup_steps > steps:
            expected = f"expected a warm-up within the {steps} optimizer steps of the run"
            raise refusal(where, "warmup_steps", warmup_steps, expected, steps // 10)
    own = {entry.name for entry in fields(config)} - {
        entry.name for entry in fields(StepwiseConfig)
    }
    arguments = {name: getattr(config, name) for name in sorted(own)}
    if isinstance(config, InverseSqrtConfig):
        arguments["timescale"] = config.timescale or warmup_steps or 10_000
    if isinstance(config, WSDConfig) and end is not None:
        arguments = _wsd_arguments(config, where, warmup_steps, end)
    return Schedule(config.name, warmup_steps, end, arguments)


def _wsd_arguments(config: WSDConfig, where: str, warmup_steps: int, end: int) -> dict[str, Any]:
    decay_steps = config.decay_steps
    if decay_steps is None:
        decay_steps = max(1, round((config.decay_ratio or 0.1) * end))
    room = end - warmup_steps
    if room == 0:
        expected = f"expected a warm-up that leaves some of the {end} steps for the way down"
        raise refusal(where, "warmup_steps", warmup_steps, expected, end // 10)
    if decay_steps > room:
        expected = f"expected a way down within the {room} steps after the warm-up"
        raise refusal(where, "decay_steps", decay_steps, expected, max(1, room // 10))
    return {
        "decay_steps": decay_steps,
        "decay": config.decay.value,
        "min_lr_ratio": config.min_lr_ratio,
    }


def _plateau(optimizer: Optimizer, config: PlateauConfig) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(
        optimizer,
        mode=config.mode.value,
        factor=config.factor,
        patience=config.patience,
        threshold=config.threshold,
        threshold_mode=config.threshold_mode.value,
        cooldown=config.cooldown,
        min_lr=[config.min_lr_ratio * group["lr"] for group in optimizer.param_groups],
    )


def _custom(
    optimizer: Optimizer, config: CustomScheduler, where: str, total_steps: int | None
) -> LRScheduler:
    """The class that the config names, told the number of steps where it asks for it."""
    target = name_of(config.factory)
    asking = [name for name, value in config.factory.keywords.items() if value == TOTAL_STEPS]
    if asking and total_steps is None:
        raise ConfigError(
            f"{where}.{asking[0]}={TOTAL_STEPS}: expected a run with an end, but the number of"
            f" optimizer steps is not known; type {where}.{asking[0]}=N, or give the Trainer"
            " max_steps"
        )
    betas = [group.get("betas") for group in optimizer.param_groups]
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        built = functools.partial(config.factory, **dict.fromkeys(asking, total_steps))(optimizer)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{where}._target_={target}: expected arguments that it takes, but {cause}; type"
            f" {where}.ARGUMENT=VALUE"
        ) from error
    if not isinstance(built, LRScheduler):
        expected = "expected a torch.optim.lr_scheduler.LRScheduler"
        instead = "torch.optim.lr_scheduler.OneCycleLR"
        raise refusal(where, "_target_", target, expected, instead)
    if betas != [group.get("betas") for group in optimizer.param_groups]:
        rank_zero_warn(
            f"{target} cycles the momentum: it trains with betas of its own, not with"
            f" {betas[0]}. To keep those, type +{where}.cycle_momentum=false"
        )
    after = [peak_lr(group) for group in optimizer.param_groups]
    if len(set(peaks)) > 1 and len(set(after)) == 1:
        rank_zero_warn(
            f"{target} gives all groups one learning rate: what groups and layer_decay scale is"
            " lost. Give it a list, one rate a group."
        )
    return built


def _progress(step: float, length: float) -> float:
    """The share of the way that is done, in [0, 1]."""
    return 1.0 if step >= length else max(0.0, step / length)


def _down_to(min_lr_ratio: float, left: float) -> float:
    return min_lr_ratio + (1 - min_lr_ratio) * left


def cover_later_groups(scheduler: LRScheduler) -> None:
    """Schedules the groups that the optimizer got after the scheduler was built.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = build_scheduler(optimizer, {"name": "linear"}, total_steps=2)
        >>> later = torch.zeros(1, requires_grad=True)
        >>> optimizer.param_groups.append({"params": [later], "lr": 0.1, "initial_lr": 0.1})
        >>> cover_later_groups(scheduler)
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.5, 0.05]
    """
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, ReduceLROnPlateau):
        for group in groups[len(scheduler.min_lrs) :]:
            scheduler.min_lrs.append(scheduler.min_lrs[0] * group["lr"] / groups[0]["lr"])
        return
    for group in groups[len(scheduler.base_lrs) :]:
        scheduler.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        if isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])


def set_peaks(optimizer: Optimizer, scheduler: LRScheduler | None, peaks: Sequence[float]) -> None:
    """Trains on with other peak learning rates, one a group, at the same point of the schedule.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = build_scheduler(optimizer, {"name": "linear"}, total_steps=2)
        >>> scheduler.step()
        >>> set_peaks(optimizer, scheduler, [0.1])
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """
    groups = optimizer.param_groups
    if scheduler is None:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak
        return
    last_lrs = scheduler.get_last_lr()
    for index, (group, peak, last_lr) in enumerate(zip(groups, peaks, last_lrs, strict=True)):
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.min_lrs[index] *= peak / group["initial_lr"]
        else:
            scheduler.base_lrs[index] = peak
        group["lr"] = peak * float(last_lr / group["initial_lr"])
        group["initial_lr"] = peak
    record_lrs(scheduler)


def settings(scheduler: LRScheduler) -> dict[str, Any]:
    """A scheduler as a run's config records it: with all that it resolved to.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        >>> settings(build_scheduler(optimizer, {"name": "linear"}, total_steps=10))["total_steps"]
        10
    """
    schedule = scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None
    if isinstance(schedule, Schedule):
        return {
            "name": schedule.name,
            "warmup_steps": schedule.warmup_steps,
            "total_steps": schedule.total_steps,
            **schedule.arguments,
        }
    asked = inspect.signature(type(scheduler)).parameters
    resolved = {
        name: value
        for name, value in vars(scheduler).items()
        if name in asked and name != "last_epoch" and isinstance(value, bool | int | float | str)
    }
    return {"name": type(scheduler).__name__, **resolved}
