"""Validates the statistics, tensors and kernel in the monitor's config."""

from importlib.util import find_spec
from typing import Any

from lightning_adam.config.errors import nearest
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.parsing import ParsedConfig
from lightning_adam.statistics.catalogue import STATISTICS, select

KERNEL_PACKAGES = {"numba": "'lightning-adam[cpu]'", "triton": "'triton>=3.6'"}
"""The packages of the compiled kernels, with the requirements to install."""


def check_selection(monitor: ParsedConfig[MonitorConfig]) -> None:
    """Raises if a name or kernel is not available. Converts `statistics` to a list.

    Args:
        monitor: The monitor's config. `statistics`, `worst` and `kernel` are checked.

    Raises:
        ConfigError: If a name does not exist, or the package of the kernel is not installed.

    Example:
        >>> from lightning_adam.config.monitor import parse_monitor
        >>> monitor = parse_monitor({"statistics": "eps_*"})
        >>> check_selection(monitor)
        >>> monitor.config.statistics
        ['eps_*']
    """
    config, path = monitor.config, monitor.path
    statistics = config.statistics
    config.statistics = [statistics] if isinstance(statistics, str) else statistics
    problem = _problem(config.statistics)
    if problem is not None:
        raise (path / "statistics").invalid(statistics, *problem)
    for name, tensors in config.worst.items():
        place = path / "worst" / name
        if name not in STATISTICS:
            raise place.unknown(tensors, STATISTICS, "a statistic")
        if tensors < 1:
            raise place.invalid(tensors, "must be at least 1, a number of tensors", 5)
    kernel = config.kernel.value
    if kernel in KERNEL_PACKAGES and find_spec(kernel) is None:
        place = path / "kernel"
        raise place.error(
            f"is not installed: pip install {KERNEL_PACKAGES[kernel]}",
            place.suggest("auto"),
            value=kernel,
        )


def _problem(patterns: Any) -> tuple[str, list[str]] | None:
    """Returns the problem of a selection and a valid one; None if the selection is valid."""
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        return "must be headline, all, or a list of names and globs", ["headline", "eps_*"]
    for pattern in patterns:
        if not select([pattern]):
            close = nearest(pattern.rpartition("/")[2], STATISTICS, 1, cutoff=0.0)
            return f"matches no statistic: {pattern}", close
    return None
