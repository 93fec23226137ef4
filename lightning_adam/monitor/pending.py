"""Asynchronous copies of measurements from the device to the host."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lightning_adam.statistics.measurement import Measurement
from lightning_adam.statistics.sharding import LocalStats

POLL_S = 0.001


class AsyncHostCopy:
    """Copies tensors to the host without waiting for the device.

    Args:
        tensors: The tensors. Those on the CPU are not copied.

    Example:
        >>> copy = AsyncHostCopy([torch.tensor(2.0)])
        >>> copy.has_arrived(), copy.tensors()
        (True, [tensor(2.)])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [_copy(each) for each in tensors]
        # One event per device.
        devices = dict.fromkeys(each.device for each in tensors if each.is_cuda)
        self._events = [_recorded_event(each) for each in devices]

    def has_arrived(self) -> bool:
        """Whether `tensors` returns without waiting."""
        return all(each.query() for each in self._events)  # type: ignore[no-untyped-call]

    def tensors(self) -> list[Tensor]:
        """Waits for the copies, and returns them."""
        for event in self._events:
            event.synchronize()
        return self._copies


class PendingMeasurement:
    """A measurement that is being copied to the host.

    Args:
        measurement: The measurement.
        flags: How many steps the device has skipped so far, and whether it skipped this one
            (default: empty, the device cannot skip steps).
        loss: The loss of the step's batch (default: None).
    """

    def __init__(
        self, measurement: Measurement, flags: tuple[Tensor, ...] = (), loss: Tensor | None = None
    ) -> None:
        self._measurement = measurement
        self._has_flags, self._has_loss = bool(flags), loss is not None
        sums, maxima, exponents, status = measurement.stats
        self._split = sums.shape[1]
        # On an accelerator, one copy of both matrices is faster than two.
        matrices = [torch.cat([sums, maxima], dim=1)] if sums.is_cuda else [sums, maxima]
        scalars = [*flags] if loss is None else [*flags, loss]
        self._copy = AsyncHostCopy([exponents, status, *scalars, *matrices])

    def has_arrived(self) -> bool:
        """Whether the other methods return without waiting."""
        return self._copy.has_arrived()

    def measurement(self) -> Measurement:
        """Waits for the measurement, and returns it on the host."""
        exponents, status, *others = self._copy.tensors()
        matrices = others[self._has_flags * 2 + self._has_loss :]
        joined = matrices[0] if len(matrices) == 1 else None
        sums, maxima = matrices if joined is None else joined.tensor_split([self._split], dim=1)
        return self._measurement.with_stats(LocalStats(sums, maxima, exponents, status))

    def flags(self) -> tuple[int, bool] | None:
        """Waits for the flags, and returns them; None if the device cannot skip steps."""
        if not self._has_flags:
            return None
        _, _, skipped, is_skipped, *_ = self._copy.tensors()
        return int(skipped), bool(is_skipped)

    def loss(self) -> float:
        """Waits for the loss, and returns it; NaN if unknown."""
        return float(self._copy.tensors()[2 + 2 * self._has_flags]) if self._has_loss else math.nan


class Pending(Protocol):
    """Data that is being copied to the host."""

    def has_arrived(self) -> bool:
        """Whether the data can be used without waiting."""


T = TypeVar("T", bound=Pending)


class PendingQueue(deque[T]):
    """A queue of copies to the host, which yields them in order once they have arrived.

    Example:
        >>> queue = PendingQueue[AsyncHostCopy]()
        >>> queue.append(AsyncHostCopy([torch.tensor(2.0)]))
        >>> [copy.tensors() for copy in queue.arrived()]
        [[tensor(2.)]]
    """

    def arrived(self, wait_s: float = 0.0) -> Iterator[T]:
        """Yields and removes entries up to the first that has not arrived.

        Args:
            wait_s: How long to wait for all of them together, in seconds (default: 0). `math.inf`
                yields all entries, and using one waits for it.
        """
        deadline = time.monotonic() + wait_s
        while self:
            if math.isfinite(wait_s) and not has_arrived_by(self[0], deadline):
                return
            yield self.popleft()


def has_arrived_by(entry: Pending, deadline: float) -> bool:
    """Waits until an entry has arrived; returns False if the deadline passes first.

    Args:
        entry: The entry; polled at least once.
        deadline: The deadline, in seconds of `time.monotonic`.
    """
    while not entry.has_arrived():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _copy(tensor: Tensor) -> Tensor:
    """Starts an asynchronous copy to pinned memory."""
    if not tensor.is_cuda:
        return tensor
    # Explicit device, as torch.set_default_device also applies to pinned memory.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _recorded_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
