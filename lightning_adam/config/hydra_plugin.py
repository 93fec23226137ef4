"""Makes our config groups and schemas visible in every Hydra app, with no import in the app.

Hydra loads this in every app of the environment: it imports neither torch nor lightning.
"""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from lightning_adam.config import schema

PROVIDER = "lightning_adam"


class LightningAdamSearchPath(SearchPathPlugin):
    """Appends our `conf` folder to the search path and stores the schemas."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before each composition.

        Hydra 1.4 finds this class twice, as a namespace package and as an entry point; the second
        call finds the work done.
        """
        folder = f"file://{_conf_folder()}"
        if any(entry.path == folder for entry in search_path.get_path()):
            return
        search_path.append(provider=PROVIDER, path=folder)
        _store_schemas()


def _conf_folder() -> Path:
    """The `conf` folder in the installed package, else (editable install) the repository's."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _store_schemas() -> None:
    """Stores the schemas for the presets to name.

    They have no package, for each preset says where it belongs by default, and no group, so that
    `--help` and tab completion offer the presets alone.
    """
    monitor = OmegaConf.structured(schema.MonitorConfig)
    # Without this Hydra would ask for a + before `adam_monitor.worst={grad_norm:3}`.
    OmegaConf.set_struct(monitor.worst, False)
    OmegaConf.set_struct(monitor.findings, False)
    schemas = {
        "adam": schema.AdamConfig,
        "monitor": monitor,
        "tune": schema.TuneConfig,
        **schema.SCHEDULERS,
    }
    store = ConfigStore.instance()
    for name, node in schemas.items():
        if f"{PROVIDER}_{name}.yaml" not in store.repo:
            store.store(name=f"{PROVIDER}_{name}", node=node, provider=PROVIDER)
