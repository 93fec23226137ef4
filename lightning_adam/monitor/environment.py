"""What Lightning attaches to every Trainer: what LIGHTNING_ADAM_MONITOR asks for, above all.

Lightning asks for our callbacks at every Trainer of the environment. So this file imports nothing
that costs time, and nothing that is wrong with the variable stops a training.
"""

import os
import shlex
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback

VARIABLE = "LIGHTNING_ADAM_MONITOR"
TRIAL = "LIGHTNING_ADAM_TRIAL"
"""Who a trial of `hydra/sweeper=adam_tune` is: see `lightning_adam.tune.job`."""
ON = ("1", "true", "on")
OFF = ("", "0", "false", "off")
PLACE = "adam_monitor"
"""The monitor's place in a Hydra app: what is typed there can be pasted."""


def callbacks() -> "list[Callback]":
    """What Lightning adds to each Trainer: what a search needs in its trials, and a monitor.

    A monitor is added if the variable asks for one: it holds `1`, `true` or `on`, or settings as
    they are typed for a Hydra app, `every_n_steps=10 statistics=all`, each with or without
    `adam_monitor.` before it; `0`, `false`, `off` or nothing at all mean none. What cannot be
    understood is a warning.

    Example:
        >>> callbacks()
        []
    """
    return [*_of_trial(), *_monitors()]


def _of_trial() -> "list[Callback]":
    if not os.environ.get(TRIAL):
        return []
    from lightning_adam.tune.job import identity
    from lightning_adam.tune.trial_callback import TrialCallback

    who = identity()
    return [] if who is None else [TrialCallback(who)]


def _monitors() -> "list[Callback]":
    given = os.environ.get(VARIABLE, "").strip()
    if given.lower() in OFF:
        return []
    try:
        from lightning_adam.monitor.environment_monitor import EnvironmentMonitor

        return [EnvironmentMonitor(**settings(given))]
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
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lightning_adam.config.errors import ConfigError, unknown_field
    from lightning_adam.config.forms import values_of
    from lightning_adam.config.schema import MonitorConfig
    from lightning_adam.monitor.settings import read_monitor

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
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_adam.config.errors import ConfigError, warn_only

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
