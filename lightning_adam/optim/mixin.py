"""AdamMixin: groups, optimizer and scheduler wired into Lightning's hooks."""

import math
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lightning_adam._compat.lightning import (
    attached_trainer,
    is_of_lr_find,
    loaded_checkpoint,
    restore_loaders,
)
from lightning_adam.config.errors import ConfigError, nearest, refusal
from lightning_adam.config.reading import read_optimizer, read_scheduler
from lightning_adam.config.schema import AdamConfig
from lightning_adam.optim.build import Built, build, settle_unscaling
from lightning_adam.optim.optimizers import hyperparameters
from lightning_adam.optim.param_groups import LR_RATIO
from lightning_adam.optim.resume import Resumed, reconcile, record
from lightning_adam.optim.schedulers import set_peaks
from lightning_adam.optim.steps import steps_taken

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
        >>> from torch import nn
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
        self._is_found_lr_due = False
        self._built: Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Callbacks copy the module, for moving averages of its weights.
        return {**super().__getstate__(), "_built": None}

    @property
    def optimizer_lr(self) -> float:
        """The optimizer's learning rate: `Tuner.lr_find(module, attr_name="optimizer_lr")` sets it.

        Groups keep their multiples of it, and the schedule its shape. NaN if it is not known.
        """
        optimizer = self._configs()[0]
        if self._found_lr is not None or optimizer is None:
            return math.nan if self._found_lr is None else self._found_lr
        config = read_optimizer(optimizer)[0]
        if isinstance(config, AdamConfig):
            return config.lr
        return float(hyperparameters(config.factory).get("lr", math.nan))

    @optimizer_lr.setter
    def optimizer_lr(self, lr: float) -> None:
        self._found_lr = lr
        self._set_found_lr()
        if self._built is not None:
            # `lr_find` is about to give all groups this one; a hook cannot remove itself.
            self._is_found_lr_due = True
            self._built.optimizer.register_step_pre_hook(lambda *_: self._set_found_lr_again())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds what the configs say, for the trainer's device, precision and length."""
        optimizer, scheduler = self._configs()
        if optimizer is None:
            raise ConfigError(
                f"{type(self).__name__} has no optimizer config: expected one in"
                " super().__init__(optimizer=...), or in hparams by self.save_hyperparameters()"
            )
        self._built = build(self, optimizer, scheduler, None, attached_trainer(self))
        if self._found_lr is not None:
            self._set_found_lr()
            rank_zero_info(f"lr={self._found_lr:g} instead, as optimizer_lr was set")
        return cast("OptimizerLRScheduler", self._built.as_lightning())

    def on_fit_start(self) -> None:
        """Settles what a checkpoint, if there is one, and the config do not have in common."""
        super().on_fit_start()
        checkpoint, built = loaded_checkpoint(self.trainer), self._in_use()
        schedules = self.trainer.lr_scheduler_configs
        if built is None or len(schedules) > 1 or "optimizer_states" not in checkpoint:
            return
        config, place = read_optimizer(self._configs()[0])
        resumed = Resumed(
            optimizer=built.optimizer,
            scheduler=schedules[0].scheduler if schedules else None,
            interval=schedules[0].interval if schedules else "",
            resume=config.resume,
            optimizer_place=place,
            scheduler_place=self._scheduler_place(),
        )
        for line in reconcile(checkpoint, resumed):
            rank_zero_info(f"resuming: {line}")
        (loaded,) = checkpoint["optimizer_states"]
        settle_unscaling(built.optimizer, loaded["param_groups"][0].get("fused"), self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes of which optimizer the checkpoint is."""
        super().on_save_checkpoint(checkpoint)
        built = self._in_use()
        if built is not None:
            record(checkpoint, built.optimizer)

    def on_train_start(self) -> None:
        """Loaders, counts and rates as they have to be, resumed and after `lr_find` too."""
        super().on_train_start()
        restore_loaders(self.trainer)
        built = self._in_use()
        if built is None:
            return
        if built.counter is not None:
            # A checkpoint has been loaded since it was built.
            built.counter.taken = built.steps = steps_taken(built.optimizer)
        if self._is_searching():
            self._scale_lrs(built)
        else:
            self._set_found_lr()

    def on_train_epoch_start(self) -> None:
        """`BackboneFinetuning` raises the last group's learning rate, of which we have made two."""
        super().on_train_epoch_start()
        built = self._in_use()
        groups = built.optimizer.param_groups if built is not None else []
        if len(groups) > 2 and groups[-1].get("name") == f"group_{len(groups) - 2}_no_decay":
            groups[-2]["lr"] = groups[-1]["lr"]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Goes on with the schedule, unless the optimizer's step was skipped."""
        built = self._in_use()
        if built is not None and built.counter is not None and scheduler is built.scheduler:
            built.counter.settle()
            if built.counter.taken == built.steps:
                return
            built.steps = built.counter.taken
        super().lr_scheduler_step(scheduler, metric)
        if built is not None and is_of_lr_find(scheduler):
            self._scale_lrs(built)

    def _in_use(self) -> Built | None:
        """What was built, unless the module or the strategy has put another optimizer there."""
        built = self._built
        return built if built is not None and built.optimizer in self.trainer.optimizers else None

    def _scale_lrs(self, built: Built) -> None:
        """`lr_find` gives all groups one learning rate: that of the optimizer."""
        for group in built.optimizer.param_groups:
            group["lr"] *= group.get(LR_RATIO, 1.0)

    def _is_searching(self) -> bool:
        return any(is_of_lr_find(entry.scheduler) for entry in self.trainer.lr_scheduler_configs)

    def _set_found_lr(self) -> None:
        built, found = self._built, self._found_lr
        if built is not None and found is not None:
            built.optimizer.defaults["lr"] = found
            groups = built.optimizer.param_groups
            peaks = [found * group.get(LR_RATIO, 1.0) for group in groups]
            set_peaks(built.optimizer, built.scheduler, peaks)

    def _set_found_lr_again(self) -> None:
        if self._is_found_lr_due and not self._is_searching():
            self._is_found_lr_due = False
            self._set_found_lr()

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
                expected = f"expected a metric that validation logs: {', '.join(available)}"
                close = nearest(str(entry.monitor), available, 1, cutoff=0.0)
                raise refusal(self._scheduler_place(), "monitor", entry.monitor, expected, close[0])

    @property
    def config_places(self) -> tuple[str, str]:
        """The full names of the optimizer's and the scheduler's config, as they are overridden."""
        optimizer = self._configs()[0]
        place = "optimizer" if optimizer is None else read_optimizer(optimizer)[1]
        return place, self._scheduler_place()

    def _scheduler_place(self) -> str:
        scheduler = self._configs()[1]
        return "scheduler" if scheduler is None else read_scheduler(scheduler)[1]

    def _configs(self) -> tuple[Any, Any]:
        """The optimizer's and the scheduler's: the constructor's keywords, else the hparams."""
        optimizer, scheduler = self._optimizer_config, self._scheduler_config
        return (
            self.hparams.get("optimizer") if optimizer is None else optimizer,
            self.hparams.get("scheduler") if scheduler is None else scheduler,
        )
