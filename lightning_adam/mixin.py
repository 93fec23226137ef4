"""AdamMixin: groups, optimizer and scheduler wired into Lightning's hooks."""

import math
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_adam._private.lightning import attached_trainer, is_smoke_test
from lightning_adam.errors import ConfigError, nearest, refusal
from lightning_adam.optimizers import build_optimizer
from lightning_adam.reading import CustomScheduler, read_optimizer, read_scheduler
from lightning_adam.schedulers import build_scheduler
from lightning_adam.schedulers import settings as scheduler_settings
from lightning_adam.schema import PlateauConfig

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds what the configs say, for the trainer's device, precision and length."""
        optimizer, scheduler = self._configs()
        if optimizer is None:
            raise ConfigError(
                f"{type(self).__name__} has no optimizer config: expected one in"
                " super().__init__(optimizer=...), or in hparams by self.save_hyperparameters()"
            )
        built = build_adam(self, optimizer, scheduler, trainer=attached_trainer(self))
        return cast("OptimizerLRScheduler", built)

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
    if scheduler is not None and total_steps is None and trainer is not None:
        total_steps = _total_steps(trainer)
    fused_obstacle = None if trainer is None else _fused_obstacle(trainer)
    built = build_optimizer(module, optimizer, fused_obstacle=fused_obstacle)
    if scheduler is None:
        return {"optimizer": built}
    built_scheduler = build_scheduler(built, scheduler, total_steps)
    rhythm = _rhythm(built_scheduler, scheduler, trainer)
    shown = {**scheduler_settings(built_scheduler), **rhythm}
    rank_zero_info(f"schedule  {', '.join(f'{name}={value}' for name, value in shown.items())}")
    return {"optimizer": built, "lr_scheduler": {"scheduler": built_scheduler, **rhythm}}


def _rhythm(built: LRScheduler, scheduler: Any, trainer: Trainer | None) -> dict[str, Any]:
    """When Lightning steps a scheduler, and with which metric."""
    config, where = read_scheduler(scheduler)
    rhythm: dict[str, Any] = {}
    if isinstance(config, PlateauConfig | CustomScheduler):
        rhythm["monitor"] = config.monitor
    if isinstance(config, CustomScheduler) and config.interval is not None:
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
        if epochs == 1 and batches % trainer.accumulate_grad_batches == 0:
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
    return int(steps) if math.isfinite(steps) and steps >= 0 else None


def _fused_obstacle(trainer: Trainer) -> str | None:
    """Lightning refuses to clip for an optimizer that unscales gradients itself."""
    if trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MixedPrecision):
        return (
            f"Lightning does not clip gradients (gradient_clip_val={trainer.gradient_clip_val})"
            f" for a fused optimizer with precision={trainer.precision}"
        )
    return None
