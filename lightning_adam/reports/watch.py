"""Rewrites a report while its runs are training."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_adam.config.errors import ConfigError
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import Run, RunNotFoundError, RunReader


def watch_report(
    paths: Sequence[Path], file: Path, seconds: float, show: Callable[[str], object]
) -> None:
    """Rewrites the page of some runs when they change, until all have ended, or Ctrl-C.

    Args:
        paths: Folders of runs, as for `read_runs`; it waits for those that do not exist yet.
        file: The file to write.
        seconds: Time from one look at the runs to the next.
        show: Called with a line when something has changed.

    Raises:
        ConfigError: If it is interrupted before AdamMonitor has logged anything, or the file cannot
            be written.
    """
    place = " ".join(map(str, paths))
    reader, status, new = RunReader(), "", ""
    shown: list[Run] = []
    try:
        while True:
            runs = _read(reader, paths)
            if not any(run.is_monitored for run in runs):
                new = f"waiting for AdamMonitor to log to {place}"
            elif [*map(id, runs)] != [*map(id, shown)]:
                write_report(runs, file, refresh=seconds)
                shown, new = runs, _progress(runs)
            elif all(run.has_ended for run in runs):
                # Not before, as a logger may write its last rows after the monitor.
                break
            if new != status:
                status = new
                show(status)
            time.sleep(seconds)
    except KeyboardInterrupt:
        if not shown:
            raise ConfigError(
                f"AdamMonitor has logged nothing to {place} yet",
                "Start the run, and check its folder",
            ) from None
    # An open page reloads once more, and then no longer.
    write_report(shown, file)


def _read(reader: RunReader, paths: Sequence[Path]) -> list[Run]:
    try:
        return reader.read(paths)
    except RunNotFoundError:
        return []


def _progress(runs: Sequence[Run]) -> str:
    step = max(run.last_step or 0 for run in runs)
    training = sum(not run.has_ended for run in runs)
    return f"step {step:,}, {training} of {len(runs)} runs still training"
