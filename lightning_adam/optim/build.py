"""Builds the optimizer and the schedule that `configure_optimizers` returns."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import (
    attached_trainer,
    either,
    epochs_done,
    parameter_root,
    unscale_before_clipping,
)
from lightning_adam._compat.torch import configure_amp_unscaling
from lightning_adam.config.errors import ConfigError, ConfigPath
from lightning_adam.config.optimizer import parse_optimizer
from lightning_adam.config.parsing import ParsedConfig
from lightning_adam.config.schedule import (
    CustomSchedulerConfig,
    PlateauConfig,
    ScheduleConfig,
    SchedulerInterval,
    parse_schedule,
)
from lightning_adam.optim import resume
from lightning_adam.optim.console import log_info
from lightning_adam.optim.length import run_length
from lightning_adam.optim.loop import ScheduleCallback, ScheduledOptimizer
from lightning_adam.optim.optimizers import build_optimizer, plan_of
from lightning_adam.optim.schedulers import (
    AnySchedule,
    Schedule,
    build_schedule,
    scheduler_settings,
    set_peak,
)
from lightning_adam.optim.shapes import RunLength
from lightning_adam.optim.steps import StepCounter, steps_taken


@dataclass
class AdamSetup:
    """The optimizer and the schedule of a module."""

    optimizer: Optimizer
    schedule: AnySchedule | None = None
    lr_scheduler_options: dict[str, Any] = field(default_factory=dict)
    """When Lightning steps the schedule, and with which metric."""
    entry: ScheduledOptimizer | None = None
    """Their entry in the trainer's `ScheduleCallback`; None without a trainer."""

    def set_peak(self, lr: float) -> None:
        """Sets the optimizer's peak learning rate, and scales those of the groups with it."""
        if self.entry is not None:
            self.entry.set_peak(lr)
        else:
            set_peak(self.optimizer, self.schedule, lr)

    def as_lightning(self) -> dict[str, Any]:
        """Returns the result of `configure_optimizers`."""
        if self.schedule is None:
            return {"optimizer": self.optimizer}
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": self.schedule, **self.lr_scheduler_options},
        }


def build_adam(
    module: nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    total_steps: int | None = None,
    *,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """Builds the result of `configure_optimizers`, for modules without `AdamMixin`.

    Args:
        module: The module to train.
        optimizer: The optimizer config.
        scheduler: The scheduler config (default: None, a constant learning rate).
        total_steps: Optimizer steps of the run (default: None, the steps of the trainer).
        trainer: The trainer, which determines the length of the schedule and when it steps
            (default: None, that of a LightningModule).

    Returns:
        Lightning's dict of the optimizer and, if configured, the scheduler. For two optimizers,
        return a tuple of two such dicts.

    Raises:
        ConfigError: If a setting is invalid.

    Example:
        >>> config = build_adam(nn.Linear(3, 4), {"lr": 0.01}, {"name": "cosine"}, 100)
        >>> config["lr_scheduler"]["interval"]
        'step'
    """
    return build(module, optimizer, scheduler, total_steps, trainer).as_lightning()


def build(
    module: nn.Module,
    optimizer: Any,
    scheduler: Any,
    total_steps: int | None,
    trainer: Trainer | None,
) -> AdamSetup:
    """Builds the optimizer and the schedule; see `build_adam`."""
    if trainer is None and isinstance(module, either("LightningModule")):
        trainer = attached_trainer(module)
    if trainer is not None and trainer.lightning_module is None:
        raise ConfigError(
            "build_adam was given a Trainer that is not fitting a module",
            "Call it in configure_optimizers, with trainer=self.trainer",
        )
    parsed = parse_optimizer(optimizer)
    length = RunLength(total_steps)
    has_length_of_run = total_steps is None and trainer is not None
    if has_length_of_run and trainer is not None and scheduler is not None:
        # This sets up the data. Its warnings come before the table of the groups.
        length = run_length(trainer)
    root = module
    if trainer is not None and isinstance(module, either("LightningModule")):
        root = parameter_root(trainer, module)
    built = AdamSetup(build_optimizer(module, parsed, root=root))
    names = plan_of(built.optimizer).names
    resume.attach(built.optimizer, names, parsed.config.resume, parsed.path)
    if trainer is not None:
        # The GradScaler unscales gradients before hooks see and clip them.
        configure_amp_unscaling(built.optimizer, by_optimizer=False)
        if not trainer.lightning_module.automatic_optimization:
            unscale_before_clipping(trainer)
    if scheduler is not None:
        _add_schedule(built, parse_schedule(scheduler), length, has_length_of_run, trainer)
    elif trainer is not None:
        path = ConfigPath("scheduler", source=parsed.path.source)
        built.entry = ScheduledOptimizer(trainer, built.optimizer, None, path, None, False, False)
    if trainer is not None and built.entry is not None:
        ScheduleCallback.add(trainer, built.entry)
    return built


def _add_schedule(
    built: AdamSetup,
    parsed: ParsedConfig[ScheduleConfig],
    length: RunLength,
    has_length_of_run: bool,
    trainer: Trainer | None,
) -> None:
    optimizer, config, path = built.optimizer, parsed.config, parsed.path
    schedule = build_schedule(optimizer, parsed, length)
    built.schedule = schedule
    is_stepped_by_lightning = (
        trainer is not None and trainer.lightning_module.automatic_optimization
    )
    options = _lr_scheduler_options(schedule, parsed, trainer, is_stepped_by_lightning)
    shown = {**scheduler_settings(schedule), **options}
    shown.pop("reduce_on_plateau", None)
    log_info(f"schedule  {', '.join(f'{name}={value}' for name, value in shown.items())}")
    if trainer is not None and not is_stepped_by_lightning:
        options = {key: options[key] for key in ("interval", "frequency")}
    built.lr_scheduler_options = options
    schedule.interval = options["interval"]
    counts_steps = schedule.interval == SchedulerInterval.step.value
    if counts_steps and not getattr(config, "count_skipped_steps", False):
        schedule.counter = StepCounter(optimizer)
        schedule.counter.attach()
    if trainer is not None:
        monitor = None
        if is_stepped_by_lightning and options.get("reduce_on_plateau") is False:
            assert isinstance(config, PlateauConfig | CustomSchedulerConfig)
            monitor = config.monitor
        strict = getattr(config, "strict", True)
        built.entry = ScheduledOptimizer(
            trainer, optimizer, schedule, path, monitor, strict, has_length_of_run
        )
        # A second fit continues where the first ended.
        done = trainer.global_step if counts_steps else trainer.current_epoch
        earlier = _earlier_schedule(trainer, optimizer)
        if done and (is_stepped_by_lightning or earlier is not None):
            schedule.go_to(done if earlier is None else earlier.position)
    entry = built.entry

    def follow(optimizer: Optimizer) -> None:
        # A checkpoint may have no schedule or another one, and may load the schedule first.
        done = steps_taken(optimizer)
        if not counts_steps:
            done = 0 if trainer is None else epochs_done(trainer)
        if (done or schedule.position) and (entry is None or entry.is_scheduled):
            schedule.resume_at(done)

    optimizer.register_load_state_dict_post_hook(follow)


def _earlier_schedule(trainer: Trainer, optimizer: Optimizer) -> AnySchedule | None:
    """Returns the schedule of the same parameters from an earlier fit."""
    first = optimizer.param_groups[0]["params"][0]
    schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
    return next(
        (
            each
            for each in schedules
            if isinstance(each, AnySchedule)
            and each.optimizer.param_groups[0]["params"][0] is first
        ),
        None,
    )


def _lr_scheduler_options(
    built: AnySchedule,
    scheduler: ParsedConfig[ScheduleConfig],
    trainer: Trainer | None,
    is_stepped_by_lightning: bool,
) -> dict[str, Any]:
    """Returns the remaining keys of Lightning's lr_scheduler dict."""
    config, path = scheduler.config, scheduler.path
    interval, frequency = SchedulerInterval.step, 1
    if isinstance(config, CustomSchedulerConfig):
        interval, frequency = config.interval or SchedulerInterval.epoch, config.frequency
        batches = math.inf if trainer is None else trainer.num_training_batches
        if interval is SchedulerInterval.step and frequency > batches:
            problem = (
                f"is more than the {batches} batches of an epoch, after which Lightning restarts"
            )
            raise (path / "frequency").invalid(frequency, problem, 1)
    options: dict[str, Any] = {"interval": interval.value, "frequency": frequency}
    if not isinstance(config, PlateauConfig | CustomSchedulerConfig) or built.plateau is None:
        return options
    has_interval = isinstance(config, CustomSchedulerConfig) and config.interval is not None
    if is_stepped_by_lightning and not has_interval:
        if frequency != 1:
            problem = "must be 1 without an interval: a plateau is checked after each validation"
            raise (path / "frequency").invalid(frequency, problem, 1)
        # ScheduleCallback compares the metric. `monitor` is only for others that show it.
        return {**options, "monitor": config.monitor, "reduce_on_plateau": False}
    if trainer is None and isinstance(built, Schedule) and built.curve.warmup_steps:
        raise path.error(
            "needs the Trainer for its warm-up",
            "Call build_adam(..., trainer=self.trainer) in configure_optimizers",
            value=config.name,
        )
    if isinstance(config, PlateauConfig):
        options["interval"] = SchedulerInterval.epoch.value
    return {
        **options,
        "monitor": config.monitor,
        "strict": config.strict,
        "reduce_on_plateau": True,
    }
