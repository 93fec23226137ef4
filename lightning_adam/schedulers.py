"""Config → learning-rate scheduler: the shapes, and how long they last."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_adam.schema import ConfigError, SchedulerConfig, read_scheduler, refusal

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
}
"""What is left of the peak after a share of the way from the end of the warm-up to the end."""


@dataclass(frozen=True)
class Schedule:
    """The multiplier of the peak learning rate at a step, with its settings resolved.

    The scheduler saves these settings in a checkpoint and restores them.

    Example:
        >>> schedule = Schedule("linear", warmup_steps=2, total_steps=10, min_lr_ratio=0.0)
        >>> [schedule(step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.875, 0.75]
    """

    name: str
    warmup_steps: int
    total_steps: int | None
    min_lr_ratio: float

    def __call__(self, step: int) -> float:
        """The multiplier after `step` optimizer steps (0 before the first)."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = 0.0
        if self.total_steps is not None:
            length = max(1, self.total_steps - self.warmup_steps)
            progress = min(1.0, (step - self.warmup_steps) / length)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * SHAPES[self.name](progress)


def build_scheduler(optimizer: Optimizer, scheduler: Any, total_steps: int | None) -> LambdaLR:
    """Builds a schedule that is stepped once after each optimizer step.

    Args:
        optimizer: Whose groups' learning rates are scheduled, each from its own peak.
        scheduler: The scheduler config: a composed Hydra node, a dict, or a dataclass.
        total_steps: Optimizer steps of the run, None if it has no end. The schedule is as long,
            unless the config's own `total_steps` says otherwise.

    Returns:
        The scheduler.

    Raises:
        ConfigError: If the shape or `warmup_ratio` needs a length and there is none, or if the
            warm-up is longer than the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=10.0)
        >>> config = {"name": "cosine", "warmup_steps": 2}
        >>> build_scheduler(optimizer, config, total_steps=10).get_last_lr()
        [0.0]
    """
    config, where = read_scheduler(scheduler)
    schedule_steps = total_steps if config.total_steps is None else config.total_steps
    if schedule_steps is None and (config.name != "constant" or config.warmup_ratio):
        raise ConfigError(
            f"{where}.name={config.name}: expected a run with an end, but the number of optimizer"
            f" steps is not known; type {where}.total_steps=N, or give the Trainer max_steps"
        )
    warmup_steps = _warmup_steps(config, schedule_steps)
    for steps in (total_steps, schedule_steps):
        if steps is not None and warmup_steps > steps:
            expected = f"expected a warm-up within the {steps} optimizer steps of the run"
            raise refusal(where, "warmup_steps", warmup_steps, expected, steps // 10)
    min_lr_ratio = getattr(config, "min_lr_ratio", 0.0)
    return LambdaLR(optimizer, Schedule(config.name, warmup_steps, schedule_steps, min_lr_ratio))


def _warmup_steps(config: SchedulerConfig, schedule_steps: int | None) -> int:
    if config.warmup_ratio is not None and schedule_steps is not None:
        return round(config.warmup_ratio * schedule_steps)
    return config.warmup_steps or 0


def settings(scheduler: LRScheduler) -> dict[str, Any]:
    """A scheduler as a run's config records it: a schedule of ours with all that it resolved to.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        >>> settings(build_scheduler(optimizer, {"name": "linear"}, total_steps=10))["total_steps"]
        10
    """
    schedule = scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None
    if isinstance(schedule, Schedule):
        return asdict(schedule)
    return {"name": type(scheduler).__name__}
