"""Measurements on their way from the device to the host, which wait for nothing."""

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
    """Copies tensors to the host without waiting for their devices.

    Args:
        tensors: The tensors; those on the CPU are not copied.

    Example:
        >>> copy = AsyncHostCopy([torch.tensor(2.0)])
        >>> copy.has_arrived(), copy.tensors()
        (True, [tensor(2.)])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [_copy(each) for each in tensors]
        # An event sees the work of one device.
        devices = dict.fromkeys(each.device for each in tensors if each.is_cuda)
        self._events = [_recorded_event(each) for each in devices]

    def has_arrived(self) -> bool:
        """Whether `tensors` returns without waiting."""
        return all(each.query() for each in self._events)  # type: ignore[no-untyped-call]

    def tensors(self) -> list[Tensor]:
        """Returns the copies; waits for them."""
        for event in self._events:
            event.synchronize()
        return self._copies


class PendingMeasurement:
    """A measurement on its way to the host, with what was known of its step.

    Args:
        measurement: The measurement.
        flags: How many steps the device has skipped so far, and whether it skipped this one
            (default: it cannot skip steps).
        loss: The loss of the step's batch (default: none).
    """

    def __init__(
        self, measurement: Measurement, flags: tuple[Tensor, ...] = (), loss: Tensor | None = None
    ) -> None:
        self._measurement = measurement
        self._has_flags, self._has_loss = bool(flags), loss is not None
        sums, maxima, exponents, status = measurement.stats
        self._split = sums.shape[1]
        # On an accelerator one copy of both takes less time than two.
        matrices = [torch.cat([sums, maxima], dim=1)] if sums.is_cuda else [sums, maxima]
        scalars = [*flags] if loss is None else [*flags, loss]
        self._copy = AsyncHostCopy([exponents, status, *scalars, *matrices])

    def has_arrived(self) -> bool:
        """Whether the other methods return without waiting."""
        return self._copy.has_arrived()

    def measurement(self) -> Measurement:
        """Returns the measurement on the host; waits for it."""
        exponents, status, *others = self._copy.tensors()
        matrices = others[self._has_flags * 2 + self._has_loss :]
        joined = matrices[0] if len(matrices) == 1 else None
        sums, maxima = matrices if joined is None else joined.tensor_split([self._split], dim=1)
        return self._measurement.with_stats(LocalStats(sums, maxima, exponents, status))

    def flags(self) -> tuple[int, bool] | None:
        """Returns the flags; waits for them. None if the device cannot skip steps."""
        if not self._has_flags:
            return None
        _, _, skipped, is_skipped, *_ = self._copy.tensors()
        return int(skipped), bool(is_skipped)

    def loss(self) -> float:
        """Returns the loss, NaN if it is not known; waits for it."""
        return float(self._copy.tensors()[2 + 2 * self._has_flags]) if self._has_loss else math.nan


class Pending(Protocol):
    """Anything on its way to the host."""

    def has_arrived(self) -> bool:
        """Whether it can be used without waiting."""


T = TypeVar("T", bound=Pending)


class PendingQueue(deque[T]):
    """Hands out what was sent, in order, once it has arrived.

    Example:
        >>> queue = PendingQueue[AsyncHostCopy]()
        >>> queue.append(AsyncHostCopy([torch.tensor(2.0)]))
        >>> [copy.tensors() for copy in queue.arrived()]
        [[tensor(2.)]]
    """

    def arrived(self, wait_s: float = 0.0) -> Iterator[T]:
        """Yields and removes entries until one has not arrived.

        Args:
            wait_s: How long to poll for those that have not arrived, in seconds, altogether
                (default: 0); `math.inf` yields all of them, so that using one waits for it.
        """
        deadline = time.monotonic() + wait_s
        while self:
            if math.isfinite(wait_s) and not has_arrived_by(self[0], deadline):
                return
            yield self.popleft()


def has_arrived_by(entry: Pending, deadline: float) -> bool:
    """Polls until an entry has arrived; returns False if it has not by the deadline.

    Args:
        entry: The entry, which is polled once at least.
        deadline: In the seconds of `time.monotonic`.
    """
    while not entry.has_arrived():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _copy(tensor: Tensor) -> Tensor:
    """Begins a copy to pinned memory, into which the device can write by itself."""
    if not tensor.is_cuda:
        return tensor
    # torch.set_default_device applies to pinned memory too.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _recorded_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
