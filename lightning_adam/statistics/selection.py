"""What is asked of a measurement → checked: statistics, scopes, worst tensors, the kernel.

Imports neither torch nor lightning.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lightning_adam.config.errors import ConfigError, nearest, refusal, type_instead, unknown_field
from lightning_adam.config.forms import typed
from lightning_adam.config.schema import MonitorConfig
from lightning_adam.statistics.catalogue import STATISTICS, select

KERNEL_PACKAGES = {"numba": "'lightning-adam[cpu]'", "triton": "'triton>=3.6'"}
"""What to install for the kernels that are written in another package, which has their name."""


def read_selection(values: Mapping[str, Any], where: str) -> MonitorConfig:
    """Checks those of the monitor's settings that say what is measured.

    Args:
        values: The settings, plain.
        where: The full name of their place.

    Raises:
        ConfigError: If a key is unknown, a value is out of range, or what the kernel is written in
            is not installed.

    Example:
        >>> read_selection({"statistics": "eps_*"}, "AdamStatistics").statistics
        ['eps_*']
    """
    config = typed(values, MonitorConfig, where)
    config.statistics = _patterns(config.statistics, where)
    for name, tensors in config.worst.items():
        if name not in STATISTICS:
            raise unknown_field(f"{where}.worst", name, tensors, STATISTICS)
        if tensors < 1:
            expected = "expected the number of tensors to show, at least 1"
            raise refusal(f"{where}.worst", name, tensors, expected, 5)
    kernel = config.kernel.value
    if kernel in KERNEL_PACKAGES and find_spec(kernel) is None:
        raise ConfigError(
            f"{where}.kernel={kernel}: expected its package to be installed; pip install"
            f" {KERNEL_PACKAGES[kernel]}, or {type_instead(f'{where}.kernel', 'auto')}"
        )
    return config


def _patterns(statistics: Any, where: str) -> list[str]:
    """A selection of statistics as a list, each of which means at least one."""
    patterns = [statistics] if isinstance(statistics, str) else statistics
    expected = "expected headline, all, or a list of names and globs of statistics"
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise refusal(where, "statistics", statistics, expected, ["headline", "eps_*"])
    for pattern in patterns:
        if not select([pattern]):
            # Without a cutoff there is always something near.
            (close,) = nearest(pattern.rpartition("/")[2], STATISTICS, 1, cutoff=0.0)
            expected += f", but {pattern} is none"
            raise refusal(where, "statistics", statistics, expected, [close])
    return patterns
