"""`DeviceTable`: addresses and settings of the tensors on the device, updated incrementally."""

import ctypes
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_adam.statistics.kernels.triton_rows import BY_VALUE, DTYPE_CODES, SENT, TensorRow
from lightning_adam.statistics.param_states import (
    MOMENTS,
    ParamState,
    ParamStates,
    Settings,
    addresses_of,
    same_layout,
)

Words = npt.NDArray[np.int64]
_SCALARS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
"""The supported dtypes of scalars."""
_ALIGNMENT = 2
"""Alignment in words, as Triton recompiles a kernel for arguments not aligned to 16 bytes."""


class DeviceWords:
    """Sections of 64-bit words on a device. An update only copies the range that changed.

    Args:
        device: The device.
        sizes: Number of words of each section.
    """

    def __init__(self, device: torch.device, *sizes: int) -> None:
        aligned = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._starts = np.cumsum([0, *aligned]).tolist()
        self._words = np.zeros(self._starts[-1], dtype=np.int64)
        self._tensor = to_device(self._words, device)
        self.sections = torch.split(self._tensor, aligned)

    def update(self, *sections: Words) -> None:
        """Sets the words of the sections, in the order of the current stream."""
        words = np.zeros_like(self._words)
        for start, section in zip(self._starts, sections, strict=False):
            words[start : start + len(section)] = section
        changed = np.flatnonzero(words != self._words)
        if len(changed):
            start, end = int(changed[0]), int(changed[-1]) + 1
            source = _pinned(words[start:end], self._tensor.device)
            self._tensor[start:end].copy_(source, non_blocking=True)
        self._words = words


def to_device(words: npt.ArrayLike, device: torch.device) -> Tensor:
    """Copies words to a device without waiting for it."""
    return _pinned(words, device).to(device, non_blocking=True)


def _pinned(words: npt.ArrayLike, device: torch.device) -> Tensor:
    # Copies are only asynchronous from pinned memory, which is not reused before they end.
    array = np.asarray(words, dtype=np.int64)
    is_pinned = device.type == "cuda"
    pinned = torch.empty(len(array), dtype=torch.int64, device="cpu", pin_memory=is_pinned)
    pinned.numpy()[:] = array
    return pinned


class DeviceTable:
    """The table of the tensors of a layout on the device.

    Args:
        states: The tensors. Unsupported ones are not in the table.
        chunk: Elements per chunk.
    """

    def __init__(self, states: ParamStates, chunk: int) -> None:
        self.device = states.parameter[0].device
        is_readable = [_is_readable(state) for state in states]
        own = [index for index, each in enumerate(is_readable) if each]
        self.unsupported = [index for index, each in enumerate(is_readable) if not each]
        """Indexes of the unsupported tensors."""
        self._own = own if self.unsupported else None
        self._steps, step_codes = _scalar_words(self.select(states.step), self.device)
        self._on_host = step_codes == int(BY_VALUE)
        self._host_steps = list(map(_cell, compress(self.select(states.step), self._on_host)))
        names = ("parameter", "grad", *MOMENTS)
        p, g, m, v, v_max = (self.select(getattr(states, name)) for name in names)
        codes = np.array([[DTYPE_CODES[each.dtype] for each in kind] for kind in (p, g, m, v)])
        elements = np.array(list(map(Tensor.numel, p)), dtype=np.int64)
        chunks = -(-elements // chunk)
        addresses = map(addresses_of, (p, m, v, v_max))
        counts = (elements, np.cumsum(chunks) - chunks, states.scopes.groups[own], own)
        row = TensorRow._make((None, *addresses, *codes, step_codes, *counts))
        self.tensors, self.chunks = len(own), int(chunks.sum())
        is_double = (codes == DTYPE_CODES[torch.float64]).any(axis=0)
        self.codes = _shared(codes[:, ~is_double])
        """The common dtypes of p, g, m and v, without those of tensors with float64."""
        doubles = [own[index] for index in np.flatnonzero(is_double)]
        self.not_float32 = sorted([*self.unsupported, *doubles])
        """Indexes of the tensors that are unsupported or partly in float64."""
        self.has_amsgrad = any(row.v_max)
        self.rows = to_device(np.stack(row[1:], axis=1).reshape(-1), self.device)
        self.tensors_of_chunks = to_device(np.repeat(np.arange(self.tensors), chunks), self.device)
        self.unsupported_on_device = to_device(self.unsupported, self.device)
        settings = len(states.settings) * 2 * int(SENT)
        self._changing = DeviceWords(self.device, self.tensors, self.tensors, settings)
        self.steps, self.grads, self.groups = self._changing.sections
        self.slots: dict[tuple[str, ...], Tensor] = {}
        """The slots of the columns in the result."""
        self._scalars: list[Any] = []

    def update(self, states: ParamStates) -> None:
        """Sends what changed since the last measurement: gradients, hyperparameters, host steps."""
        steps = self._steps
        if self._host_steps:
            steps = steps.copy()
            steps[self._on_host] = _bits([step.value for step in self._host_steps])
        grads = np.array(addresses_of(self.select(states.grad)), dtype=np.int64)
        # Keep converted scalars alive until the device has read them.
        self._scalars = [each for settings in states.settings for each in _sent(settings)]
        groups = [each.reshape(-1, int(SENT)) for each in _scalar_words(self._scalars, self.device)]
        self._changing.update(steps, grads, np.stack(groups, axis=1).reshape(-1))

    def select(self, values: Sequence[Any]) -> list[Any]:
        """Selects the values of the supported tensors."""
        return list(values) if self._own is None else [values[index] for index in self._own]


def _is_readable(state: ParamState) -> bool:
    p, v, v_max, step = state.parameter, state.exp_avg_sq, state.max_exp_avg_sq, state.step
    if v is None or (v_max is not None and v_max.dtype != v.dtype):
        return False
    tensors = [p, state.grad, state.exp_avg, v] + ([] if v_max is None else [v_max])
    if any(each.dtype not in DTYPE_CODES or each.device != p.device for each in tensors):
        return False
    if isinstance(step, Tensor) and step.dtype not in _SCALARS:
        return False
    return same_layout(state)


def _cell(step: Tensor | float) -> Any:
    """Returns a pointer to a step on the host, which is five times faster than `Tensor.item`."""
    if isinstance(step, Tensor):
        return _SCALARS[step.dtype].from_address(step.data_ptr())
    return ctypes.c_double(step)


def _sent(settings: Settings) -> Iterator[Any]:
    """Yields the hyperparameters in the order of `SettingsRow`."""
    for value in settings[:5]:
        if isinstance(value, Tensor) and value.dtype not in _SCALARS:
            value = value.double()
        yield value
    yield settings.decoupled
    yield -1 if settings.maximize else 1


def _scalar_words(values: Sequence[Any], device: torch.device) -> tuple[Words, Words]:
    """The addresses of scalars on the device, the bits of others, and a code for each."""
    is_own = [_is_on(device, each) for each in values]
    pairs = list(zip(values, is_own, strict=True))
    words = _bits([0.0 if own else float(each) for each, own in pairs])
    words[is_own] = [each.data_ptr() for each, own in pairs if own]
    codes = [DTYPE_CODES[each.dtype] if own else int(BY_VALUE) for each, own in pairs]
    return words, np.array(codes, dtype=np.int64)


def _is_on(device: torch.device, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _bits(numbers: Sequence[float]) -> Words:
    """Returns the bits of numbers in float64."""
    return np.array(numbers, dtype=np.float64).view(np.int64)


def _shared(codes: Words) -> tuple[int, ...]:
    """Returns the common code of each kind of tensor; -1 if they differ."""
    if not codes.shape[1]:
        return (-1,) * len(codes)
    return tuple(int(own[0]) if (own == own[0]).all() else -1 for own in codes)
