"""Plugins for Hydra, installed as `hydra_plugins/lightning_adam.py`, which Hydra scans."""

from collections.abc import Callable
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.hydra_plugin import LightningAdamSearchPath

__all__ = ["AdamTune", "LightningAdamSearchPath"]


class AdamTune(Sweeper):
    """The sweeper `hydra/sweeper=adam_tune`.

    Hydra requires the class to be in the package `hydra_plugins`, and imports this file in every
    app. So it imports the implementation only when it is used.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(
        self,
        *,
        hydra_context: HydraContext,
        task_function: Callable[[DictConfig], Any],
        config: DictConfig,
    ) -> None:
        """Called by Hydra after it has composed the app's config.

        Raises:
            ConfigError: If a setting is invalid, or the extra is not installed.
        """
        try:
            from lightning_adam.tune.job import current_trial
            from lightning_adam.tune.sweeper import AdamSweep, OtherRank
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"hydra/sweeper=adam_tune needs optuna ({error})",
                "Run pip install 'lightning-adam[tune]'",
            ) from error

        trial = current_trial()
        self._sweep = (
            OtherRank(trial, hydra_context, task_function, config)
            if trial
            else AdamSweep(self.settings, hydra_context, task_function, config)
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Called by Hydra with the overrides from the command line."""
        return self._sweep.sweep(arguments)
