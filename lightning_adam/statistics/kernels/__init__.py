"""The kernels: each reads every element once and returns a row of columns for each tensor.

All have the functions of `eager`, the reference. The fast kernels use it for tensors that they
cannot read, such as non-contiguous ones. Devices without float64 are measured in a copy on the CPU.
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
"""The fast kernel by device type, named after its package."""
WITHOUT_FLOAT64 = {"mps"}
"""Device types without float64 in torch."""


def measure(states: ParamStates, columns: Sequence[str], kernel: str = "auto") -> Tensor:
    """Returns the columns of each tensor.

    Args:
        states: Parameters on any devices, right after the step.
        columns: Names of `COLUMNS`, sums before maxima.
        kernel: `auto`, `eager`, `numba` or `triton`. `eager` measures tensors on devices that the
            kernel does not support (default: auto, the fast kernel if it is installed).

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
    common = _common_device(parts)
    if len(rows) == 1:
        return rows[common]
    together = torch.empty(len(states), len(columns), dtype=torch.float64, device=common)
    for device, (indexes, _) in parts.items():
        positions = torch.tensor(indexes, device="cpu").to(common, non_blocking=True)
        together.index_copy_(0, positions, rows[device].to(common, non_blocking=True))
    return together


def count_exponents(
    states: ParamStates, groups: Sequence[int], number: int, kernel: str = "auto"
) -> Tensor:
    """Counts active elements by binary exponent, for each of `QUANTITIES` and group of tensors.

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
    counts = torch.zeros(shape, dtype=torch.int64, device=_common_device(parts))
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
            by_device[_measuring_device(grad.device)].append(index)
    common = _common_device(by_device)
    squares = torch.zeros(len(grads), dtype=torch.float64, device=common)
    for device, indexes in by_device.items():
        own: list[Any] = [grads[index].to(device) for index in indexes]  # type: ignore[union-attr]
        found = _kernel(kernel, device).grad_squares(own)
        positions = torch.tensor(indexes, device="cpu").to(common, non_blocking=True)
        squares.index_copy_(0, positions, found.to(common, non_blocking=True))
    return squares


def missing(device_types: Iterable[str]) -> list[str]:
    """Returns the fast kernels for some device types that are not installed.

    Example:
        >>> missing(["meta"])
        []
    """
    wanted = {FAST[each] for each in device_types if each in FAST}
    return sorted(name for name in wanted if not is_installed(name))


@cache
def is_installed(kernel: str) -> bool:
    """Returns whether the package of a kernel can be imported.

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
    """Returns whether the first measurement compiles the CPU kernel, which takes seconds.

    Args:
        device_types: Device types of the parameters.
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
    """Returns the indexes and states of the tensors by device."""
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
        parts[_measuring_device(device)] = (own, part)
    return parts


def _measuring_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def _on_cpu(states: ParamStates) -> ParamStates:
    """Copies the tensors to the CPU."""
    settings = [Settings(*map(_to_cpu, of)) for of in states.settings]
    rows = [[*map(_to_cpu, state[2:])] for state in states]
    return ParamStates.of_columns(states.scopes, settings, rows)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _common_device(devices: Iterable[torch.device]) -> torch.device:
    """Returns the device for the results of several devices: an accelerator if there is one."""
    return min(devices, key=lambda device: device.type == "cpu", default=torch.device("cpu"))
