"""EventFiles: writes the recorded steps on an event, not too often, and says where."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lightning_adam.monitor.flight_recorder.file import Step, first_diverging_layer, write
from lightning_adam.monitor.log_keys import FLIGHT_RECORDER
from lightning_adam.monitor.loggers import is_wandb, location, run_folder
from lightning_adam.optim.console import log_info

MAX_FILES = 10
"""Of a run."""


class Event(str, Enum):
    """Why a file is written, as its name says."""

    LOSS_SPIKE = "loss_spike"
    """See `LossSpikes`."""
    NOT_FINITE = "not_finite"
    """The loss or anything measured is NaN or infinite, and was not before."""
    EXCEPTION = "exception"
    """The run ended with one: SIGTERM and KeyboardInterrupt are exceptions too."""


SEVERITY = {Event.LOSS_SPIKE: 0, Event.NOT_FINITE: 1, Event.EXCEPTION: 1}
"""Soon after an event only a more severe one is written."""


class EventFiles:
    """The files of a run. After an event only a more severe one is written for some steps.

    Args:
        length: That number of steps.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._last: tuple[int, Event] | None = None
        self._number = 0

    def write(
        self,
        trainer: Trainer,
        event: Event,
        steps: Sequence[Sequence[Step]],
        modules: Sequence[str],
        details: str = "",
    ) -> None:
        """Writes the steps to the folder of the first logger that has one.

        Args:
            trainer: The trainer.
            event: The event.
            steps: The last steps of each optimizer, at least one of each.
            modules: The paths of the modules, those of the input first.
            details: What else to print of the event (default: nothing).
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
                    f"AdamMonitor's flight recorder has written {MAX_FILES} files, the most of a"
                    f" run. It does not write {event.value} at step {last}, nor later events."
                )
            return
        run = _run_of(trainer)
        file = run.folder / FLIGHT_RECORDER / f"step_{last}_{event.value}.csv"
        evidence = write(file, sorted((row for each in steps for row in each), key=_x))
        if run.wandb is not None:
            # W&B's own process uploads it; offline, `wandb sync` does.
            run.wandb.save(str(file), base_path=str(run.folder), policy="now")
        parts = [
            f"the last {len(steps[0])} steps are in {file}",
            first_diverging_layer(evidence, modules),
            f"report: {run.report}" if run.report else "",
        ]
        what = f"{event.value} ({details})" if details else event.value
        log_info(f"AdamMonitor: {what} at step {last}; {'; '.join(filter(None, parts))}")


class _Run(NamedTuple):
    """Where the files of a run are."""

    folder: Path
    report: str = ""
    """The command that shows a report of them; empty if there is none."""
    wandb: Any = None
    """W&B's run, which uploads files."""


def _run_of(trainer: Trainer) -> _Run:
    for logger in trainer.loggers:
        folder, found = run_folder(logger), location(logger)
        if folder is not None and found is not None:
            return _Run(folder, found.report, logger.experiment if is_wandb(logger) else None)
    return _Run(Path(trainer.default_root_dir))


def _x(step: Step) -> int:
    return step.x
