"""Finds and reads runs."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from lightning_adam.config.errors import ConfigError
from lightning_adam.monitor.log_keys import FINDINGS, FLIGHT_RECORDER
from lightning_adam.reports.runs import csv, tensorboard, wandb
from lightning_adam.reports.runs.part import RunPart, join
from lightning_adam.reports.runs.run import Run

EVENTS = "*.tfevents.*"
FORMATS: dict[str, Callable[[Path, Callable[[int], object]], RunPart]] = {
    "*.wandb": wandb.read,
    "metrics.csv": csv.read,
    EVENTS: tensorboard.read,
}
"""The names of the files of each logger, and what reads them."""
Stamp: TypeAlias = list[tuple[int, int]]
"""Modification time and size of files."""


class RunNotFoundError(ConfigError):
    """There is no run at a path."""


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Reads all runs at some paths.

    Args:
        paths: Folders of runs, files of W&B (.wandb), CSVLogger (metrics.csv) or TensorBoard
            (events.out.tfevents.*), and folders that contain such files at any depth.

    Returns:
        The runs in the order of the paths; those of a path in the order of their names. The parts
        of a W&B run that was resumed are one run, and so are all files of a folder. The later row
        of a step counts.

    Raises:
        RunNotFoundError: If there is no run at one of the paths.
        ConfigError: If neither tensorboard nor tensorboardX is installed, and a run needs it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = ["step,train/loss", "0,0.5", "10,0.25", ""]
        >>> written = (folder / "metrics.csv").write_text(chr(10).join(rows))
        >>> (run,) = read_runs([folder])
        >>> [each.tolist() for each in run.series["train/loss"]]
        [[0, 10], [0.5, 0.25]]
    """
    return RunReader().read(paths)


class RunReader:
    """Reads runs repeatedly; what has not changed since the last time is not read again.

    Example:
        >>> RunReader().read([Path("nowhere")])
        Traceback (most recent call last):
        ...
        lightning_adam.reports.runs.reader.RunNotFoundError: nowhere does not exist. Pass ...
    """

    def __init__(self) -> None:
        self._parts: dict[Path, tuple[Stamp, RunPart]] = {}
        self._runs: dict[str, tuple[Stamp, Run]] = {}

    def read(self, paths: Iterable[Path]) -> list[Run]:
        """Reads all runs at some paths, as `read_runs` does.

        Args:
            paths: Files, and folders that contain them.

        Returns:
            The runs. One that has not changed is the same object as the last time.
        """
        files = dict.fromkeys(file for path in paths for file in _find(path))
        stamps = {file: _stamp([file]) for file in files}
        changed = [
            file
            for file, stamp in stamps.items()
            if file not in self._parts or self._parts[file][0] != stamp
        ]
        size = sum(stamps[file][0][1] for file in changed)
        # disable=None: shown at a terminal only.
        with tqdm(
            total=size, unit="B", unit_scale=True, desc="reading", leave=False, disable=None
        ) as bar:
            for file in changed:
                read = next(each for name, each in FORMATS.items() if fnmatch(file.name, name))
                self._parts[file] = (stamps[file], read(file, bar.update))
        by_run: dict[str, list[RunPart]] = {}
        for file in files:
            part = self._parts[file][1]
            by_run.setdefault(part.identity, []).append(part)
        return [self._join(identity, parts) for identity, parts in by_run.items()]

    def _join(self, identity: str, parts: Sequence[RunPart]) -> Run:
        files = [part.file for part in parts]
        for part in parts:
            files += [part.folder / name for name in (f"{FINDINGS}.json", FLIGHT_RECORDER)]
        stamp = _stamp(files)
        if identity not in self._runs or self._runs[identity][0] != stamp:
            self._runs[identity] = (stamp, join(parts))
        return self._runs[identity][1]


def _stamp(files: Iterable[Path]) -> Stamp:
    stats = [file.stat() for file in files if file.exists()]
    return [(each.st_mtime_ns, each.st_size) for each in stats]


def _find(path: Path) -> list[Path]:
    """The files of the runs at a path."""
    if path.is_file() and _is_log(path):
        return [path.resolve()]
    if not path.exists():
        raise RunNotFoundError(
            f"{path} does not exist",
            "Pass the folder that AdamMonitor prints when a run ends, or a folder that contains"
            " runs",
        )
    # Resolved, so that a link, such as W&B's latest-run, is not a second run.
    found = {each.resolve() for each in path.rglob("*") if _is_log(each) and each.is_file()}
    events = {file for file in found if fnmatch(file.name, EVENTS)}
    folders = {file.parent for file in events}
    # Below the folder of a run, add_scalars writes the curves that share a chart.
    found -= {file for file in events if not folders.isdisjoint(file.parent.parents)}
    if not found:
        raise RunNotFoundError(
            f"{path} contains no run: no .wandb file of WandbLogger(offline=True), no"
            " metrics.csv of CSVLogger, and no event file of TensorBoardLogger",
            "Train with one of these loggers",
        )
    return sorted(found)


def _is_log(file: Path) -> bool:
    return any(fnmatch(file.name, name) for name in FORMATS)
