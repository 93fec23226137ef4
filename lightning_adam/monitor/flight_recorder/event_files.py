"""`EventFiles`: writes the recorded steps to a file on an event."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_adam.monitor.flight_recorder.file import Step, first_diverging_layer, write
from lightning_adam.monitor.log_keys import FLIGHT_RECORDER
from lightning_adam.monitor.loggers import is_wandb, location, run_folder
from lightning_adam.monitor.publishing import Publisher
from lightning_adam.optim.console import log_info

MAX_FILES = 10
"""Largest number of files per run."""


class Event(str, Enum):
    """Why a file is written; part of its name."""

    LOSS_SPIKE = "loss_spike"
    """The loss is a spike, see `SpikeWindow`."""
    NOT_FINITE = "not_finite"
    """The loss or a measured tensor has become NaN or infinite."""
    EXCEPTION = "exception"
    """An exception ended the run, including SIGTERM and KeyboardInterrupt."""


SEVERITY = {Event.LOSS_SPIKE: 0, Event.NOT_FINITE: 1, Event.EXCEPTION: 1}
"""Severity of events: soon after an event, only a more severe one is written."""


class EventFiles:
    """Writes the files of a run. After an event, less severe ones are skipped for some steps.

    Args:
        length: The number of steps for which they are skipped.
        trainer: The trainer.
        publisher: Calls the loggers of the trainer.
    """

    def __init__(self, length: int, trainer: Trainer, publisher: Publisher) -> None:
        self._length = length
        self._trainer = trainer
        self._publisher = publisher
        self._last: tuple[int, Event] | None = None
        self._number = 0

    def write(
        self,
        event: Event,
        steps: Sequence[Sequence[Step]],
        modules: Sequence[str],
        details: str = "",
    ) -> None:
        """Writes the steps to the folder of the first logger that has one.

        Args:
            event: The event.
            steps: The last steps of each optimizer, at least one each.
            modules: The paths of the modules, from input to output.
            details: Additional text to print in parentheses (default: empty).
        """
        last = max(each[-1].number for each in steps)
        if self._last is not None:
            step, other = self._last
            if last - step < self._length and SEVERITY[event] <= SEVERITY[other]:
                return
        self._last = (last, event)
        self._number += 1
        if self._number > MAX_FILES:
            if self._number == MAX_FILES + 1:
                log_info(
                    f"AdamMonitor's flight recorder has reached its limit of {MAX_FILES} files per"
                    f" run. It does not write {event.value} at step {last} and later events."
                )
            return
        run = self._run()
        file = run.folder / FLIGHT_RECORDER / f"step_{last}_{event.value}.csv"
        evidence = write(file, sorted((row for each in steps for row in each), key=_x))
        self._publisher.each(_upload, run.folder, file)
        parts = [
            f"the last {len(steps[0])} steps are in {file}",
            first_diverging_layer(evidence, modules),
            f"report: {run.report}" if run.report else "",
        ]
        what = f"{event.value} ({details})" if details else event.value
        log_info(f"AdamMonitor: {what} at step {last}; {'; '.join(filter(None, parts))}")

    def _run(self) -> "_Run":
        found: list[_Run] = []
        self._publisher.each(_add_run, found)
        return found[0] if found else _Run(Path(self._trainer.default_root_dir))


class _Run(NamedTuple):
    """The location of a run."""

    folder: Path
    report: str = ""
    """The command that writes a report of the run; empty if there is none."""


def _add_run(logger: Logger, runs: list[_Run]) -> None:
    folder, found = run_folder(logger), location(logger)
    if folder is not None and found is not None:
        runs.append(_Run(folder, found.report))


def _upload(logger: Logger, folder: Path, file: Path) -> None:
    if is_wandb(logger) and run_folder(logger) == folder:
        # The background process of W&B uploads the file; offline, `wandb sync` does.
        logger.experiment.save(str(file), base_path=str(folder), policy="now")


def _x(step: Step) -> int:
    return step.x
