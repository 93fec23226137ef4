"""AdamMixin: groups, optimizer and scheduler wired into Lightning's hooks."""

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_adam._private.lightning import attached_trainer
from lightning_adam.optimizers import build_optimizer
from lightning_adam.schedulers import build_scheduler
from lightning_adam.schema import ConfigError, read_optimizer, read_scheduler

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
        >>> Lit({"lr": 0.01}).configure_optimizers().defaults["lr"]
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
        optimizer = self._optimizer_config
        scheduler = self._scheduler_config
        if optimizer is None:
            optimizer = self.hparams.get("optimizer")
        if scheduler is None:
            scheduler = self.hparams.get("scheduler")
        if optimizer is None:
            raise ConfigError(
                f"{type(self).__name__} has no optimizer config: expected one in"
                " super().__init__(optimizer=...), or in hparams by self.save_hyperparameters()"
            )
        trainer = attached_trainer(self)
        if trainer is None:
            return build_adam(self, optimizer, scheduler)
        return build_adam(
            self,
            optimizer,
            scheduler,
            total_steps=None if scheduler is None else _total_steps(trainer),
            fused_obstacle=_fused_obstacle(trainer),
        )


def build_adam(
    module: nn.Module,
    optimizer: Any,
    scheduler: Any = None,
    total_steps: int | None = None,
    *,
    fused_obstacle: str | None = None,
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns, for modules without the mixin.

    Args:
        module: The module to train.
        optimizer: The optimizer config.
        scheduler: The scheduler config (default: None, a constant learning rate).
        total_steps: Optimizer steps of the run, as in `trainer.estimated_stepping_batches`
            (default: None, not known).
        fused_obstacle: Why the training loop cannot use the fused implementation (default: None).

    Returns:
        The optimizer, or with a scheduler Lightning's dict of both, stepped at every optimizer
        step.

    Raises:
        ConfigError: If a setting cannot work.

    Example:
        >>> config = build_adam(nn.Linear(3, 4), {"lr": 0.01}, {"name": "cosine"}, 100)
        >>> config["lr_scheduler"]["interval"]
        'step'
    """
    built = build_optimizer(module, optimizer, fused_obstacle=fused_obstacle)
    if scheduler is None:
        return built
    return {
        "optimizer": built,
        "lr_scheduler": {
            "scheduler": build_scheduler(built, scheduler, total_steps),
            "interval": "step",
            "frequency": 1,
        },
    }


def _total_steps(trainer: Trainer) -> int | None:
    """The optimizer steps the trainer will take; None if that has no end or is not known."""
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
