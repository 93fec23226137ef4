"""Rewrites a report while its runs are training."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_adam.config.errors import ConfigError
from lightning_adam.monitor.log_keys import FINDINGS
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import Run, find_files, read_runs


def watch_report(
    paths: Sequence[Path], file: Path, seconds: float, show: Callable[[str], object]
) -> None:
    """Rewrites a report when its runs change, until all have ended or Ctrl-C.

    Args:
        paths: Folders of runs, as for `read_runs`. Waits for folders that do not exist yet.
        file: The file to write.
        seconds: Time between two checks for changes.
        show: Called with a line when the status has changed.

    Raises:
        ConfigError: If it is interrupted before AdamMonitor has logged anything, or the file cannot
            be written.
    """
    place = " ".join(map(str, paths))
    runs: list[Run] = []
    previous, status = None, ""
    try:
        # Also after the end, as a logger may write its last rows after AdamMonitor.
        while (
            (current := _file_stats(paths)) != previous
            or not runs
            or not all(run.has_ended for run in runs)
        ):
            if current != previous:
                previous = current
                found = read_runs(paths) if all(map(find_files, paths)) else []
                line = f"waiting for AdamMonitor to log to {place}"
                if any(run.is_monitored for run in found):
                    runs, line = found, _progress(found)
                    write_report(runs, file, refresh=seconds)
                if line != status:
                    status = line
                    show(status)
            time.sleep(seconds)
    except KeyboardInterrupt:
        if not runs:
            raise ConfigError(
                f"AdamMonitor has logged nothing to {place} yet",
                "Start the run, and check its folder",
            ) from None
    # Without refresh, so that an open page stops reloading.
    write_report(runs, file)


def _file_stats(paths: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """Returns the files of the runs with their modification times and sizes."""
    logs = [file for path in paths for file in find_files(path)]
    folders = {folder for log in logs for folder in (log.parent, log.parent / "files")}
    files = [*logs, *(folder / f"{FINDINGS}.json" for folder in sorted(folders))]
    stats = [(file, file.stat()) for file in files if file.exists()]
    return [(file, each.st_mtime_ns, each.st_size) for file, each in stats]


def _progress(runs: Sequence[Run]) -> str:
    step = max(run.last_step or 0 for run in runs)
    training = sum(not run.has_ended for run in runs)
    return f"step {step:,}, {training} of {len(runs)} runs still training"
