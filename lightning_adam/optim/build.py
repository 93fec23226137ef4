"""Configs and a Trainer → the optimizer and the scheduler of `configure_optimizers`."""

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_adam._compat.lightning import is_smoke_test
from lightning_adam._compat.torch import let_unscale
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import Parsed
from lightning_adam.config.schedule import (
    CustomSchedulerConfig,
    PlateauConfig,
    ScheduleConfig,
    SchedulerInterval,
    WarmupScheduleConfig,
    parse_schedule,
)
from lightning_adam.optim.console import log_info
from lightning_adam.optim.optimizers import build_optimizer
from lightning_adam.optim.schedulers import build_scheduler, scheduler_settings
from lightning_adam.optim.steps import StepCounter


@dataclass
class Built:
    """The optimizer and the scheduler of a module."""

    optimizer: Optimizer
    scheduler: LRScheduler | None
    lr_scheduler_options: dict[str, Any]
    """When Lightning steps the scheduler, and with which metric."""
    counter: StepCounter | None
    """None if the schedule does not depend on skipped steps."""
    steps: int = 0
    """The counter's value when the schedule last advanced."""

    def as_lightning(self) -> dict[str, Any]:
        """Returns the result of `configure_optimizers`."""
        if self.scheduler is None:
            return {"optimizer": self.optimizer}
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": self.scheduler, **self.lr_scheduler_options},
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
        trainer: The trainer, from which the length of the schedule, the implementation and the
            interval of a plateau follow (default: None).

    Returns:
        Lightning's dict of the optimizer and, if there is one, the scheduler. With two optimizers,
        return two of them.

    Raises:
        ConfigError: If a setting cannot work.

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
) -> Built:
    """Builds the optimizer and the scheduler; see `build_adam`.

    Example:
        >>> built = build(nn.Linear(3, 4), {"lr": 0.01}, None, None, None)
        >>> built.scheduler is None, built.as_lightning().keys()
        (True, dict_keys(['optimizer']))
    """
    if scheduler is not None and total_steps is None and trainer is not None:
        total_steps = steps_of(trainer)
    built = build_optimizer(module, optimizer)
    if trainer is not None:
        configure_amp_unscaling(built, built.param_groups[0].get("fused"), trainer)
    if scheduler is None:
        return Built(built, None, {}, None)
    parsed = parse_schedule(scheduler)
    built_scheduler = build_scheduler(built, parsed, total_steps)
    options = _lr_scheduler_options(built_scheduler, parsed, trainer)
    shown = {**scheduler_settings(built_scheduler), **options}
    log_info(f"schedule  {', '.join(f'{name}={value}' for name, value in shown.items())}")
    counts_skipped = (
        isinstance(parsed.config, WarmupScheduleConfig | CustomSchedulerConfig)
        and options["interval"] == SchedulerInterval.step
        and not isinstance(built_scheduler, ReduceLROnPlateau)
        and not parsed.config.count_skipped_steps
    )
    counter = StepCounter(built) if counts_skipped else None
    if counter is not None:
        counter.attach()
    return Built(built, built_scheduler, options, counter)


def _lr_scheduler_options(
    built: LRScheduler, scheduler: Parsed[ScheduleConfig], trainer: Trainer | None
) -> dict[str, Any]:
    """The other keys of Lightning's lr_scheduler dict."""
    config, path = scheduler.config, scheduler.path
    options: dict[str, Any] = {}
    if isinstance(config, PlateauConfig | CustomSchedulerConfig) and isinstance(
        built, ReduceLROnPlateau
    ):
        options = {"monitor": config.monitor}
    if isinstance(config, CustomSchedulerConfig) and config.interval is not None:
        batches = math.inf if trainer is None else trainer.num_training_batches
        if config.interval is SchedulerInterval.step and config.frequency > batches:
            problem = f"is more than the {batches} batches of an epoch, where Lightning restarts"
            raise (path / "frequency").invalid(config.frequency, problem, 1)
        return {**options, "interval": config.interval.value, "frequency": config.frequency}
    if isinstance(built, ReduceLROnPlateau):
        if isinstance(config, CustomSchedulerConfig) and config.frequency != 1:
            problem = "must be 1 without an interval: a plateau is checked after each validation"
            raise (path / "frequency").invalid(config.frequency, problem, 1)
        return {**options, **_after_validation(path, trainer)}
    if isinstance(config, CustomSchedulerConfig):
        return {"interval": "epoch", "frequency": config.frequency}
    return {"interval": "step", "frequency": 1}


def _after_validation(path: ConfigPath, trainer: Trainer | None) -> dict[str, Any]:
    """The interval at whose end the trainer validates.

    Lightning counts a scheduler's steps in batches of the epoch, and skips batches that only
    accumulate gradients.
    """
    if trainer is None:
        return {"interval": "epoch", "frequency": 1}
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if batches is not None and epochs is not None:
        if batches >= trainer.num_training_batches:
            return {"interval": "epoch", "frequency": epochs}
        if epochs == 1 and all(batches % each == 0 for each in set(_accumulations(trainer))):
            return {"interval": "step", "frequency": int(batches)}
    interval = f"every {batches} batches" if batches else "on a time interval"
    raise path.error(
        "needs validation at the end of epochs, or at optimizer steps within each epoch. The"
        f" Trainer validates {interval}, with check_val_every_n_epoch={epochs} and"
        f" accumulate_grad_batches={trainer.accumulate_grad_batches}",
        "Use Trainer(..., val_check_interval=1.0, check_val_every_n_epoch=1)",
    )


def steps_of(trainer: Trainer) -> int | None:
    """Returns the number of optimizer steps of a run; None if it has no end or is not known.

    Args:
        trainer: The trainer, whose data is set up if it is not yet.
    """
    if is_smoke_test(trainer):
        # A smoke test of one batch must accept the schedule of the whole run.
        return 10**9
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 0:
        return None
    accumulations = _accumulations(trainer)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if len(set(accumulations)) > 1 and epochs is not None and math.isfinite(batches):
        # Lightning assumes the accumulation of the first epoch for all.
        steps = sum(math.ceil(batches / accumulations[epoch]) for epoch in range(epochs))
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return int(steps)


def _accumulations(trainer: Trainer) -> list[int]:
    """The number of batches per optimizer step, by epoch."""
    epochs = range(max(trainer.max_epochs or 1, 1))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return [callback.get_accumulate_grad_batches(epoch) for epoch in epochs]
    return [trainer.accumulate_grad_batches] * len(epochs)


def configure_amp_unscaling(optimizer: Optimizer, fused: bool | None, trainer: Trainer) -> None:
    """Lets Lightning clip the gradients of a fused optimizer under mixed precision.

    Lightning refuses to, because a fused step unscales the gradients itself. Without a GradScaler
    there is nothing to unscale. With one, gradients are unscaled before clipping, at the cost that
    other implementations have: a device synchronization at each step.

    Args:
        optimizer: The optimizer.
        fused: The `fused` flag of its groups; None if they have none.
        trainer: The trainer.
    """
    precision, module = trainer.precision_plugin, trainer.lightning_module
    if fused is None or not isinstance(precision, MixedPrecision):
        return
    clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module)
    is_clipped = bool(clips) and module.automatic_optimization
    let_unscale(optimizer, fused and precision.scaler is not None and not is_clipped)
