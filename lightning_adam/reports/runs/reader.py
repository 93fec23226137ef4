"""Finds and reads runs."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from lightning_adam.config.errors import ConfigError
from lightning_adam.reports.runs import csv, tensorboard, wandb
from lightning_adam.reports.runs.part import RunPart, join
from lightning_adam.reports.runs.run import Run

EVENTS = "*.tfevents.*"
FORMATS: dict[str, Callable[[Path, Callable[[int], object]], RunPart]] = {
    "*.wandb": wandb.read,
    "metrics.csv": csv.read,
    EVENTS: tensorboard.read,
}
"""Functions that read the files of each logger, by file name."""


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Reads all runs at the given paths.

    Args:
        paths: Folders of runs, files of W&B (.wandb), CSVLogger (metrics.csv) or TensorBoard
            (events.out.tfevents.*), and folders that contain such files at any depth.

    Returns:
        The runs in the order of the paths, sorted by name within a path. The parts of a resumed W&B
        run are joined, and so are all files of a folder. The later of two rows for the same step is
        used.

    Raises:
        ConfigError: If there is no run at one of the paths, or if neither tensorboard nor
            tensorboardX is installed for a TensorBoard run.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = ["step,train/loss", "0,0.5", "10,0.25", ""]
        >>> written = (folder / "metrics.csv").write_text(chr(10).join(rows))
        >>> (run,) = read_runs([folder])
        >>> [each.tolist() for each in run.series["train/loss"]]
        [[0, 10], [0.5, 0.25]]
    """
    files: dict[Path, None] = {}
    for path in paths:
        found = find_files(path)
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist",
                "Pass the folder that AdamMonitor prints when a run ends, or a folder that contains"
                " runs",
            )
        if not found:
            raise ConfigError(
                f"{path} contains no run: no .wandb file of WandbLogger(offline=True), no"
                " metrics.csv of CSVLogger, and no event file of TensorBoardLogger",
                "Train with one of these loggers",
            )
        files |= dict.fromkeys(found)
    runs: dict[str, list[RunPart]] = {}
    size = sum(file.stat().st_size for file in files)
    # disable=None: only shown in a terminal.
    with tqdm(
        total=size, unit="B", unit_scale=True, desc="reading", leave=False, disable=None
    ) as bar:
        for file in files:
            read = next(each for name, each in FORMATS.items() if fnmatch(file.name, name))
            part = read(file, bar.update)
            runs.setdefault(part.identity, []).append(part)
    return [*map(join, runs.values())]


def find_files(path: Path) -> list[Path]:
    """Returns the log files at a path; empty if there are none."""
    # Resolved, so that a link such as W&B's latest-run is not read twice.
    candidates = [path] if path.is_file() else path.rglob("*")
    found = {each.resolve() for each in candidates if _is_log(each) and each.is_file()}
    events = {file for file in found if fnmatch(file.name, EVENTS)}
    folders = {file.parent for file in events}
    # In subfolders of a run, add_scalars writes curves that share a chart; they are ignored.
    return sorted(found - {each for each in events if not folders.isdisjoint(each.parent.parents)})


def _is_log(file: Path) -> bool:
    return any(fnmatch(file.name, name) for name in FORMATS)
