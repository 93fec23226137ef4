"""Adam for PyTorch Lightning: configured from Hydra, measured at the optimizer step.

The public names are loaded when they are first used (PEP 562): `import lightning_adam` and
`lightning_adam.schema`, which every Hydra app loads, cost neither torch nor lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_adam.version import __version__

if TYPE_CHECKING:
    from lightning_adam.build import build_adam
    from lightning_adam.errors import ConfigError
    from lightning_adam.mixin import AdamMixin
    from lightning_adam.monitor import AdamMonitor
    from lightning_adam.optimizers import build_optimizer
    from lightning_adam.schedulers import build_scheduler
    from lightning_adam.sharpness.monitor import SharpnessMonitor
    from lightning_adam.statistics.metric import AdamStatistics

_HOMES = {
    "AdamMixin": "mixin",
    "AdamMonitor": "monitor",
    "AdamStatistics": "statistics.metric",
    "ConfigError": "errors",
    "SharpnessMonitor": "sharpness.monitor",
    "build_adam": "build",
    "build_optimizer": "optimizers",
    "build_scheduler": "schedulers",
}

__all__ = [
    "AdamMixin",
    "AdamMonitor",
    "AdamStatistics",
    "ConfigError",
    "SharpnessMonitor",
    "__version__",
    "build_adam",
    "build_optimizer",
    "build_scheduler",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightning_adam.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightning_adam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
