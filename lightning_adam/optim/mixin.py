"""`AdamMixin`: the optimizer and the schedule of a LightningModule, from Hydra configs."""

import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lightning_adam._compat.lightning import either, is_created_by_cli
from lightning_adam.config.errors import ConfigError, ConfigPath, Source
from lightning_adam.config.optimizer import AdamConfig, OptimizerConfig, parse_optimizer
from lightning_adam.config.parsing import ParsedConfig, locate, locate_argument
from lightning_adam.config.schedule import ScheduleConfig, parse_schedule
from lightning_adam.optim.build import AdamSetup, build
from lightning_adam.optim.console import log_info
from lightning_adam.optim.hyperparameters import make_plain
from lightning_adam.optim.optimizers import hyperparameters

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


Configs: TypeAlias = tuple[
    ParsedConfig[OptimizerConfig] | None, ParsedConfig[ScheduleConfig] | None
]


class AdamMixin(_Base):
    """Configures the optimizer from Hydra configs: `class Lit(AdamMixin, L.LightningModule)`.

    The configs are arguments of the constructor, or come from `self.hparams`. They are validated
    when the module is built. Checks that depend on the run, such as its device and length, follow
    when `fit` starts. A table of the parameter groups is logged.

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

    # Prevents TorchScript from compiling them.
    __jit_unused_properties__ = [  # noqa: RUF012
        *LightningModule.__jit_unused_properties__,
        "optimizer_lr",
        "config_paths",
    ]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        for base in either("LightningModule"):
            if base in order and order.index(base) < order.index(AdamMixin):
                raise TypeError(
                    f"{cls.__name__} lists LightningModule before AdamMixin, so that AdamMixin's"
                    " configure_optimizers is never called. Use class"
                    f" {cls.__name__}(AdamMixin, LightningModule)"
                )

    def __init__(
        self, *args: Any, optimizer: Any = None, scheduler: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # The paths of the arguments are known only while Hydra calls the constructor.
        self._paths = _argument_path("optimizer", optimizer), _argument_path("scheduler", scheduler)
        self._arguments = self._configs = self._parse(optimizer, scheduler)
        self._found_lr: float | None = None
        self._built: AdamSetup | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Callbacks that average weights deep-copy the module.
        return {**super().__getstate__(), "_built": None}

    @property
    def optimizer_lr(self) -> float:
        """The peak learning rate, which `Tuner.lr_find(module, attr_name="optimizer_lr")` sets.

        Groups keep their scales, and the schedule keeps its shape. NaN if it is unknown.
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
        if self._built is not None:
            self._built.set_peak(lr)

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
        self._built = build(self, optimizer, scheduler, None, None)
        if self._found_lr is not None:
            self._built.set_peak(self._found_lr)
            log_info(f"Using lr={self._found_lr:g} (set by optimizer_lr)")
        return cast("OptimizerLRScheduler", self._built.as_lightning())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the hyperparameters in a weights-only checkpoint plain.

        `ScheduleCallback` does so in other checkpoints.
        """
        super().on_save_checkpoint(checkpoint)
        make_plain(checkpoint)

    @property
    def config_paths(self) -> tuple[ConfigPath, ConfigPath]:
        """The paths of the optimizer's and the scheduler's config."""
        optimizer, scheduler = self._parsed()
        return (
            ConfigPath("optimizer") if optimizer is None else optimizer.path,
            ConfigPath("scheduler") if scheduler is None else scheduler.path,
        )

    def _parsed(self) -> Configs:
        """Returns the constructor's configs, or else those in the hyperparameters."""
        if None in self._configs:
            given = [self.hparams.get(name) for name in ("optimizer", "scheduler")]
            self._configs = self._parse(
                *(config or node for config, node in zip(self._configs, given, strict=True))
            )
        return self._configs

    def _parse(self, optimizer: Any, scheduler: Any) -> Configs:
        """Parses the given configs; a parsed config stays as it is."""
        return (
            None if optimizer is None else parse_optimizer(optimizer, self._paths[0]),
            None if scheduler is None else parse_schedule(scheduler, self._paths[1]),
        )


def _argument_path(name: str, node: Any) -> ConfigPath | None:
    """Returns the path of an argument of the module's constructor; None if it is unknown."""
    if is_created_by_cli():
        return ConfigPath(f"model.{name}", source=Source.LIGHTNING_CLI)
    return locate_argument(name) if node is None else locate(node, name)
