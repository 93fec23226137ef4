"""Config → learning-rate scheduler."""

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
from lightning_adam.config.errors import ConfigError, ConfigPath, Placeholder, Source
from lightning_adam.config.parsing import target_name
from lightning_adam.config.schedule import (
    TOTAL_STEPS,
    CustomSchedulerConfig,
    Decay,
    InverseSqrtConfig,
    PlateauConfig,
    WarmupScheduleConfig,
    WSDConfig,
    parse_schedule,
)
from lightning_adam.optim.optimizers import call_target
from lightning_adam.optim.param_groups import peak_lr

ENDLESS = ("constant", "inverse_sqrt")
"""The schedules that do not depend on the total number of steps."""


DECAYS: dict[str, Callable[[float], float]] = {
    Decay.cosine.value: lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    Decay.linear.value: lambda progress: 1 - progress,
    Decay.sqrt.value: lambda progress: 1 - math.sqrt(progress),
}
"""How a decay falls from 1 to 0 with its progress."""


def _decay(
    decay: Callable[[float], float], step: float, length: float, min_lr_ratio: float
) -> float:
    """The factor at a step of a decay from 1 to `min_lr_ratio`."""
    progress = 1.0 if step >= length else max(0.0, step / length)
    return min_lr_ratio + (1 - min_lr_ratio) * decay(progress)


def constant(step: float, length: float) -> float:
    """The peak learning rate."""
    return 1.0


def linear(step: float, length: float, min_lr_ratio: float) -> float:
    """Linear decay."""
    return _decay(DECAYS["linear"], step, length, min_lr_ratio)


def cosine(step: float, length: float, min_lr_ratio: float) -> float:
    """Cosine decay."""
    return _decay(DECAYS["cosine"], step, length, min_lr_ratio)


def polynomial(step: float, length: float, power: float, min_lr_ratio: float) -> float:
    """Polynomial decay."""
    return _decay(lambda progress: (1 - progress) ** power, step, length, min_lr_ratio)


def inverse_sqrt(step: float, length: float, timescale: int) -> float:
    """Inverse square-root decay, which has no end."""
    return math.sqrt(timescale / (timescale + step))


def wsd(step: float, length: float, decay_steps: int, decay: str, min_lr_ratio: float) -> float:
    """The peak learning rate, then a decay over the last `decay_steps`."""
    return _decay(DECAYS[decay], step - (length - decay_steps), decay_steps, min_lr_ratio)


SHAPES: dict[str, Callable[..., float]] = {
    shape.__name__: shape for shape in (constant, linear, cosine, polynomial, inverse_sqrt, wsd)
}
"""The factor on the peak learning rate, from the steps since the warm-up and their number."""


@dataclass(frozen=True)
class Schedule:
    """The factor on the peak learning rate as a function of the optimizer step.

    Its fields are plain values: the scheduler saves them in a checkpoint and restores them.

    Example:
        >>> schedule = Schedule("linear", 2, total_steps=10, arguments={"min_lr_ratio": 0.0})
        >>> [schedule(step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.875, 0.75]
    """

    name: str
    warmup_steps: int
    total_steps: int | None
    arguments: dict[str, Any]

    def __call__(self, step: int) -> float:
        """Returns the factor after `step` optimizer steps."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        end = math.inf if self.total_steps is None else self.total_steps
        return SHAPES[self.name](
            step - self.warmup_steps, end - self.warmup_steps, **self.arguments
        )


def build_scheduler(optimizer: Optimizer, scheduler: Any, total_steps: int | None) -> LRScheduler:
    """Builds a learning-rate scheduler.

    Args:
        optimizer: The optimizer. The learning rate of each of its groups is that group's peak.
        scheduler: The scheduler config: a composed Hydra node, a dict, a dataclass, or any
            scheduler class by its `_target_` or as a `functools.partial`.
        total_steps: Optimizer steps of the run, None if it has no end. The config's own
            `total_steps` takes precedence.

    Returns:
        The scheduler. Step it after each optimizer step, or `plateau` with its metric after each
        validation. Groups that are added to the optimizer later are scheduled as well.

    Raises:
        ConfigError: If the schedule needs a number of steps and there is none, or if the warm-up is
            longer than the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=10.0)
        >>> config = {"name": "cosine", "warmup_steps": 2}
        >>> build_scheduler(optimizer, config, total_steps=10).get_last_lr()
        [0.0]
    """
    parsed = parse_schedule(scheduler)
    config, path = parsed.config, parsed.path
    built: LRScheduler
    if isinstance(config, CustomSchedulerConfig):
        built = _build_custom(optimizer, config, path, total_steps)
    elif isinstance(config, PlateauConfig):
        built = _build_plateau(optimizer, config)
    else:
        assert isinstance(config, WarmupScheduleConfig)
        built = LambdaLR(optimizer, _resolve(config, path, total_steps))
    if isinstance(built, ReduceLROnPlateau):
        for group in optimizer.param_groups:
            # Other schedulers store the peak themselves.
            group["initial_lr"] = group["lr"]
    add = optimizer.add_param_group

    def add_scheduled(group: dict[str, Any]) -> None:
        add(group)
        schedule_later_groups(built)

    optimizer.add_param_group = add_scheduled  # type: ignore[method-assign,assignment]
    return built


def _resolve(config: WarmupScheduleConfig, path: ConfigPath, total_steps: int | None) -> Schedule:
    """The schedule with all ratios turned into steps."""
    end = total_steps if config.total_steps is None else config.total_steps
    if end is None and (config.name not in ENDLESS or config.warmup_ratio):
        raise _no_end(path / "name", config.name, path / "total_steps")
    warmup_steps = config.warmup_steps or 0
    if config.warmup_ratio is not None and end is not None:
        warmup_steps = round(config.warmup_ratio * end)
    for steps in (total_steps, end):
        if steps is not None and warmup_steps > steps:
            problem = f"is longer than the run, which has {steps} optimizer steps"
            raise (path / "warmup_steps").invalid(warmup_steps, problem, steps // 10)
    own = {each.name for each in fields(config)} - {
        each.name for each in fields(WarmupScheduleConfig)
    }
    arguments = {name: getattr(config, name) for name in sorted(own)}
    if isinstance(config, InverseSqrtConfig):
        arguments["timescale"] = config.timescale or warmup_steps or 10_000
    if isinstance(config, WSDConfig) and end is not None:
        arguments = _wsd_arguments(config, path, warmup_steps, end)
    return Schedule(config.name, warmup_steps, end, arguments)


def _no_end(path: ConfigPath, value: str, steps: ConfigPath) -> ConfigError:
    return path.error(
        "needs the number of optimizer steps, and the run has no end",
        f"Set {steps.override(Placeholder('N'))}, or give the Trainer max_steps",
        value=value,
    )


def _wsd_arguments(
    config: WSDConfig, path: ConfigPath, warmup_steps: int, end: int
) -> dict[str, Any]:
    decay_steps = config.decay_steps
    if decay_steps is None:
        decay_steps = max(1, round((config.decay_ratio or 0.1) * end))
    remaining = end - warmup_steps
    if remaining == 0:
        problem = f"leaves none of the {end} steps for the decay"
        raise (path / "warmup_steps").invalid(warmup_steps, problem, end // 10)
    if decay_steps > remaining:
        problem = f"is more than the {remaining} steps after the warm-up"
        raise (path / "decay_steps").invalid(decay_steps, problem, max(1, remaining // 10))
    return {
        "decay_steps": decay_steps,
        "decay": config.decay.value,
        "min_lr_ratio": config.min_lr_ratio,
    }


def _build_plateau(optimizer: Optimizer, config: PlateauConfig) -> ReduceLROnPlateau:
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


def _build_custom(
    optimizer: Optimizer, config: CustomSchedulerConfig, path: ConfigPath, total_steps: int | None
) -> LRScheduler:
    """The class that the config names, with `total_steps` filled in."""
    target, keywords = target_name(config.factory), config.factory.keywords
    placeholders = [name for name, value in keywords.items() if value == TOTAL_STEPS]
    if placeholders and total_steps is None:
        argument = path / placeholders[0]
        raise _no_end(argument, TOTAL_STEPS, argument)
    betas = [group.get("betas") for group in optimizer.param_groups]
    peaks = [group["lr"] for group in optimizer.param_groups]
    factory = functools.partial(config.factory, **dict.fromkeys(placeholders, total_steps))
    built = call_target(factory, path, optimizer)
    if not isinstance(built, LRScheduler):
        problem = "must be a torch.optim.lr_scheduler.LRScheduler"
        example = "torch.optim.lr_scheduler.OneCycleLR"
        raise (path / "_target_").invalid(target, problem, example)
    if betas != [group.get("betas") for group in optimizer.param_groups]:
        # Hydra adds a key that is not in the config with a +.
        adding = "+" if path.source is Source.HYDRA else ""
        rank_zero_warn(
            f"{target} cycles the momentum and replaces betas={betas[0]}. To keep them, set"
            f" {adding}{(path / 'cycle_momentum').override(False)}"
        )
    after = [peak_lr(group) for group in optimizer.param_groups]
    if len(set(peaks)) > 1 and len(set(after)) == 1:
        rank_zero_warn(
            f"{target} sets the same learning rate for all groups, which discards the scales of"
            " groups and layer_decay. Give it a list with one learning rate per group."
        )
    return built


def schedule_later_groups(scheduler: LRScheduler) -> None:
    """Schedules the groups that were added to the optimizer after the scheduler was built.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = build_scheduler(optimizer, {"name": "linear"}, total_steps=2)
        >>> later = torch.zeros(1, requires_grad=True)
        >>> optimizer.param_groups.append({"params": [later], "lr": 0.1, "initial_lr": 0.1})
        >>> schedule_later_groups(scheduler)
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
    """Sets new peak learning rates, one per group, at the same point of the schedule.

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


def scheduler_settings(scheduler: LRScheduler) -> dict[str, Any]:
    """Returns the settings of a scheduler for a run's config, with all ratios resolved.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        >>> scheduler = build_scheduler(optimizer, {"name": "linear"}, total_steps=10)
        >>> scheduler_settings(scheduler)["total_steps"]
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
    parameters = inspect.signature(type(scheduler)).parameters
    resolved = {
        name: value
        for name, value in vars(scheduler).items()
        if name in parameters
        and name != "last_epoch"
        and isinstance(value, bool | int | float | str)
    }
    return {"name": type(scheduler).__name__, **resolved}
