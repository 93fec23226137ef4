"""`AdamMixin`: the optimizer and the scheduler in Lightning's hooks."""

import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lightning_adam._compat.lightning import (
    attached_trainer,
    is_created_by_cli,
    is_of_lr_find,
    loaded_checkpoint,
    restore_loaders,
)
from lightning_adam.config.errors import ConfigError, ConfigPath, Source, nearest
from lightning_adam.config.optimizer import AdamConfig, OptimizerConfig, parse_optimizer
from lightning_adam.config.parsing import Parsed
from lightning_adam.config.schedule import ScheduleConfig, parse_schedule
from lightning_adam.optim.build import Built, build, configure_amp_unscaling
from lightning_adam.optim.console import log_info
from lightning_adam.optim.optimizers import hyperparameters
from lightning_adam.optim.param_groups import LR_SCALE
from lightning_adam.optim.resume import Resumed, reconcile, record
from lightning_adam.optim.schedulers import set_peaks
from lightning_adam.optim.steps import steps_taken

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


Configs: TypeAlias = tuple[Parsed[OptimizerConfig] | None, Parsed[ScheduleConfig] | None]


class AdamMixin(_Base):
    """Configures the optimizer from Hydra configs: `class Lit(AdamMixin, L.LightningModule)`.

    The configs are arguments of the constructor, or come from `self.hparams`. They are validated
    when the module is built; what depends on the run, such as the device and the length of the
    schedule, is validated when `fit` starts. A table of the parameter groups is logged.

    Args:
        optimizer: The optimizer config: a composed Hydra node, a dict, an `AdamConfig` or a
            `functools.partial` (default: None, `self.hparams.optimizer`).
        scheduler: The scheduler config in the same forms (default: None,
            `self.hparams.scheduler`, or a constant learning rate without it).

    Raises:
        ConfigError: If a config has an unknown key or an invalid value.
        TypeError: If LightningModule precedes the mixin among the bases.

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
                f"{cls.__name__} lists LightningModule before AdamMixin, so that AdamMixin's"
                " configure_optimizers is never called. Use class"
                f" {cls.__name__}(AdamMixin, LightningModule)"
            )

    def __init__(
        self, *args: Any, optimizer: Any = None, scheduler: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._is_from_cli = is_created_by_cli()
        self._arguments = self._configs = self._parse(optimizer, scheduler)
        self._found_lr: float | None = None
        self._is_found_lr_due = False
        self._built: Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Callbacks that average weights copy the module.
        return {**super().__getstate__(), "_built": None}

    @property
    def optimizer_lr(self) -> float:
        """The learning rate that `Tuner.lr_find(module, attr_name="optimizer_lr")` sets.

        Groups keep their scales, and the schedule its shape. NaN if it is not known.
        """
        if self._found_lr is not None:
            return self._found_lr
        optimizer = self._parsed()[0]
        if optimizer is None:
            return math.nan
        if isinstance(optimizer.config, AdamConfig):
            return optimizer.config.lr
        return float(hyperparameters(optimizer.config.factory).get("lr", math.nan))

    @optimizer_lr.setter
    def optimizer_lr(self, lr: float) -> None:
        self._found_lr = lr
        self._set_found_lr()
        if self._built is not None:
            # `lr_find` is about to set this rate for all groups; a hook cannot remove itself.
            self._is_found_lr_due = True
            self._built.optimizer.register_step_pre_hook(lambda *_: self._set_found_lr_again())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer and the scheduler for the trainer's device, precision and length."""
        # The hyperparameters may have changed since they were parsed.
        self._configs = self._arguments
        optimizer, scheduler = self._parsed()
        if optimizer is None:
            raise ConfigError(
                f"{type(self).__name__} has no optimizer config",
                "Pass it to super().__init__(optimizer=...), or call self.save_hyperparameters()",
            )
        self._built = build(self, optimizer, scheduler, None, attached_trainer(self))
        if self._found_lr is not None:
            self._set_found_lr()
            log_info(f"Using lr={self._found_lr:g} (set by optimizer_lr)")
        return cast("OptimizerLRScheduler", self._built.as_lightning())

    def on_fit_start(self) -> None:
        """Reconciles a checkpoint, if there is one, with the config."""
        super().on_fit_start()
        checkpoint, built = loaded_checkpoint(self.trainer), self._in_use()
        schedulers = self.trainer.lr_scheduler_configs
        optimizer = self._configs[0]
        is_resumed = "optimizer_states" in checkpoint and len(schedulers) < 2
        if built is None or optimizer is None or not is_resumed:
            return
        resumed = Resumed(
            optimizer=built.optimizer,
            scheduler=schedulers[0].scheduler if schedulers else None,
            interval=schedulers[0].interval if schedulers else "",
            resume=optimizer.config.resume,
            optimizer_path=optimizer.path,
            scheduler_path=self._scheduler_path(),
        )
        for line in reconcile(checkpoint, resumed):
            log_info(f"resuming: {line}")
        (loaded,) = checkpoint["optimizer_states"]
        fused = loaded["param_groups"][0].get("fused")
        configure_amp_unscaling(built.optimizer, fused, self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records the class of the optimizer."""
        super().on_save_checkpoint(checkpoint)
        built = self._in_use()
        if built is not None:
            record(checkpoint, built.optimizer)

    def on_train_start(self) -> None:
        """Restores loaders, step counts and learning rates, after a resume or `lr_find`."""
        super().on_train_start()
        restore_loaders(self.trainer)
        built = self._in_use()
        if built is None:
            return
        if built.counter is not None:
            # A checkpoint has been loaded since the counter was built.
            built.counter.taken = built.steps = steps_taken(built.optimizer)
        if self._is_searching():
            self._scale_lrs(built)
        else:
            self._set_found_lr()

    def on_train_epoch_start(self) -> None:
        """Copies the rate that `BackboneFinetuning` sets on the second half of a split group."""
        super().on_train_epoch_start()
        built = self._in_use()
        groups = built.optimizer.param_groups if built is not None else []
        if len(groups) > 2 and groups[-1].get("name") == f"group_{len(groups) - 2}_no_decay":
            groups[-2]["lr"] = groups[-1]["lr"]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advances the schedule, unless the optimizer's step was skipped."""
        built = self._in_use()
        if built is not None and built.counter is not None and scheduler is built.scheduler:
            built.counter.settle()
            if built.counter.taken == built.steps:
                return
            built.steps = built.counter.taken
        super().lr_scheduler_step(scheduler, metric)
        if built is not None and is_of_lr_find(scheduler):
            self._scale_lrs(built)

    def on_validation_end(self) -> None:
        """Raises if validation does not log the scheduler's metric.

        A module that logs nothing in the sanity check is checked at its first validation.
        """
        super().on_validation_end()
        available = list(self.trainer.callback_metrics)
        if self.trainer.state.fn is not TrainerFn.FITTING or not available:
            return
        for entry in self.trainer.lr_scheduler_configs:
            if entry.reduce_on_plateau and entry.monitor not in available:
                problem = f"is not logged in validation, which logs {', '.join(available)}"
                close = nearest(str(entry.monitor), available, 1, cutoff=0.0)
                path = self._scheduler_path() / "monitor"
                raise path.invalid(entry.monitor, problem, close[0])

    @property
    def config_paths(self) -> tuple[str, str]:
        """The places of the optimizer's and the scheduler's config, as they are overridden."""
        optimizer = self._parsed()[0]
        path = "optimizer" if optimizer is None else str(optimizer.path)
        return path, str(self._scheduler_path())

    def _parsed(self) -> Configs:
        """The constructor's configs, otherwise those in the hyperparameters."""
        if None in self._configs:
            given = [self.hparams.get(name) for name in ("optimizer", "scheduler")]
            self._configs = self._parse(
                *(config or node for config, node in zip(self._configs, given, strict=True))
            )
        return self._configs

    def _parse(self, optimizer: Any, scheduler: Any) -> Configs:
        """Parses what is given; a parsed config stays as it is."""
        paths: list[ConfigPath | None] = [None, None]
        if self._is_from_cli:
            paths = [
                ConfigPath(f"model.{name}", source=Source.LIGHTNING_CLI)
                for name in ("optimizer", "scheduler")
            ]
        return (
            None if optimizer is None else parse_optimizer(optimizer, paths[0]),
            None if scheduler is None else parse_schedule(scheduler, paths[1]),
        )

    def _scheduler_path(self) -> ConfigPath:
        scheduler = self._parsed()[1]
        return ConfigPath("scheduler") if scheduler is None else scheduler.path

    def _in_use(self) -> Built | None:
        """What was built, unless the module or the strategy has replaced the optimizer."""
        built = self._built
        return built if built is not None and built.optimizer in self.trainer.optimizers else None

    def _scale_lrs(self, built: Built) -> None:
        """Applies the groups' scales to the one learning rate that `lr_find` sets for all."""
        for group in built.optimizer.param_groups:
            group["lr"] *= group.get(LR_SCALE, 1.0)

    def _is_searching(self) -> bool:
        return any(is_of_lr_find(entry.scheduler) for entry in self.trainer.lr_scheduler_configs)

    def _set_found_lr(self) -> None:
        built, found = self._built, self._found_lr
        if built is not None and found is not None:
            built.optimizer.defaults["lr"] = found
            groups = built.optimizer.param_groups
            peaks = [found * group.get(LR_SCALE, 1.0) for group in groups]
            set_peaks(built.optimizer, built.scheduler, peaks)

    def _set_found_lr_again(self) -> None:
        if self._is_found_lr_due and not self._is_searching():
            self._is_found_lr_due = False
            self._set_found_lr()
