"""Builds learning-rate schedulers. Their state is the step count; all else is recomputed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    LRScheduler,
    ReduceLROnPlateau,
)

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import ParsedConfig
from lightning_adam.config.schedule import (
    CustomSchedulerConfig,
    PlateauConfig,
    ScheduleConfig,
    StepScheduleConfig,
    parse_schedule,
)
from lightning_adam.optim.console import log_info
from lightning_adam.optim.custom_scheduler import (
    PLATEAU_PROGRESS,
    CustomSchedule,
    arguments_of,
    continue_plateau,
    copy_lr,
    log_changes,
    set_lr,
)
from lightning_adam.optim.param_groups import LR_SCALE
from lightning_adam.optim.shapes import Curve, RunLength, curve
from lightning_adam.optim.steps import StepCounter, steps_taken

PLATEAU_EPS = 1e-8
"""Smaller reductions are ignored (torch ReduceLROnPlateau, eps)."""


class Schedule(LRScheduler):
    """Learning rates that are a function of the step: a group's peak times a factor.

    The state is the number of steps, and for `plateau` the progress of its metric. With another
    length, peak or shape, the schedule continues at the same step of the new curve.

    Args:
        optimizer: The optimizer. The learning rate of each group is that group's peak.
        config: The schedule.
        path: Its path.
        length: The length of the run.
    """

    def __init__(
        self, optimizer: Optimizer, config: StepScheduleConfig, path: ConfigPath, length: RunLength
    ) -> None:
        # LRScheduler's constructor would take the first step and patch the optimizer.
        self.optimizer = optimizer
        self.last_epoch = 0
        self.interval = ""
        self.counter: StepCounter | None = None
        self.length = length
        self.path = path
        self.plateau: ReduceLROnPlateau | None = None
        self._config = config
        self._reductions = 0
        for group in optimizer.param_groups:
            group["initial_lr"] = copy_lr(group["lr"])
        self.curve = self._new_curve()
        if isinstance(config, PlateauConfig):
            self.plateau = _plateau(config)
        self.apply()

    @property
    def position(self) -> int:
        """Number of steps that the schedule took."""
        return self.last_epoch

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with all ratios resolved."""
        if not isinstance(self._config, PlateauConfig):
            return self.curve.settings
        names = ("monitor", "mode", "factor", "patience", "threshold", "threshold_mode", "cooldown")
        own = {name: getattr(self._config, name) for name in names}
        own = {name: str(value) if isinstance(value, str) else value for name, value in own.items()}
        return {**self.curve.settings, **own}

    def step(self, metrics: Any = None) -> None:
        """Advances the schedule, unless the optimizer's step was skipped.

        Args:
            metrics: The metric of `plateau`, to compare instead of advancing (default: None).
        """
        if self.plateau is not None and metrics is not None:
            if self.last_epoch >= self.curve.warmup_steps:
                before = self.plateau.get_last_lr()
                self.plateau.step(metrics)
                self._reductions += self.plateau.get_last_lr() != before
        elif self.counter is None or self.counter.has_advanced():
            self.last_epoch += 1
        else:
            return
        self.apply()

    def apply(self) -> None:
        """Sets the learning rates of all groups, including groups that were added later."""
        factor = self.curve(self.last_epoch)
        for group in self.optimizer.param_groups:
            peak = group.setdefault("initial_lr", copy_lr(group["lr"]))
            set_lr(group, "lr", self._reduced_peak(peak) * factor)

    def set_length(self, length: RunLength) -> None:
        """Continues at the same step of the curve of another length."""
        self.length = length
        self.curve = self._new_curve()
        self.apply()

    def set_peaks(self, peaks: Sequence[float]) -> None:
        """Continues at the same step with other peaks, one per group."""
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            set_lr(group, "initial_lr", peak)
        self.set_length(self.length)

    def go_to(self, step: int) -> None:
        """Continues at a step, with the peaks that the groups have now."""
        self.last_epoch = step
        if self.counter is not None:
            self.counter.restart()
        self.set_length(self.length)

    def resume_at(self, steps: int) -> None:
        """Continues at its own step, or without one at `steps`, after a state was loaded."""
        self.go_to(self.position or steps)

    def get_last_lr(self) -> list[Any]:
        """Returns the learning rates of the groups."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns the step count, the metrics of `plateau`, and the settings."""
        state: dict[str, Any] = {"last_epoch": self.last_epoch, "settings": self.settings}
        state["interval"] = self.interval
        if self.plateau is not None:
            state["plateau"] = {key: getattr(self.plateau, key) for key in PLATEAU_PROGRESS}
            state["plateau"]["reductions"] = self._reductions
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the checkpoint's step, or at the optimizer's if its units differ."""
        saved, steps = state_dict.get("settings"), int(state_dict["last_epoch"])
        if state_dict.get("interval") != self.interval:
            # The checkpoint may have counted epochs.
            steps = self.position or steps_taken(self.optimizer) or steps
        self.go_to(steps)
        if saved:
            log_changes(self.path, self.settings, saved)
        elif saved is None:
            log_info(f"resuming: {self.path.name} continues at step {self.last_epoch}")
        if self.plateau is not None and "plateau" in state_dict:
            progress = state_dict["plateau"]
            continue_plateau(self.plateau, progress, (saved or {}).get("mode"))
            self._reductions = progress["reductions"]
            self.apply()

    def _reduced_peak(self, peak: Any) -> Any:
        """Returns a peak after the reductions of `plateau`, with the arithmetic of torch."""
        if not isinstance(self._config, PlateauConfig):
            return peak
        floor = peak * self.curve.arguments["min_lr_ratio"]
        for _ in range(self._reductions):
            lower = max(peak * self._config.factor, floor)
            if peak - lower <= PLATEAU_EPS:
                break
            peak = lower
        return peak

    def _new_curve(self) -> Curve:
        first = self.optimizer.param_groups[0]
        peak = float(first["initial_lr"]) / first.get(LR_SCALE, 1.0)
        return curve(self._config, self.path, self.length, peak)


AnySchedule = Schedule | CustomSchedule


def build_scheduler(
    optimizer: Optimizer, scheduler: Any, total_steps: int | None, epoch_steps: float | None = None
) -> AnySchedule:
    """Builds a learning-rate scheduler.

    Args:
        optimizer: The optimizer. The learning rate of each of its groups is that group's peak.
        scheduler: The scheduler config: a composed Hydra node, a dict, a dataclass, or any
            scheduler class by its `_target_` or as a `functools.partial`.
        total_steps: Optimizer steps of the run; None if it has no end. The config's `total_steps`
            takes precedence.
        epoch_steps: Optimizer steps of an epoch, for settings in epochs (default: None).

    Returns:
        The scheduler. Call its `step()` after each optimizer step, and for `plateau` also
        `step(metric)` after each validation. Groups that are added to the optimizer later are
        scheduled as well.

    Raises:
        ConfigError: If the schedule needs a number of steps that is unknown, or its class does not
            accept the arguments.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=10.0)
        >>> config = {"name": "cosine", "warmup_steps": 1}
        >>> build_scheduler(optimizer, config, total_steps=10).get_last_lr()
        [5.0]
    """
    return build_schedule(optimizer, parse_schedule(scheduler), RunLength(total_steps, epoch_steps))


def build_schedule(
    optimizer: Optimizer, parsed: ParsedConfig[ScheduleConfig], length: RunLength
) -> AnySchedule:
    """Builds a learning-rate scheduler for the length of a run; see `build_scheduler`."""
    config, path = parsed.config, parsed.path
    if isinstance(config, CustomSchedulerConfig):
        return CustomSchedule.create(optimizer, config, path, length)
    assert isinstance(config, StepScheduleConfig)
    return Schedule(optimizer, config, path, length)


def set_peak(optimizer: Optimizer, schedule: AnySchedule | None, lr: float) -> None:
    """Sets the optimizer's peak learning rate, and scales those of its groups with it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = build_scheduler(optimizer, {"name": "linear"}, total_steps=2)
        >>> scheduler.step()
        >>> set_peak(optimizer, scheduler, 0.1)
        >>> scheduler.get_last_lr()
        [0.05]
    """
    optimizer.defaults["lr"] = lr
    groups = optimizer.param_groups
    peaks = [lr * group.get(LR_SCALE, 1.0) for group in groups]
    if schedule is not None:
        schedule.set_peaks(peaks)
        return
    for group, peak in zip(groups, peaks, strict=True):
        set_lr(group, "lr", peak)


def scheduler_settings(scheduler: LRScheduler) -> dict[str, Any]:
    """Returns the settings of a scheduler for a run's config, with all ratios resolved.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        >>> scheduler = build_scheduler(optimizer, {"name": "linear"}, total_steps=10)
        >>> scheduler_settings(scheduler)["total_steps"]
        10
    """
    if isinstance(scheduler, Schedule | CustomSchedule):
        return scheduler.settings
    return arguments_of(scheduler, type(scheduler))


def _plateau(config: PlateauConfig) -> ReduceLROnPlateau:
    """Returns torch's scheduler, with a learning rate that can fall without end."""
    return ReduceLROnPlateau(
        SGD([torch.zeros(1)], lr=1e300),
        mode=config.mode.value,
        factor=config.factor,
        patience=config.patience,
        threshold=config.threshold,
        threshold_mode=config.threshold_mode.value,
        cooldown=config.cooldown,
        eps=0.0,
    )
