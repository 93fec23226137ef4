"""The monitor that the environment variable LIGHTNING_ADAM_MONITOR adds to a run."""

import itertools
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adam._compat.torch import shared_store
from lightning_adam.config.errors import ConfigError, ConfigPath, Source
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.parsing import to_dict
from lightning_adam.config.variables import MONITOR_VARIABLE as VARIABLE
from lightning_adam.monitor.callback import AdamMonitor
from lightning_adam.monitor.failsafe import warn_only
from lightning_adam.optim.console import log_info
from lightning_adam.statistics.state_reader import is_measurable

PATH = ConfigPath("adam_monitor", source=Source.ENVIRONMENT)

_RUNS = itertools.count()


def environment_monitors(value: str) -> list[Callback]:
    """Returns the monitor that the variable configures; warns if its value cannot be parsed.

    Example:
        >>> [monitor.config.every_n_steps for monitor in environment_monitors("every_n_steps=10")]
        [10]
    """
    try:
        return [EnvironmentMonitor(**settings(value))]
    except Exception as error:
        warn_ignored(error)
        return []


def settings(value: str) -> dict[str, Any]:
    """Returns the arguments of AdamMonitor in the variable's value.

    Args:
        value: `1`, `true` or `on`, or Hydra overrides, separated as in a shell.

    Raises:
        ConfigError: If a word is not an override of one of the monitor's settings.

    Example:
        >>> settings("adam_monitor.every_n_steps=10 scopes=[model,layer] worst={grad_norm:3}")
        {'every_n_steps': 10, 'scopes': ['model', 'layer'], 'worst': {'grad_norm': 3}}
    """
    if value.lower() in ("1", "true", "on"):
        return {}
    node = OmegaConf.create()
    try:
        words = [word.removeprefix(f"{PATH.config}.") for word in shlex.split(value)]
        for override in OverridesParser.create().parse_overrides(words):
            if override.is_delete() or override.is_sweep_override() or override.package:
                raise ValueError(override.input_line)
            OmegaConf.update(node, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException, ValueError):
        raise ConfigError(
            f"{value} must be 1, 0, or settings of the monitor, each with one value and without"
            " spaces",
            f"Use for example {VARIABLE}='every_n_steps=10 statistics=[headline,eps_*]'",
        ) from None
    arguments = to_dict(node, PATH)
    names = [each.name for each in fields(MonitorConfig) if each.name != "_target_"]
    for name in arguments.keys() - names:
        raise (PATH / name).unknown(arguments[name], names)
    return arguments


def warn_ignored(error: Exception) -> None:
    """Warns that the variable is ignored.

    Args:
        error: The cause: a ConfigError, or an internal error, which is shown with its traceback.

    Example:
        >>> import pytest
        >>> with pytest.warns(UserWarning, match="is ignored; training is not affected"):
        ...     warn_ignored(ZeroDivisionError())
    """
    if isinstance(error, ConfigError):
        message = f"{VARIABLE} is ignored: {error}"
    else:
        fault = "".join(traceback.format_exception(error))
        message = f"{VARIABLE} is ignored; training is not affected.\n{fault}"
    rank_zero_only(warn_only)(message)


class EnvironmentMonitor(AdamMonitor):
    """An AdamMonitor that is not part of the script: its errors are warnings.

    An AdamMonitor in the script takes precedence. A checkpoint stores the state outside the states
    of callbacks, because Lightning warns if a stored callback is missing.

    Example:
        >>> EnvironmentMonitor(every_n_steps=10).config.every_n_steps
        10
    """

    config_path = PATH
    _is_enabled = False
    _store_key = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Disables itself if there is another monitor; otherwise registers with the other ranks."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        with self._warn_on_error():
            self._is_enabled = self._is_first(trainer)
            store = shared_store()
            if self._is_enabled and store is not None:
                # Lightning waits for all ranks after this hook.
                self._store_key = f"{VARIABLE}/{next(_RUNS)}/{self.config}"
                store.add(self._store_key, 1)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disables itself if there is nothing to measure, or if a precondition fails."""
        if not self._is_enabled:
            return
        with self._warn_on_error():
            self._is_enabled = any(map(_may_be_measured, trainer.optimizers))
            if self._is_enabled:
                self._check_processes(trainer)
                super().on_fit_start(trainer, pl_module)
            else:
                log_info(f"{VARIABLE} is ignored: no optimizer is Adam-like.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the optimizer hooks. Without them, the other hooks do nothing."""
        if self._is_enabled:
            super().on_train_start(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """Unique, as a script may pass the callbacks of one Trainer to another."""
        return f"{type(self).__qualname__}{id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, which Lightning does not store."""
        return {}

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the monitor's state."""
        state = AdamMonitor.state_dict(self) if self._is_enabled else {}
        if state:
            checkpoint[VARIABLE] = state

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Loads the state of the previous monitor, from the variable or the script."""
        from_script = checkpoint["callbacks"].get(AdamMonitor.__qualname__, {})
        self.load_state_dict(checkpoint.get(VARIABLE, from_script))

    @contextmanager
    def _warn_on_error(self) -> Iterator[None]:
        """Turns an error into a warning, and disables the monitor."""
        try:
            yield
        except Exception as error:
            self._is_enabled = False
            warn_ignored(error)

    def _is_first(self, trainer: Trainer) -> bool:
        """Whether no other monitor takes precedence."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [each for each in callbacks if isinstance(each, AdamMonitor)]
        first = min(monitors, key=lambda each: isinstance(each, EnvironmentMonitor))
        if not isinstance(first, EnvironmentMonitor):
            log_info(f"{VARIABLE} is ignored: an AdamMonitor in the script takes precedence.")
        return first is self

    def _check_processes(self, trainer: Trainer) -> None:
        """Raises if only some ranks measure, as they would wait for the others forever."""
        store = shared_store()
        measuring = trainer.world_size if store is None else store.add(self._store_key, 0)
        if measuring != trainer.world_size:
            raise ConfigError(
                f"only {measuring} of {trainer.world_size} processes have this value",
                f"Set the variable on every node, for example with mpirun -x {VARIABLE}",
            )


def _may_be_measured(optimizer: Any) -> bool:
    """Whether to enable the monitor; it warns about wrapped optimizers such as DeepSpeed's."""
    return is_measurable(optimizer) or not isinstance(optimizer, Optimizer)
