"""The kernels: they read each element once and return a row of columns for each tensor.

All have the two functions of `eager`, the reference. The others are faster, and leave to it the
tensors that float32 does not do justice to.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.views import TensorView

FAST = {"cpu": "numba", "cuda": "triton"}
"""The fast kernel of a type of device, named after the package that it is written in."""


def measure(views: Sequence[TensorView], columns: Sequence[str], kernel: str = "auto") -> Tensor:
    """What the columns say of each tensor.

    Args:
        views: Tensors of any devices, right after the step.
        columns: Names of `COLUMNS`, in their order.
        kernel: What measures the tensors of its type of device: `auto`, `eager`, `numba` or
            `triton`; `eager` measures the others (default: auto, the fast one if it is installed).

    Returns:
        The matrix `[tensors, columns]` in float64, on an accelerator if any tensor is.

    Example:
        >>> measure([], ["elements", "grad_squares"]).shape
        torch.Size([0, 2])
    """
    if not (views and columns):
        return torch.zeros(len(views), len(columns), dtype=torch.float64)
    places = _by_device(views)
    rows: dict[torch.device, Tensor] = {
        device: _kernel(kernel, device).measure([views[each] for each in own], columns)
        for device, own in places.items()
    }
    home = _home(places)
    if len(rows) == 1:
        return rows[home]
    together = torch.empty(len(views), len(columns), dtype=torch.float64, device=home)
    for device, own in places.items():
        positions = torch.tensor(own).to(home, non_blocking=True)
        together.index_copy_(0, positions, rows[device].to(home, non_blocking=True))
    return together


def count_exponents(
    views: Sequence[TensorView], groups: Sequence[int], kernel: str = "auto"
) -> Tensor:
    """Active elements by the binary exponent of each of `QUANTITIES`, for each group of tensors.

    Args:
        views: Tensors of any devices, right after the step.
        groups: The position of each tensor's group in what is returned.
        kernel: As for `measure` (default: auto).

    Returns:
        Counts, `[groups, len(QUANTITIES), BINS]` in int64, on an accelerator if any tensor is.

    Example:
        >>> count_exponents([], []).shape
        torch.Size([0, 4, 256])
    """
    places = _by_device(views)
    shape = (max(groups, default=-1) + 1, len(QUANTITIES), BINS)
    counts = torch.zeros(shape, dtype=torch.int64, device=_home(places))
    for device, own in places.items():
        part = _kernel(kernel, device)
        some = part.count_exponents([views[each] for each in own], [groups[each] for each in own])
        counts[: len(some)] += some.to(counts.device, non_blocking=True)
    return counts


def missing(device_types: Iterable[str]) -> list[str]:
    """The fast kernels of these types of device that are not installed.

    Example:
        >>> missing(["meta"])
        []
    """
    wanted = {FAST[each] for each in device_types if each in FAST}
    return sorted(name for name in wanted if not is_installed(name))


@cache
def is_installed(kernel: str) -> bool:
    """Whether the package that a kernel is written in is there, and goes with the others.

    Example:
        >>> is_installed("eager")
        True
    """
    try:
        import_module(f"{__name__}.{kernel}")
    except ImportError:
        return False
    return True


def _kernel(name: str, device: torch.device) -> ModuleType:
    fast = FAST.get(device.type, "eager")
    chosen = fast if name in ("auto", fast) and is_installed(fast) else "eager"
    return import_module(f"{__name__}.{chosen}")


def _by_device(views: Sequence[TensorView]) -> dict[torch.device, list[int]]:
    """The positions of each device's tensors."""
    places = defaultdict(list)
    for position, view in enumerate(views):
        places[view.parameter.device].append(position)
    return places


def _home(devices: Iterable[torch.device]) -> torch.device:
    """Where the rows of several devices meet, so that none of them is waited for."""
    return min(devices, key=lambda device: device.type == "cpu", default=torch.device("cpu"))
