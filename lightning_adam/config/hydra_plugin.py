"""Hydra plugin: makes the config groups and schemas available in every Hydra app.

Every Hydra app of the environment imports this file, so its imports must be fast.
"""

from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.config.schedule import SCHEDULES, CustomSchedulerConfig
from lightning_adam.config.tune import TuneConfig

PROVIDER = "lightning_adam"


class LightningAdamSearchPath(SearchPathPlugin):
    """Appends the folder `conf` to the search path, and stores the schemas."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before each composition.

        Hydra 1.4 finds the class twice: in the namespace package and through the entry point. The
        second call changes nothing.
        """
        folder = f"file://{_conf_folder()}"
        if any(entry.path == folder for entry in search_path.get_path()):
            return
        search_path.append(provider=PROVIDER, path=folder)
        _store_schemas()


def _conf_folder() -> Path:
    """Returns `conf` in the installed package, or in the repository of an editable install."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _store_schemas() -> None:
    """Stores the schemas that the presets refer to.

    They have no package, because each preset declares one. They have no group, so that `--help`
    and tab completion list only the presets.
    """
    monitor = OmegaConf.structured(MonitorConfig)
    # Without this, Hydra would require a + before `adam_monitor.worst={grad_norm:3}`.
    OmegaConf.set_struct(monitor.worst, False)
    OmegaConf.set_struct(monitor.findings, False)
    schemas: dict[str, Any] = {
        "adam": AdamConfig,
        "monitor": monitor,
        "tune": TuneConfig,
        **SCHEDULES,
    }
    # Its preset is an open node, because all keys but the plugin's go to the target.
    del schemas[CustomSchedulerConfig.name]
    store = ConfigStore.instance()
    for name, node in schemas.items():
        if f"{PROVIDER}_{name}.yaml" not in store.repo:
            store.store(name=f"{PROVIDER}_{name}", node=node, provider=PROVIDER)
