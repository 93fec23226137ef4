"""Configs and a trainer → the optimizer and the scheduler, as Lightning wants them."""

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_adam._compat.lightning import is_smoke_test
from lightning_adam._compat.torch import let_unscale
from lightning_adam.config.errors import ConfigError, refusal
from lightning_adam.config.reading import CustomScheduler, read_scheduler
from lightning_adam.config.schema import Interval, PlateauConfig, SchedulerConfig, StepwiseConfig
from lightning_adam.optim.optimizers import build_optimizer
from lightning_adam.optim.schedulers import build_scheduler
from lightning_adam.optim.schedulers import settings as scheduler_settings
from lightning_adam.optim.steps import StepCounter


@dataclass
class Built:
    """What was built for a module."""

    optimizer: Optimizer
    scheduler: LRScheduler | None
    rhythm: dict[str, Any]
    """When Lightning steps the scheduler, and with which metric."""
    counter: StepCounter | None
    """None if the schedule does not ask which steps were skipped."""
    steps: int = 0
    """How many the counter had counted when the schedule last went on."""

    def as_lightning(self) -> dict[str, Any]:
        """What `configure_optimizers` returns."""
        if self.scheduler is None:
            return {"optimizer": self.optimizer}
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": self.scheduler, **self.rhythm},
        }


def build_adam(
    module: nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    total_steps: int | None = None,
    *,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """What `configure_optimizers` returns, for modules without the mixin or with two optimizers.

    Args:
        module: The module to train.
        optimizer: The optimizer config.
        scheduler: The scheduler config (default: None, a constant learning rate).
        total_steps: Optimizer steps of the run (default: None, as many as the trainer will take).
        trainer: The trainer, which decides on the schedule's length, on the implementation and on
            when a metric is judged (default: None, not known).

    Returns:
        Lightning's dict of the optimizer and, if there is one, the scheduler. For two optimizers
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
    """Builds what `build_adam` returns, and what the mixin goes on with; its arguments are those.

    Example:
        >>> built = build(nn.Linear(3, 4), {"lr": 0.01}, None, None, None)
        >>> built.scheduler is None, built.as_lightning().keys()
        (True, dict_keys(['optimizer']))
    """
    if scheduler is not None and total_steps is None and trainer is not None:
        total_steps = steps_of(trainer)
    built = build_optimizer(module, optimizer)
    if trainer is not None:
        settle_unscaling(built, built.param_groups[0].get("fused"), trainer)
    if scheduler is None:
        return Built(built, None, {}, None)
    built_scheduler = build_scheduler(built, scheduler, total_steps)
    config, where = read_scheduler(scheduler)
    rhythm = _rhythm(built_scheduler, config, where, trainer)
    shown = {**scheduler_settings(built_scheduler), **rhythm}
    rank_zero_info(f"schedule  {', '.join(f'{name}={value}' for name, value in shown.items())}")
    minds_skipped = (
        isinstance(config, StepwiseConfig | CustomScheduler)
        and rhythm["interval"] == Interval.step
        and not isinstance(built_scheduler, ReduceLROnPlateau)
        and not config.count_skipped_steps
    )
    counter = StepCounter(built) if minds_skipped else None
    if counter is not None:
        counter.attach()
    return Built(built, built_scheduler, rhythm, counter)


def _rhythm(
    built: LRScheduler,
    config: SchedulerConfig | CustomScheduler,
    where: str,
    trainer: Trainer | None,
) -> dict[str, Any]:
    """When Lightning steps a scheduler, and with which metric."""
    rhythm: dict[str, Any] = {}
    if isinstance(built, ReduceLROnPlateau) and isinstance(config, PlateauConfig | CustomScheduler):
        rhythm["monitor"] = config.monitor
    if isinstance(config, CustomScheduler) and config.interval is not None:
        batches = math.inf if trainer is None else trainer.num_training_batches
        if config.interval is Interval.step and config.frequency > batches:
            expected = f"expected at most the {batches} batches of an epoch, after which Lightning"
            expected += " counts anew"
            raise refusal(where, "frequency", config.frequency, expected, 1)
        return {**rhythm, "interval": config.interval.value, "frequency": config.frequency}
    if isinstance(built, ReduceLROnPlateau):
        if isinstance(config, CustomScheduler) and config.frequency != 1:
            expected = "expected 1, for without an interval it is judged after each validation"
            raise refusal(where, "frequency", config.frequency, expected, 1)
        return {**rhythm, **_after_validation(where, trainer)}
    if isinstance(config, CustomScheduler):
        return {"interval": "epoch", "frequency": config.frequency}
    return {"interval": "step", "frequency": 1}


def _after_validation(where: str, trainer: Trainer | None) -> dict[str, Any]:
    """The interval at whose end the trainer has just validated.

    Lightning counts a scheduler's steps in batches of the epoch, and passes over those that only
    accumulate.
    """
    if trainer is None:
        return {"interval": "epoch", "frequency": 1}
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if batches is not None and epochs is not None:
        if batches >= trainer.num_training_batches:
            return {"interval": "epoch", "frequency": epochs}
        if epochs == 1 and all(batches % each == 0 for each in set(_accumulations(trainer))):
            return {"interval": "step", "frequency": int(batches)}
    raise ConfigError(
        f"{where}: expected validations that a plateau can be judged after, at the end of epochs or"
        f" at optimizer steps within each, but the Trainer validates every {batches or 'so much'}"
        f" {'batches' if batches else 'time'}, with check_val_every_n_epoch={epochs} and"
        f" accumulate_grad_batches={trainer.accumulate_grad_batches}; type Trainer(...,"
        " val_check_interval=1.0, check_val_every_n_epoch=1)"
    )


def steps_of(trainer: Trainer) -> int | None:
    """The optimizer steps the trainer will take; None if that has no end or is not known.

    Args:
        trainer: The trainer, whose data is set up if it is not yet.
    """
    if is_smoke_test(trainer):
        # A smoke test of a single batch: it has to take the schedule of the whole run.
        return 10**9
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 0:
        return None
    accumulations = _accumulations(trainer)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if len(set(accumulations)) > 1 and epochs is not None and math.isfinite(batches):
        # Lightning takes what the first epoch accumulates for all.
        steps = sum(math.ceil(batches / accumulations[epoch]) for epoch in range(epochs))
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return int(steps)


def _accumulations(trainer: Trainer) -> list[int]:
    """The batches that make an optimizer step, epoch by epoch as far as is known."""
    epochs = range(max(trainer.max_epochs or 1, 1))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return [callback.get_accumulate_grad_batches(epoch) for epoch in epochs]
    return [trainer.accumulate_grad_batches] * len(epochs)


def settle_unscaling(optimizer: Optimizer, fused: bool | None, trainer: Trainer) -> None:
    """Lets Lightning clip for a fused optimizer too.

    Lightning refuses to, under mixed precision, for the fused step unscales the gradients itself.
    Without a scaler there is nothing to unscale. With one that does it for all other optimizers,
    clipping costs what it costs with those: a wait for the device at each step.

    Args:
        optimizer: The optimizer.
        fused: What its groups say of `fused`; None if they say nothing.
        trainer: The trainer.
    """
    precision, module = trainer.precision_plugin, trainer.lightning_module
    if fused is None or not isinstance(precision, MixedPrecision):
        return
    clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module)
    is_clipped = bool(clips) and module.automatic_optimization
    let_unscale(optimizer, fused and precision.scaler is not None and not is_clipped)
