"""`FlightRecorder`: keeps the last optimizer steps in memory, and writes them on a failure."""

import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import logging_step, loss_of_batch
from lightning_adam.config.monitor import MonitorConfig, Scope
from lightning_adam.findings.spikes import DEVIATIONS, SpikeWindow
from lightning_adam.monitor.failsafe import Failsafe
from lightning_adam.monitor.flight_recorder.event_files import Event, EventFiles
from lightning_adam.monitor.flight_recorder.file import Step
from lightning_adam.monitor.gradient_processing import GradientProcessing
from lightning_adam.monitor.pending import AsyncHostCopy, PendingMeasurement, PendingQueue
from lightning_adam.monitor.publishing import Publisher
from lightning_adam.monitor.tracked_optimizer import is_capturing
from lightning_adam.optim.steps import StepCounter
from lightning_adam.statistics.measurement import Measurement
from lightning_adam.statistics.metric import AdamStatistics
from lightning_adam.statistics.names import clean_name
from lightning_adam.statistics.sharding import is_sharded, this_rank


class _MeasuredStep(NamedTuple):
    """A measured step of the current batch."""

    name: str
    """Name of the optimizer."""
    number: int
    """The optimizer step, if the device has skipped `applied_flags` steps so far."""
    applied_flags: int
    measurement: Measurement
    flags: tuple[Tensor, ...]


class _PendingBatch(NamedTuple):
    """A loss and its optimizer steps that are being copied to the host."""

    x: int
    loss: AsyncHostCopy | None
    steps: list[tuple[_MeasuredStep, PendingMeasurement]]

    def has_arrived(self) -> bool:
        return (self.loss is None or self.loss.has_arrived()) and all(
            pending.has_arrived() for _, pending in self.steps
        )


@dataclass
class _Recording:
    """An optimizer and its last steps."""

    optimizer: Optimizer
    statistics: AdamStatistics
    counter: StepCounter
    is_sharded: bool
    steps: deque[Step] = field(default_factory=deque)


class FlightRecorder:
    """Keeps the statistics of the last optimizer steps, and writes them on a failure.

    It measures all statistics of the model and of each layer at every step. It keeps the matrices
    `[tensors, columns]`, and derives the statistics when it writes them to
    `adam_flight_recorder/step_<optimizer step>_<event>.csv` in the run's folder. After an event,
    only a more severe one is written within the number of steps that are kept.

    The loss of a step is that of its batch, or the mean over its batches under
    `accumulate_grad_batches`. With several ranks it is the loss on rank 0.

    Args:
        config: The monitor's config.
        trainer: The trainer.
        publisher: Calls the loggers of the trainer.

    Example:
        >>> trainer = Trainer(barebones=True)
        >>> FlightRecorder(MonitorConfig(flight_recorder=200), trainer, Publisher(trainer)).length
        200
    """

    def __init__(self, config: MonitorConfig, trainer: Trainer, publisher: Publisher) -> None:
        self.length = config.flight_recorder or 0
        """Number of steps to keep for each optimizer."""
        self._config = config
        self._trainer = trainer
        self._gradients = GradientProcessing(trainer)
        self._is_recording = this_rank() == 0
        """Whether this rank keeps the steps. The others only take part in measurements."""
        self._recordings: dict[str, _Recording] = {}
        self._modules: list[str] = []
        """The paths of the modules, from input to output."""
        self._loss_window = SpikeWindow()
        self._measured: list[_MeasuredStep] = []
        self._losses: list[Tensor] = []
        """The losses since the last step."""
        self._x = 0
        self._batches: PendingQueue[_PendingBatch] = PendingQueue()
        self._was_finite = True
        self._files = EventFiles(self.length, trainer, publisher)

    def track(
        self, optimizer: Optimizer, name: str, module: nn.Module, counter: StepCounter
    ) -> None:
        """Adds an optimizer, if this rank has to measure it.

        Args:
            optimizer: The torch optimizer, without wrappers.
            name: Its name; empty if it is the only one.
            module: The module that it trains, for the names of layers.
            counter: Counts its steps.
        """
        has_shards = is_sharded(optimizer)
        if not self._is_recording and not has_shards:
            return
        statistics = AdamStatistics(
            "all",
            [Scope.model, Scope.layer],
            layer_depth=self._config.layer_depth,
            module=module,
            kernel=self._config.kernel,
        )
        self._modules = [clean_name(path) for path, _ in module.named_modules()]
        steps: deque[Step] = deque(maxlen=self.length)
        self._recordings[name] = _Recording(optimizer, statistics, counter, has_shards, steps)

    def after_step(self, name: str, failsafe: Failsafe) -> None:
        """Measures the step that an optimizer has just taken.

        Args:
            name: The optimizer's name.
            failsafe: If it is disabled, this rank only takes part in measurements of all ranks.
        """
        recording = self._recordings.get(name)
        if recording is None or is_capturing():
            return
        counter, statistics = recording.counter, recording.statistics
        if not failsafe.is_active:
            statistics.update_empty(recording.optimizer, has_failed=failsafe.has_failed)
            return
        skipped, loss_scale = counter.all_skipped, self._gradients.loss_scale()
        statistics.update(recording.optimizer, skipped_steps=skipped, loss_scale=loss_scale)
        if self._is_recording:
            flags, applied = counter.found_inf_flags, counter.applied_flags
            step = _MeasuredStep(name, counter.taken, applied, statistics.measurement, flags)
            self._measured.append(step)

    def after_batch(self, outputs: Any) -> int | None:
        """Keeps the steps of a batch, and writes a file on an event.

        Args:
            outputs: The output of `training_step`, as in `on_train_batch_end`.

        Returns:
            The first rank on which a measurement failed; None if it failed on none.
        """
        if not self._is_recording:
            return None
        x = logging_step(self._trainer)
        if x != self._x:
            # The GradScaler skipped the step of these losses.
            self._send(self._x, [])
        self._x = x
        loss = loss_of_batch(self._trainer, outputs)
        if loss is not None:
            self._losses.append(loss)
        if self._measured:
            self._send(x, self._measured)
        return self._record_arrived(0.0)

    def settle(self, wait_s: float = math.inf) -> int | None:
        """Keeps the steps that are still being copied.

        Args:
            wait_s: How long to wait for them, in seconds (default: without limit).

        Returns:
            The first rank on which a measurement failed; None if it failed on none.
        """
        self._send(self._x, [])
        # The loss of an unfinished batch is unknown.
        self._send(logging_step(self._trainer), self._measured)
        return self._record_arrived(wait_s)

    def write_on_exception(self, exception: BaseException, wait_s: float) -> None:
        """Writes the steps after an exception has ended the run.

        Args:
            exception: The exception.
            wait_s: How long to wait for steps that are still being copied, in seconds. They may
                never arrive if another rank has exited.
        """
        # The device itself may have failed.
        with suppress(RuntimeError):
            self.settle(wait_s)
        self._batches.clear()
        self._write(Event.EXCEPTION, type(exception).__name__)

    def clear(self) -> None:
        """Discards all steps."""
        self._measured.clear()
        self._losses.clear()
        self._batches.clear()
        for recording in self._recordings.values():
            recording.steps.clear()

    def _send(self, x: int, measured: list[_MeasuredStep]) -> None:
        """Starts copying steps to the host, with the mean of the losses since the previous step."""
        losses = self._losses
        if not losses and not measured:
            return
        mean = torch.stack(losses).mean() if len(losses) > 1 else losses[0] if losses else None
        loss = None if mean is None else AsyncHostCopy([mean])
        steps = [(each, PendingMeasurement(each.measurement, each.flags)) for each in measured]
        self._batches.append(_PendingBatch(x, loss, steps))
        self._losses.clear()
        measured.clear()

    def _record_arrived(self, wait_s: float) -> int | None:
        for batch in self._batches.arrived(wait_s):
            failed_rank = self._record(batch)
            if failed_rank is not None:
                return failed_rank
        return None

    def _record(self, batch: _PendingBatch) -> int | None:
        loss = None if batch.loss is None else float(batch.loss.tensors()[0])
        is_finite = loss is None or math.isfinite(loss)
        for step, pending in batch.steps:
            measurement = pending.measurement()
            if measurement.failed_rank is not None:
                return measurement.failed_rank
            skipped, is_skipped = pending.flags() or (step.applied_flags, False)
            if not is_skipped:
                number = step.number - (skipped - step.applied_flags)
                # A copy, because pinned memory is scarce.
                kept = Step(batch.x, number, step.name, loss, measurement.copy())
                self._recordings[step.name].steps.append(kept)
                is_finite &= not kept.measurement.has_nonfinite
        has_jumped = loss is not None and self._loss_window.add(loss) > DEVIATIONS
        was_finite, self._was_finite = self._was_finite, is_finite
        if was_finite and not is_finite:
            self._write(Event.NOT_FINITE)
        elif is_finite and has_jumped:
            self._write(Event.LOSS_SPIKE)
        return None

    def _write(self, event: Event, details: str = "") -> None:
        steps = [each.steps for each in self._recordings.values() if each.steps]
        if steps:
            self._files.write(event, steps, self._modules, details)
