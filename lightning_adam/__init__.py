"""Adam for PyTorch Lightning: configured from Hydra, measured at the optimizer step.

Public names are imported on first use (PEP 562). Therefore `import lightning_adam` and
`lightning_adam.config`, which every Hydra app loads, import neither torch nor lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_adam.version import __version__

if TYPE_CHECKING:
    from lightning_adam.config.errors import ConfigError
    from lightning_adam.monitor.callback import AdamMonitor
    from lightning_adam.optim.build import build_adam
    from lightning_adam.optim.mixin import AdamMixin
    from lightning_adam.optim.optimizers import build_optimizer
    from lightning_adam.optim.schedulers import build_scheduler
    from lightning_adam.statistics.metric import AdamStatistics

_MODULES = {
    "AdamMixin": "optim.mixin",
    "AdamMonitor": "monitor.callback",
    "AdamStatistics": "statistics.metric",
    "ConfigError": "config.errors",
    "build_adam": "optim.build",
    "build_optimizer": "optim.optimizers",
    "build_scheduler": "optim.schedulers",
}

__all__ = [
    "AdamMixin",
    "AdamMonitor",
    "AdamStatistics",
    "ConfigError",
    "__version__",
    "build_adam",
    "build_optimizer",
    "build_scheduler",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"lightning_adam.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'lightning_adam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
