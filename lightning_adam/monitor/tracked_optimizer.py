"""`TrackedOptimizer`: counts the steps of one optimizer and measures those that are due."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam.monitor.cadence import Cadence, Due
from lightning_adam.monitor.failsafe import Failsafe
from lightning_adam.monitor.gradient_processing import GradientProcessing
from lightning_adam.monitor.pending import PendingMeasurement
from lightning_adam.optim.steps import StepCounter
from lightning_adam.statistics.measurement import Measurement
from lightning_adam.statistics.metric import AdamStatistics
from lightning_adam.statistics.sharding import is_sharded


class MeasuredStep(NamedTuple):
    """A measurement of the current batch."""

    measurement: Measurement
    step: int
    """The optimizer step, if the device has skipped `applied_flags` steps so far."""
    since: int
    """The last step before it for which everything due is logged."""
    due: Due
    is_first: bool
    """Whether it is the first step after a resume, which is checked for lost state."""
    flags: tuple[Tensor, ...]
    applied_flags: int


class PendingStep(NamedTuple):
    """A measurement that is being copied to the host."""

    tracked: "TrackedOptimizer"
    pending: PendingMeasurement
    step: int
    since: int
    due: Due
    is_first: bool
    applied_flags: int

    def has_arrived(self) -> bool:
        """Whether it can be logged without waiting for the device."""
        return self.pending.has_arrived()

    def resolve_skipped(self) -> "PendingStep":
        """Applies the flags: corrects the step, and clears `due` if the device skipped it."""
        flags = self.pending.flags()
        if flags is None:
            return self
        skipped, is_skipped = flags
        self.tracked.apply_device_skips(skipped)
        if is_skipped:
            return self._replace(due=Due(), is_first=False)
        newly_skipped = skipped - self.applied_flags
        step, since = self.step - newly_skipped, self.since - newly_skipped
        due = self.tracked.cadence.due(step, since)
        both = (one and other for one, other in zip(self.due, due, strict=True))
        return self._replace(step=step, since=since, due=Due(*both))


class TrackedOptimizer:
    """One optimizer of a run.

    Args:
        optimizer: The torch optimizer, without wrappers.
        name: Its name; empty if it is the only one.
        statistics: Measures the optimizer.
        cadence: Decides which steps are due.
        failsafe: Guards the hooks. If it is disabled, the optimizer only takes part in measurements
            of all ranks.
        gradients: Loss scaling and clipping of the trainer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        name: str,
        statistics: AdamStatistics,
        cadence: Cadence,
        failsafe: Failsafe,
        gradients: GradientProcessing,
    ) -> None:
        self.optimizer = optimizer
        self.name = name
        self.statistics = statistics
        self.cadence = cadence
        self.is_sharded = is_sharded(optimizer)
        """Whether all ranks measure together."""
        self.counter = StepCounter(optimizer, is_sharded=self.is_sharded)
        self.due = cadence.next_step(self.counter.taken)
        """The next step to measure."""
        self.measured: list[MeasuredStep] = []
        """The measurements of the batch."""
        self.has_warned = False
        """Whether `warn_unsupported` was called."""
        self._is_resumed = False
        self._failsafe = failsafe
        self._gradients = gradients

    def resume(self, taken: int, skipped: int, measures_first: bool) -> None:
        """Continues counting.

        Args:
            taken: The number of steps so far.
            skipped: The number of skipped steps so far.
            measures_first: Whether to measure the first step even if it is not due, to detect lost
                state.
        """
        self.counter.skipped = skipped
        self._is_resumed = measures_first and taken > 0
        self.count_from(taken)

    def count_from(self, taken: int) -> None:
        """Sets the number of steps taken."""
        self.counter.taken = taken
        self.due = taken + 1 if self._is_resumed else self.cadence.next_step(taken)

    def before_step(self) -> None:
        """Prepares a step before its gradients are clipped; a GradScaler may still skip it."""
        self.counter.expect()
        is_due = self.counter.taken + 1 >= self.due and self._failsafe.is_active
        if is_due and self._gradients.is_clipped(self.optimizer) and not is_capturing():
            self.statistics.before_clip(self.optimizer)

    def after_step(self) -> None:
        """Measures the step that was just taken, if it is due."""
        if self.counter.taken >= self.due and not is_capturing():
            self._measure()

    def send(self, loss: Tensor | None) -> list[PendingStep]:
        """Starts copying the batch's measurements to the host.

        Args:
            loss: The loss of the batch, if it is known.
        """
        measured, self.measured = self.measured, []
        if measured and self.is_sharded and measured[-1].flags:
            # Applied now, so that the next measurement is at the same step on all ranks.
            self.apply_device_skips(int(measured[-1].flags[0]))
        return [
            PendingStep(
                self,
                PendingMeasurement(each.measurement, each.flags, loss),
                *(each.step, each.since, each.due, each.is_first, each.applied_flags),
            )
            for each in measured
        ]

    def apply_device_skips(self, flags: int) -> None:
        """Subtracts the steps that the device has skipped from the step count."""
        self.counter.apply_device_skips(flags)
        self.due = self.cadence.next_step(self.counter.taken)

    def disable(self) -> None:
        """Discards all measurements, and stops measuring."""
        self.measured.clear()
        if not self.is_sharded:
            # The hooks are removed at the end of the run, as torch may be iterating over them now.
            self.due = sys.maxsize

    def _measure(self) -> None:
        step, since = self.counter.taken, self.due - 1
        if self.measured:
            # Only the last step of a batch is logged. It also covers what was due at earlier ones.
            since = self.measured[-1].since
        due = self.cadence.due(step, since)
        self.due = self.cadence.next_step(step)
        if not self._failsafe.is_active:
            has_failed = self._failsafe.has_failed
            self.statistics.update_empty(self.optimizer, due.histograms, has_failed=has_failed)
            return
        is_first, self._is_resumed = self._is_resumed, False
        skipped, loss_scale = self.counter.all_skipped, self._gradients.loss_scale()
        self.statistics.update(self.optimizer, due.histograms, skipped, loss_scale)
        kept = [each._replace(due=Due()) for each in self.measured if each.is_first]
        flags, applied = self.counter.found_inf_flags, self.counter.applied_flags
        measured = MeasuredStep(
            self.statistics.measurement, step, since, due, is_first, flags, applied
        )
        self.measured = [*kept, measured]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, which would record a measurement."""
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_initialized and torch.cuda.is_current_stream_capturing()
