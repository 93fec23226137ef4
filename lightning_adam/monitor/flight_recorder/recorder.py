"""FlightRecorder: the last optimizer steps, kept in memory, and written if a training blows up."""

import math
import shlex
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import either, logging_step, loss_of_batch
from lightning_adam.config.monitor import MonitorConfig, Scope
from lightning_adam.monitor.flight_recorder.file import Step, went_first, write
from lightning_adam.monitor.flight_recorder.loss_spikes import LossSpikes
from lightning_adam.monitor.log_keys import FLIGHT_RECORDER
from lightning_adam.monitor.loggers import is_wandb, run_folder
from lightning_adam.optim.console import log_info
from lightning_adam.optim.steps import StepCounter
from lightning_adam.statistics.measurement import Arriving, Copies, Measurement
from lightning_adam.statistics.metric import AdamStatistics
from lightning_adam.statistics.names import clean_name
from lightning_adam.statistics.sharding import is_sharded, this_rank

MOST_FILES = 10
"""Of a training."""


class Reason(str, Enum):
    """Why a file is written, as its name says."""

    LOSS_SPIKE = "loss_spike"
    """See `LossSpikes`."""
    NOT_FINITE = "not_finite"
    """The loss, or something that is measured, is NaN or infinite, and was not before."""
    EXCEPTION = "exception"
    """The training was ended by one: SIGTERM and the keyboard's interrupt are exceptions too."""


GRAVITY = {Reason.LOSS_SPIKE: 0, Reason.NOT_FINITE: 1, Reason.EXCEPTION: 1}
"""Soon after an event only a graver one is written."""


class _Taken(NamedTuple):
    """A step that its batch has not ended yet."""

    recording: "_Recording"
    number: int
    """If the device has skipped no more steps than `learned`."""
    learned: int
    measurement: Measurement
    flags: tuple[Tensor, ...]


class _Batch(NamedTuple):
    """A loss and its optimizer steps, on their way to the host."""

    x: int
    loss: Copies | None
    steps: list[tuple[_Taken, Arriving]]

    def has_arrived(self) -> bool:
        copies = [] if self.loss is None else [self.loss.have_arrived()]
        return all([*copies, *(arriving.has_arrived() for _, arriving in self.steps)])


@dataclass
class _Recording:
    """One optimizer, and its last steps."""

    optimizer: Optimizer
    name: str
    statistics: AdamStatistics
    counter: StepCounter
    is_sharded: bool
    steps: deque[Step] = field(default_factory=deque)


class FlightRecorder:
    """Keeps what each of the last optimizer steps did, and writes it when a training blows up.

    Every step is measured, with all statistics. What is kept are the measurements' matrices
    `[tensors, columns]`; statistics are derived when they are written: of the model and of every
    layer, to `adam_flight_recorder/step_<optimizer step>_<reason>.csv` in the run's folder. Within
    as many steps as are kept after an event only a graver one is written.

    A step's loss is what `training_step` returned for its batch; under `accumulate_grad_batches`
    the mean over the step's batches. Where there are several ranks, it is that of the first.

    Args:
        config: The monitor's settings.

    Example:
        >>> FlightRecorder(MonitorConfig(flight_recorder=200)).length
        200
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.length = config.flight_recorder or 0
        """The steps of each optimizer that are kept."""
        self._config = config
        self._keeps = this_rank() == 0
        """Whether this rank keeps what it has measured; the others measure with it."""
        self._recordings: dict[str, _Recording] = {}
        self._modules: list[str] = []
        """The paths of what is trained."""
        self._spikes = LossSpikes()
        self._taken: list[_Taken] = []
        self._losses: list[Tensor] = []
        """Of the batches since the last step."""
        self._x = 0
        self._batches: deque[_Batch] = deque()
        self._was_finite = True
        self._last_event: tuple[int, Reason] | None = None
        self._files = 0

    def watch(
        self, optimizer: Optimizer, name: str, module: nn.Module, counter: StepCounter
    ) -> None:
        """Takes up an optimizer, if this rank has to measure it.

        Args:
            optimizer: The raw torch optimizer.
            name: Empty if it is the only one.
            module: What it trains, for the names of layers.
            counter: What counts its steps.
        """
        together = is_sharded(optimizer)
        if not self._keeps and not together:
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
        recording = _Recording(optimizer, name, statistics, counter, together, steps)
        self._recordings[name] = recording

    def after_step(self, name: str, abstains: bool, has_failed: bool) -> None:
        """Measures the step that an optimizer has just taken.

        Args:
            name: The optimizer's.
            abstains: Whether this rank takes part in what ranks measure together with nothing.
            has_failed: Whether that is because something has failed on it.
        """
        recording = self._recordings.get(name)
        if recording is None:
            return
        counter, statistics = recording.counter, recording.statistics
        if abstains:
            statistics.abstain(recording.optimizer, has_failed=has_failed)
            return
        statistics.update(recording.optimizer, skipped_steps=counter.all_skipped)
        if self._keeps:
            told = (
                counter.taken,
                counter.applied_flags,
                statistics.measurement,
                counter.found_inf_flags,
            )
            self._taken.append(_Taken(recording, *told))

    def after_batch(self, trainer: Trainer, outputs: Any) -> int | None:
        """Keeps what the batch's steps did, and writes it if the training has blown up.

        Args:
            trainer: The trainer.
            outputs: What `training_step` returned, as `on_train_batch_end` is given it.

        Returns:
            The first rank on which a measurement has failed; None if it has on none.
        """
        if not self._keeps:
            return None
        x = logging_step(trainer)
        if x != self._x:
            # A GradScaler has kept back the step of what is left.
            self._send(self._x, [])
        self._x = x
        loss = loss_of_batch(trainer, outputs)
        if loss is not None:
            self._losses.append(loss)
        if self._taken:
            self._send(x, self._taken)
        return self._judge_arrived(trainer)

    def settle(self, trainer: Trainer, waits: bool = True) -> int | None:
        """Judges what is still on its way, as far as it comes.

        Args:
            trainer: The trainer.
            waits: Whether to wait for the device (default: True).

        Returns:
            The first rank on which a measurement has failed; None if it has on none.
        """
        self._send(self._x, [])
        # Of a batch that has not come to its end: its loss is not known.
        self._send(logging_step(trainer), self._taken)
        return self._judge_arrived(trainer, waits)

    def crash(self, trainer: Trainer, exception: BaseException) -> None:
        """Writes what there is, for an exception has ended the training."""
        # What ranks measure together may never come, if one of them has gone.
        together = any(each.is_sharded for each in self._recordings.values())
        try:
            self.settle(trainer, waits=not together)
        except RuntimeError:
            # A device that has failed tells nothing any more.
            self._batches.clear()
        self._write(trainer, Reason.EXCEPTION, f" ({type(exception).__name__})")

    def forget(self) -> None:
        """Lets go of all steps."""
        self._taken.clear()
        self._losses.clear()
        self._batches.clear()
        for recording in self._recordings.values():
            recording.steps.clear()

    def _send(self, x: int, taken: list[_Taken]) -> None:
        """Sends steps on their way, with the mean of the losses since those before."""
        losses = self._losses
        if not losses and not taken:
            return
        mean = torch.stack(losses).mean() if len(losses) > 1 else losses[0] if losses else None
        loss = None if mean is None else Copies([mean])
        steps = [(each, Arriving(each.measurement, each.flags)) for each in taken]
        self._batches.append(_Batch(x, loss, steps))
        self._losses.clear()
        taken.clear()

    def _judge_arrived(self, trainer: Trainer, waits: bool = False) -> int | None:
        while self._batches and (waits or self._batches[0].has_arrived()):
            failed = self._judge(trainer, self._batches.popleft())
            if failed is not None:
                return failed
        return None

    def _judge(self, trainer: Trainer, batch: _Batch) -> int | None:
        loss = None if batch.loss is None else float(batch.loss.tensors()[0])
        is_finite = loss is None or math.isfinite(loss)
        for taken, arriving in batch.steps:
            measurement = arriving.measurement()
            if measurement.failed_rank is not None:
                return measurement.failed_rank
            skipped, is_skipped = arriving.others() or (taken.learned, 0)
            if not is_skipped:
                number = taken.number - (int(skipped) - taken.learned)
                recording = taken.recording
                kept = Step(batch.x, number, recording.name, loss, measurement.renewed(own=True))
                recording.steps.append(kept)
                is_finite &= not kept.measurement.has_nonfinite
        has_jumped = is_finite and loss is not None and self._spikes.is_spike(loss)
        was_finite, self._was_finite = self._was_finite, is_finite
        if was_finite and not is_finite:
            self._write(trainer, Reason.NOT_FINITE)
        elif has_jumped:
            self._write(trainer, Reason.LOSS_SPIKE)
        return None

    def _write(self, trainer: Trainer, reason: Reason, what: str = "") -> None:
        recordings = [each for each in self._recordings.values() if each.steps]
        if not recordings:
            return
        last = max(each.steps[-1].number for each in recordings)
        if self._last_event is not None:
            step, other = self._last_event
            if last - step < self.length and GRAVITY[reason] <= GRAVITY[other]:
                return
        self._last_event = (last, reason)
        self._files += 1
        if self._files > MOST_FILES:
            if self._files == MOST_FILES + 1:
                log_info(
                    f"AdamMonitor's flight recorder has written {MOST_FILES} files, and writes no"
                    f" more of this training; the next were {reason.value} at step {last}."
                )
            return
        steps = sorted(
            (step for each in recordings for step in each.steps), key=lambda step: step.x
        )
        place = _place(trainer)
        file = place.folder / FLIGHT_RECORDER / f"step_{last}_{reason.value}.csv"
        evidence = write(file, steps)
        if place.run is not None:
            # Sent as it is, by W&B's own process; offline it is noted for `wandb sync`.
            place.run.save(str(file), base_path=str(place.folder), policy="now")
        first = went_first(evidence, self._modules)
        parts = [f"the last {len(recordings[0].steps)} steps are in {file}", first, place.look]
        log_info(
            f"AdamMonitor: {reason.value}{what} at step {last}; {'; '.join(filter(None, parts))}"
        )


class _Place(NamedTuple):
    """Where a training's files lie."""

    folder: Path
    look: str
    """How to look at them; empty where there is no page of them."""
    run: Any = None
    """W&B's, which takes its files to the server."""


def _place(trainer: Trainer) -> _Place:
    """The folder of the first logger that has one."""
    for logger in trainer.loggers:
        folder = run_folder(logger)
        if folder is not None:
            if is_wandb(logger):
                return _Place(folder, _look(folder.parent), logger.experiment)
            has_page = isinstance(logger, either("loggers.CSVLogger"))
            return _Place(folder, _look(folder) if has_page else "")
    return _Place(Path(trainer.default_root_dir), "")


def _look(run: Path) -> str:
    return f"look: lightning-adam report {shlex.quote(str(run))}"
