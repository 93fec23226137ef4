"""The kernels: each reads every element once and returns one row of columns a tensor.

All have the functions of `eager`, the reference. The fast ones leave to it what they cannot read,
such as tensors with gaps in memory. Devices without float64 are measured in a copy on the CPU.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.param_states import Layout, ParamStates, Settings

FAST = {"cpu": "numba", "cuda": "triton"}
"""The fast kernel of each type of device, named after its package."""
WITHOUT_FLOAT64 = {"mps"}
"""Types of device on which torch has no float64."""


def measure(states: ParamStates, columns: Sequence[str], kernel: str = "auto") -> Tensor:
    """Returns the columns of each tensor.

    Args:
        states: Parameters on any devices, right after the step.
        columns: Names of `COLUMNS`, sums before maxima.
        kernel: Kernel for the tensors of its type of device: `auto`, `eager`, `numba` or `triton`;
            `eager` measures the others (default: auto, the fast one if it is installed).

    Returns:
        The matrix `[tensors, columns]` in float64, on an accelerator if any tensor is.

    Example:
        >>> measure(ParamStates.of([]), ["elements", "grad_squares"]).shape
        torch.Size([0, 2])
    """
    if not (len(states) and columns):
        return torch.zeros(len(states), len(columns), dtype=torch.float64, device="cpu")
    parts = _by_device(states)
    rows: dict[torch.device, Tensor] = {
        device: _kernel(kernel, device).measure(part, columns)
        for device, (_, part) in parts.items()
    }
    home = _home(parts)
    if len(rows) == 1:
        return rows[home]
    together = torch.empty(len(states), len(columns), dtype=torch.float64, device=home)
    for device, (indexes, _) in parts.items():
        positions = torch.tensor(indexes, device="cpu").to(home, non_blocking=True)
        together.index_copy_(0, positions, rows[device].to(home, non_blocking=True))
    return together


def count_exponents(
    states: ParamStates, groups: Sequence[int], number: int, kernel: str = "auto"
) -> Tensor:
    """Counts active elements by the binary exponent of each of `QUANTITIES`, a group of tensors.

    Args:
        states: Parameters on any devices, right after the step.
        groups: Index of each tensor's group in the result.
        number: Number of groups.
        kernel: As for `measure` (default: auto).

    Returns:
        Counts, `[number, len(QUANTITIES), BINS]` in int64, on an accelerator if any tensor is.

    Example:
        >>> count_exponents(ParamStates.of([]), [], 2).shape
        torch.Size([2, 4, 256])
    """
    parts = _by_device(states)
    shape = (number, len(QUANTITIES), BINS)
    counts = torch.zeros(shape, dtype=torch.int64, device=_home(parts))
    for device, (indexes, part) in parts.items():
        own = [groups[index] for index in indexes]
        found = _kernel(kernel, device).count_exponents(part, own, number)
        counts += found.to(counts.device, non_blocking=True)
    return counts


def grad_squares(grads: Sequence[Tensor | None], kernel: str = "auto") -> Tensor:
    """Returns Σg² of gradients; 0 for None, NaN for sparse ones.

    Args:
        grads: Gradients on any devices.
        kernel: As for `measure` (default: auto).

    Returns:
        The sums, `[gradients]` in float64, on an accelerator if any gradient is.

    Example:
        >>> grad_squares([torch.tensor([3.0, 4.0]), None])
        tensor([25.,  0.], dtype=torch.float64)
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, grad in enumerate(grads):
        if grad is not None:
            by_device[_measured_on(grad.device)].append(index)
    home = _home(by_device)
    squares = torch.zeros(len(grads), dtype=torch.float64, device=home)
    for device, indexes in by_device.items():
        own: list[Any] = [grads[index].to(device) for index in indexes]  # type: ignore[union-attr]
        found = _kernel(kernel, device).grad_squares(own)
        positions = torch.tensor(indexes, device="cpu").to(home, non_blocking=True)
        squares.index_copy_(0, positions, found.to(home, non_blocking=True))
    return squares


def missing(device_types: Iterable[str]) -> list[str]:
    """Returns the fast kernels of these types of device that are not installed.

    Example:
        >>> missing(["meta"])
        []
    """
    wanted = {FAST[each] for each in device_types if each in FAST}
    return sorted(name for name in wanted if not is_installed(name))


@cache
def is_installed(kernel: str) -> bool:
    """Returns whether the package that a kernel is written in can be imported.

    Example:
        >>> is_installed("eager")
        True
    """
    try:
        import_module(f"{__name__}.{kernel}")
    except ImportError:
        return False
    return True


def will_compile(device_types: Iterable[str], kernel: str = "auto") -> bool:
    """Returns whether the first measurement compiles the CPU kernel, which takes some seconds.

    Args:
        device_types: Types of device of the parameters.
        kernel: As for `measure` (default: auto).
    """
    if "cpu" not in device_types or kernel not in ("auto", "numba") or not is_installed("numba"):
        return False
    from lightning_adam.statistics.kernels.numba import is_compiled

    return not is_compiled()


def _kernel(name: str, device: torch.device) -> ModuleType:
    fast = FAST.get(device.type, "eager")
    chosen = fast if name in ("auto", fast) and is_installed(fast) else "eager"
    return import_module(f"{__name__}.{chosen}")


def _by_device(states: ParamStates) -> dict[torch.device, tuple[list[int], ParamStates]]:
    """The indexes and states of each device's tensors."""
    key = "by device"
    if key not in states.layout.prepared:
        indexes: dict[torch.device, list[int]] = defaultdict(list)
        for index, parameter in enumerate(states.parameter):
            indexes[parameter.device].append(index)
        states.layout.prepared[key] = {device: (own, Layout()) for device, own in indexes.items()}
    parts = {}
    for device, (own, layout) in states.layout.prepared[key].items():
        part = states.select(own)
        if device.type in WITHOUT_FLOAT64:
            part = _on_cpu(part)
        elif part is not states:
            part = replace(part, layout=layout)
        parts[_measured_on(device)] = (own, part)
    return parts


def _measured_on(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def _on_cpu(states: ParamStates) -> ParamStates:
    """Copies of the tensors on the CPU."""
    settings = [Settings(*map(_to_cpu, of)) for of in states.settings]
    rows = [[*map(_to_cpu, state[2:])] for state in states]
    return ParamStates.of_columns(states.scopes, settings, rows)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _home(devices: Iterable[torch.device]) -> torch.device:
    """The device on which the rows of several devices meet, so that none is waited for."""
    return min(devices, key=lambda device: device.type == "cpu", default=torch.device("cpu"))
