"""AdamMixin: groups, optimizer and scheduler wired into Lightning's hooks."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_adam._private.lightning import (
    attached_trainer,
    is_of_lr_find,
    is_smoke_test,
    loaded_checkpoint,
)
from lightning_adam._private.torch import let_unscale
from lightning_adam.errors import ConfigError, nearest, refusal
from lightning_adam.optimizers import build_optimizer
from lightning_adam.reading import CustomScheduler, read_optimizer, read_scheduler
from lightning_adam.resume import Resumed, reconcile, record
from lightning_adam.schedulers import build_scheduler, cover_later_groups, set_peaks
from lightning_adam.schedulers import settings as scheduler_settings
from lightning_adam.schema import AdamConfig, Interval, PlateauConfig, StepwiseConfig
from lightning_adam.steps import StepCounter, steps_taken

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


@dataclass
class _Built:
    """What was built for a module."""

    optimizer: Optimizer
    scheduler: LRScheduler | None
    rhythm: dict[str, Any]
    """When Lightning steps the scheduler, and with which metric."""
    lr_scales: list[float]
    """What each group's learning rate is, as a multiple of the optimizer's."""
    counter: StepCounter | None
    """None if the schedule does not ask which steps were skipped."""
    steps: int = 0
    """How many the counter had counted when the schedule last went on."""

    def as_lightning(self) -> dict[str, Any]:
        if self.scheduler is None:
            return {"optimizer": self.optimizer}
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": self.scheduler, **self.rhythm},
        }


class AdamMixin(_Base):
    """A `configure_optimizers` from Hydra configs: `class Lit(AdamMixin, L.LightningModule)`.

    The configs come as keywords of the constructor, or from `self.hparams`. They are checked when
    the module is built; what depends on the run (the device, the schedule's length) when `fit`
    starts. What was built is printed as one table.

    Args:
        optimizer: The optimizer config: a composed Hydra node, a dict, or an `AdamConfig`
            (default: None, `self.hparams.optimizer`).
        scheduler: The scheduler config, likewise (default: None, `self.hparams.scheduler`, and
            without that a constant learning rate).

    Raises:
        ConfigError: If a config has an unknown key or a value that cannot work.
        TypeError: If LightningModule stands before the mixin among the bases.

    Example:
        >>> class Lit(AdamMixin, LightningModule):
        ...     def __init__(self, optimizer):
        ...         super().__init__(optimizer=optimizer)
        ...         self.net = nn.Linear(3, 4)
        >>> Lit({"lr": 0.01}).configure_optimizers()["optimizer"].defaults["lr"]
        0.01
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if LightningModule in order and order.index(LightningModule) < order.index(AdamMixin):
            raise TypeError(
                f"{cls.__name__}: expected AdamMixin before LightningModule among the bases, or its"
                f" configure_optimizers is never called; write class {cls.__name__}(AdamMixin,"
                " LightningModule)"
            )

    def __init__(
        self, *args: Any, optimizer: Any = None, scheduler: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if optimizer is not None:
            read_optimizer(optimizer)
        if scheduler is not None:
            read_scheduler(scheduler)
        self._optimizer_config = optimizer
        self._scheduler_config = scheduler
        self._found_lr: float | None = None
        self._built: _Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Callbacks copy the module, for moving averages of its weights.
        return {**super().__getstate__(), "_built": None}

    @property
    def optimizer_lr(self) -> float:
        """The optimizer's learning rate: `Tuner.lr_find(module, attr_name="optimizer_lr")` sets it.

        Groups keep their multiples of it, and the schedule its shape.
        """
        if self._found_lr is not None:
            return self._found_lr
        config = read_optimizer(self._configs()[0])[0]
        return float(config.lr if isinstance(config, AdamConfig) else config.factory.keywords["lr"])

    @optimizer_lr.setter
    def optimizer_lr(self, lr: float) -> None:
        self._found_lr = lr
        self._set_found_lr()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds what the configs say, for the trainer's device, precision and length."""
        optimizer, scheduler = self._configs()
        if optimizer is None:
            raise ConfigError(
                f"{type(self).__name__} has no optimizer config: expected one in"
                " super().__init__(optimizer=...), or in hparams by self.save_hyperparameters()"
            )
        self._built = _build(self, optimizer, scheduler, None, attached_trainer(self))
        if self._found_lr is not None:
            self._set_found_lr()
            rank_zero_info(f"lr={self._found_lr:g} instead, as optimizer_lr was set")
        return cast("OptimizerLRScheduler", self._built.as_lightning())

    def on_fit_start(self) -> None:
        """Settles what a checkpoint, if there is one, and the config do not have in common."""
        super().on_fit_start()
        built, checkpoint = self._built, loaded_checkpoint(self.trainer)
        if built is None or "optimizer_states" not in checkpoint:
            return
        optimizer, scheduler = self._configs()
        config, place = read_optimizer(optimizer)
        scheduler_place = "scheduler" if scheduler is None else read_scheduler(scheduler)[1]
        resumed = Resumed(
            built.optimizer,
            built.scheduler,
            built.rhythm.get("interval", Interval.step),
            config.resume,
            place,
            scheduler_place,
        )
        for line in reconcile(checkpoint, resumed):
            rank_zero_info(f"resuming: {line}")
        (loaded,) = checkpoint["optimizer_states"]
        _settle_unscaling(built.optimizer, loaded["param_groups"][0].get("fused"), self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes of which optimizer the checkpoint is."""
        super().on_save_checkpoint(checkpoint)
        if self._built is not None:
            record(checkpoint, self._built.optimizer)

    def on_train_start(self) -> None:
        """Learning rates as they have to be at the first step, also for and after `lr_find`."""
        super().on_train_start()
        built = self._built
        if built is None:
            return
        if built.counter is not None:
            # A checkpoint has been loaded since it was built.
            built.counter.taken = built.steps = steps_taken(built.optimizer)
        self._set_found_lr()
        for entry in self.trainer.lr_scheduler_configs:
            if is_of_lr_find(entry.scheduler):
                self._scale_lrs(built)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Goes on with the schedule, unless the optimizer's step was skipped."""
        built = self._built
        if built is not None and built.scheduler is not None and scheduler is built.scheduler:
            cover_later_groups(built.scheduler)
            # A strategy may have put another in its place, whose steps are not seen.
            if built.counter is not None and built.optimizer in self.trainer.optimizers:
                built.counter.settle()
                if built.counter.taken == built.steps:
                    return
                built.steps = built.counter.taken
        super().lr_scheduler_step(scheduler, metric)
        if built is not None and is_of_lr_find(scheduler):
            self._scale_lrs(built)

    def _scale_lrs(self, built: _Built) -> None:
        """`lr_find` gives all groups one learning rate: that of the optimizer."""
        # A callback may have added groups.
        for group, lr_scale in zip(built.optimizer.param_groups, built.lr_scales, strict=False):
            group["lr"] *= lr_scale

    def _set_found_lr(self) -> None:
        built = self._built
        if built is not None and self._found_lr is not None:
            peaks = [self._found_lr * lr_scale for lr_scale in built.lr_scales]
            later = built.optimizer.param_groups[len(peaks) :]
            peaks += [group.get("initial_lr", group["lr"]) for group in later]
            set_peaks(built.optimizer, built.scheduler, peaks)

    def on_validation_end(self) -> None:
        """Refuses a scheduler's metric that validation does not log, at the sanity check if it can.

        A module that logs nothing in the sanity check is let pass until its first validation.
        """
        super().on_validation_end()
        available = list(self.trainer.callback_metrics)
        if self.trainer.state.fn is not TrainerFn.FITTING or not available:
            return
        for entry in self.trainer.lr_scheduler_configs:
            if entry.reduce_on_plateau and entry.monitor not in available:
                scheduler = self._configs()[1]
                where = "scheduler" if scheduler is None else read_scheduler(scheduler)[1]
                expected = f"expected a metric that validation logs: {', '.join(available)}"
                close = nearest(str(entry.monitor), available, 1, cutoff=0.0)
                raise refusal(where, "monitor", entry.monitor, expected, close[0])

    def _configs(self) -> tuple[Any, Any]:
        """The optimizer's and the scheduler's: the constructor's keywords, else the hparams."""
        optimizer, scheduler = self._optimizer_config, self._scheduler_config
        return (
            self.hparams.get("optimizer") if optimizer is None else optimizer,
            self.hparams.get("scheduler") if scheduler is None else scheduler,
        )


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
    return _build(module, optimizer, scheduler, total_steps, trainer).as_lightning()


def _build(
    module: nn.Module,
    optimizer: Any,
    scheduler: Any,
    total_steps: int | None,
    trainer: Trainer | None,
) -> _Built:
    if scheduler is not None and total_steps is None and trainer is not None:
        total_steps = _total_steps(trainer)
    built = build_optimizer(module, optimizer)
    if trainer is not None:
        _settle_unscaling(built, built.param_groups[0].get("fused"), trainer)
    lr = built.defaults.get("lr")
    lr_scales = [group["lr"] / lr if lr else 1.0 for group in built.param_groups]
    if scheduler is None:
        return _Built(built, None, {}, lr_scales, None)
    built_scheduler = build_scheduler(built, scheduler, total_steps)
    rhythm = _rhythm(built_scheduler, scheduler, trainer)
    shown = {**scheduler_settings(built_scheduler), **rhythm}
    rank_zero_info(f"schedule  {', '.join(f'{name}={value}' for name, value in shown.items())}")
    config = read_scheduler(scheduler)[0]
    minds_skipped = (
        isinstance(config, StepwiseConfig | CustomScheduler)
        and rhythm["interval"] == Interval.step
        and not isinstance(built_scheduler, ReduceLROnPlateau)
        and not config.count_skipped_steps
    )
    counter = StepCounter(built) if minds_skipped else None
    if counter is not None:
        counter.attach()
    return _Built(built, built_scheduler, rhythm, lr_scales, counter)


def _rhythm(built: LRScheduler, scheduler: Any, trainer: Trainer | None) -> dict[str, Any]:
    """When Lightning steps a scheduler, and with which metric."""
    config, where = read_scheduler(scheduler)
    rhythm: dict[str, Any] = {}
    if isinstance(config, PlateauConfig | CustomScheduler):
        rhythm["monitor"] = config.monitor
    if isinstance(config, CustomScheduler) and config.interval is not None:
        batches = math.inf if trainer is None else trainer.num_training_batches
        if config.interval is Interval.step and config.frequency > batches:
            expected = f"expected at most the {batches} batches of an epoch, after which Lightning"
            expected += " counts anew"
            raise refusal(where, "frequency", config.frequency, expected, 1)
        return {**rhythm, "interval": config.interval.value, "frequency": config.frequency}
    if isinstance(built, ReduceLROnPlateau):
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


def _total_steps(trainer: Trainer) -> int | None:
    """The optimizer steps the trainer will take; None if that has no end or is not known."""
    if is_smoke_test(trainer):
        # A smoke test of a single batch: it has to take the schedule of the whole run.
        return 10**9
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 0:
        return None
    accumulations = _accumulations(trainer)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if len(set(accumulations)) > 1 and epochs is not None and epochs > 0:
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


def _settle_unscaling(optimizer: Optimizer, fused: bool | None, trainer: Trainer) -> None:
    """Lets Lightning clip for a fused optimizer too.

    Lightning refuses to, under mixed precision, for the fused step unscales the gradients itself.
    Without a scaler there is nothing to unscale. With one that does it for all other optimizers,
    clipping costs what it costs with those: a wait for the device at each step.
    """
    precision, module = trainer.precision_plugin, trainer.lightning_module
    if fused is None or not isinstance(precision, MixedPrecision):
        return
    clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module)
    is_clipped = bool(clips) and module.automatic_optimization
    let_unscale(optimizer, fused and precision.scaler is not None and not is_clipped)
