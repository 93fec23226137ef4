"""FlightRecorder: keeps the last optimizer steps in memory, and writes them on a failure."""

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
    """A step whose batch has not ended yet."""

    name: str
    """The optimizer's."""
    number: int
    """If the device has skipped no more steps than `applied_flags`."""
    applied_flags: int
    measurement: Measurement
    flags: tuple[Tensor, ...]


class _PendingBatch(NamedTuple):
    """A loss and its optimizer steps, on their way to the host."""

    x: int
    loss: AsyncHostCopy | None
    steps: list[tuple[_MeasuredStep, PendingMeasurement]]

    def has_arrived(self) -> bool:
        return (self.loss is None or self.loss.has_arrived()) and all(
            pending.has_arrived() for _, pending in self.steps
        )


@dataclass
class _Recording:
    """One optimizer, and its last steps."""

    optimizer: Optimizer
    statistics: AdamStatistics
    counter: StepCounter
    is_sharded: bool
    steps: deque[Step] = field(default_factory=deque)


class FlightRecorder:
    """Keeps the statistics of the last optimizer steps, and writes them on a failure.

    Every step is measured, with all statistics of the model and of each layer. What is kept are the
    matrices `[tensors, columns]`; statistics are derived when they are written, to
    `adam_flight_recorder/step_<optimizer step>_<event>.csv` in the run's folder. After an event,
    only a more severe one is written within as many steps as are kept.

    A step's loss is what `training_step` returned for its batch; under `accumulate_grad_batches`
    the mean over the step's batches. On several ranks it is that of the first.

    Args:
        config: The monitor's settings.
        trainer: The trainer.
        publisher: Calls its loggers.

    Example:
        >>> trainer = Trainer(barebones=True)
        >>> FlightRecorder(MonitorConfig(flight_recorder=200), trainer, Publisher(trainer)).length
        200
    """

    def __init__(self, config: MonitorConfig, trainer: Trainer, publisher: Publisher) -> None:
        self.length = config.flight_recorder or 0
        """The number of steps of each optimizer that are kept."""
        self._config = config
        self._trainer = trainer
        self._gradients = GradientProcessing(trainer)
        self._is_recording = this_rank() == 0
        """Whether this rank keeps what is measured; the others measure with it."""
        self._recordings: dict[str, _Recording] = {}
        self._modules: list[str] = []
        """The paths of the modules."""
        self._losses_before = SpikeWindow()
        self._measured: list[_MeasuredStep] = []
        self._losses: list[Tensor] = []
        """Of the batches since the last step."""
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
            counter: What counts its steps.
        """
        together = is_sharded(optimizer)
        if not self._is_recording and not together:
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
        self._recordings[name] = _Recording(optimizer, statistics, counter, together, steps)

    def after_step(self, name: str, failsafe: Failsafe) -> None:
        """Measures the step that an optimizer has just taken.

        Args:
            name: The optimizer's name.
            failsafe: Where it is muted, this rank only takes part in measurements that need all
                ranks.
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
        """Keeps the batch's steps, and writes them on an event.

        Args:
            outputs: What `training_step` returned, as `on_train_batch_end` gets it.

        Returns:
            The first rank on which a measurement failed; None if it failed on none.
        """
        if not self._is_recording:
            return None
        x = logging_step(self._trainer)
        if x != self._x:
            # A GradScaler has skipped the step of these losses.
            self._send(self._x, [])
        self._x = x
        loss = loss_of_batch(self._trainer, outputs)
        if loss is not None:
            self._losses.append(loss)
        if self._measured:
            self._send(x, self._measured)
        return self._record_arrived(0.0)

    def settle(self, wait_s: float = math.inf) -> int | None:
        """Keeps the steps that are still on their way.

        Args:
            wait_s: How long to wait for them, as `PendingQueue.arrived` does (default: as long as
                it takes).

        Returns:
            The first rank on which a measurement failed; None if it failed on none.
        """
        self._send(self._x, [])
        # The loss of a batch that has not ended is not known.
        self._send(logging_step(self._trainer), self._measured)
        return self._record_arrived(wait_s)

    def crash(self, exception: BaseException, wait_s: float) -> None:
        """Writes the steps because an exception has ended the run.

        Args:
            exception: The exception.
            wait_s: How long to wait for steps on their way, in seconds. They never arrive if
                another rank is gone.
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
        """Starts copying steps to the host, with the mean of the losses since those before."""
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
                # Pinned memory is scarce.
                kept = Step(batch.x, number, step.name, loss, measurement.copy())
                self._recordings[step.name].steps.append(kept)
                is_finite &= not kept.measurement.has_nonfinite
        has_jumped = loss is not None and self._losses_before.add(loss) > DEVIATIONS
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
