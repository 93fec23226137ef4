"""The monitor that the environment variable LIGHTNING_ADAM_MONITOR attaches."""

import itertools
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adam._compat.torch import shared_store
from lightning_adam.config.errors import ConfigError, unknown_field, warn_only
from lightning_adam.config.forms import values_of
from lightning_adam.config.schema import MonitorConfig
from lightning_adam.config.variables import MONITOR_VARIABLE as VARIABLE
from lightning_adam.monitor.callback import AdamMonitor
from lightning_adam.monitor.settings import read_monitor
from lightning_adam.statistics.views import is_measurable

PLACE = "adam_monitor"
"""The monitor's place in a Hydra app: what is typed there can be pasted."""
ON = ("1", "true", "on")

_FITS = itertools.count()


def environment_monitors(value: str) -> list[Callback]:
    """Returns the monitor that the variable's value describes; warns if it cannot be parsed.

    Example:
        >>> [monitor.config.every_n_steps for monitor in environment_monitors("every_n_steps=10")]
        [10]
    """
    try:
        return [EnvironmentMonitor(**settings(value))]
    except Exception as error:
        ignore(error)
        return []


def settings(given: str) -> dict[str, Any]:
    """The arguments of AdamMonitor that the variable holds.

    Args:
        given: The variable's value, split into words as a shell does, each of which means what it
            means on the command line of a Hydra app.

    Raises:
        ConfigError: If it holds anything else than settings of the monitor.

    Example:
        >>> settings("adam_monitor.every_n_steps=10 scopes=[model,layer] worst={grad_norm:3}")
        {'every_n_steps': 10, 'scopes': ['model', 'layer'], 'worst': {'grad_norm': 3}}
    """
    if given.lower() in ON:
        return {}
    node = OmegaConf.create()
    try:
        words = [word.removeprefix(f"{PLACE}.") for word in shlex.split(given)]
        for override in OverridesParser.create().parse_overrides(words):
            if override.is_delete() or override.is_sweep_override() or override.package:
                raise ValueError(override.input_line)
            OmegaConf.update(node, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException, ValueError):
        raise ConfigError(
            f"{given}: expected 1, 0, or settings of the monitor, each with one value and no space"
            f" within; type for example {VARIABLE}='every_n_steps=10 statistics=[headline,eps_*]'"
        ) from None
    read_monitor(node, PLACE)
    values = values_of(node, PLACE)
    if "_target_" in values:
        fields = [name for name in vars(MonitorConfig()) if name != "_target_"]
        raise unknown_field(PLACE, "_target_", values["_target_"], fields)
    return values


def ignore(error: Exception) -> None:
    """Says why the variable is ignored, and what to type instead.

    Args:
        error: What went wrong: a ConfigError of the monitor's settings, or a fault of our own.

    Example:
        >>> import pytest
        >>> with pytest.warns(UserWarning, match="is ignored; training is not affected"):
        ...     ignore(ZeroDivisionError())
    """
    if isinstance(error, ConfigError):
        said = f"{VARIABLE} is ignored: {_as_typed_here(str(error))}"
    else:
        fault = "".join(traceback.format_exception(error))
        said = f"{VARIABLE} is ignored; training is not affected.\n{fault}"
    rank_zero_only(warn_only)(said)


def _as_typed_here(refusal: str) -> str:
    """A refusal that tells what to type for a Hydra app, told for the variable."""
    sentence, advice, line = refusal.replace(f"{PLACE}.", "").rpartition("type for example ")
    if not advice:
        return line
    if line.startswith(VARIABLE):
        return refusal
    (word,) = shlex.split(line)
    # The shell takes one pair of quotes away, and `settings` another.
    inner = word if shlex.split(word) == [word] else shlex.quote(word)
    return f"{sentence}{advice}{VARIABLE}={shlex.quote(inner)}"


class EnvironmentMonitor(AdamMonitor):
    """An AdamMonitor that the script does not know of: what it cannot do is said, and no error.

    It yields to an AdamMonitor that the script has attached. Its state stands beside those of the
    callbacks in a checkpoint, where Lightning does not miss it when the variable is not set.

    Example:
        >>> EnvironmentMonitor(every_n_steps=10).config.every_n_steps
        10
    """

    # Lightning refuses two with a state, as where a script hands a Trainer's callbacks to the next.
    state_dict = Callback.state_dict

    _is_on = False
    _ballot = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Yields to another monitor; else tells the other processes that this one measures."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        with self._never_stop():
            self._is_on = self._is_first(trainer)
            store = shared_store()
            if self._is_on and store is not None:
                # Behind this hook Lightning waits for all processes.
                self._ballot = f"{VARIABLE}/{next(_FITS)}/{self.config}"
                store.add(self._ballot, 1)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stays off where there is nothing to measure, or where it would be refused."""
        if not self._is_on:
            return
        with self._never_stop():
            self._is_on = any(map(_may_be_measured, trainer.optimizers))
            if self._is_on:
                self._check_processes(trainer)
                super().on_fit_start(trainer, pl_module)
            else:
                nothing = "nothing to measure, for no optimizer is of Adam's family"
                rank_zero_info(f"{VARIABLE}: {nothing}.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks into the optimizers, without which all that follows does nothing."""
        if self._is_on:
            super().on_train_start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps what a monitor keeps."""
        state = AdamMonitor.state_dict(self) if self._is_on else {}
        if state:
            checkpoint[VARIABLE] = state

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on from what it has kept, or an AdamMonitor of the script."""
        of_the_script = checkpoint["callbacks"].get(AdamMonitor.__qualname__, {})
        self.load_state_dict(checkpoint.get(VARIABLE, of_the_script))

    @contextmanager
    def _never_stop(self) -> Iterator[None]:
        """What would be an error where the script has asked for a monitor is a warning."""
        try:
            yield
        except Exception as error:
            self._is_on = False
            ignore(error)

    def _is_first(self, trainer: Trainer) -> bool:
        """Whether no other monitor goes before it: one of the script, or one of its kind."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [each for each in callbacks if isinstance(each, AdamMonitor)]
        first = min(monitors, key=lambda each: isinstance(each, EnvironmentMonitor))
        if not isinstance(first, EnvironmentMonitor):
            rank_zero_info(f"{VARIABLE}: the script has an AdamMonitor of its own, which measures.")
        return first is self

    def _check_processes(self, trainer: Trainer) -> None:
        """All of them have to measure, or each would wait for those that do not."""
        store = shared_store()
        measuring = trainer.world_size if store is None else store.add(self._ballot, 0)
        if measuring != trainer.world_size:
            raise ConfigError(
                f"{measuring} of {trainer.world_size} processes have this value: expected the same"
                f" for all, on every node; hand it on, by mpirun -x {VARIABLE} say"
            )


def _may_be_measured(optimizer: Any) -> bool:
    """Of what wraps an optimizer, as DeepSpeed does, an AdamMonitor says itself what it cannot."""
    return is_measurable(optimizer) or not isinstance(optimizer, Optimizer)
