"""Callbacks for every Trainer: the entry point of both `callbacks_factory` groups.

A Trainer of `lightning` loads one group, a Trainer of `pytorch_lightning` the other. Every Trainer
of the environment loads this file, so it imports a library only if an environment variable requests
a callback.
"""

import os
import traceback
from typing import TYPE_CHECKING

from lightning_adam.config.variables import MONITOR_VARIABLE, TRIAL_VARIABLE

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def callbacks() -> "list[Callback]":
    """Returns the callbacks that the environment variables request.

    `LIGHTNING_ADAM_MONITOR` attaches an AdamMonitor. `1`, `true` or `on` select the defaults;
    overrides such as `every_n_steps=10 statistics=all` configure it, with or without the prefix
    `adam_monitor.`; `0`, `false`, `off` or an empty value attach none. A value that cannot be
    parsed causes a warning. `hydra/sweeper=adam_tune` sets `LIGHTNING_ADAM_TRIAL` for its trials.

    Example:
        >>> callbacks()
        []
    """
    return [*_trial_callbacks(), *_monitors()]


def _trial_callbacks() -> "list[Callback]":
    if not os.environ.get(TRIAL_VARIABLE):
        return []
    from lightning_adam.tune.trial_callback import trial_callbacks

    return trial_callbacks()


def _monitors() -> "list[Callback]":
    value = os.environ.get(MONITOR_VARIABLE, "").strip()
    if value.lower() in ("", "0", "false", "off"):
        return []
    try:
        from lightning_adam.monitor.environment import environment_monitors
    except Exception:
        from lightning_adam.monitor.failsafe import warn_only

        warn_only(
            f"{MONITOR_VARIABLE} is ignored; training is not affected.\n{traceback.format_exc()}"
        )
        return []
    return environment_monitors(value)
