"""Types of loggers, and the folders of their runs."""

import shlex
from pathlib import Path
from typing import NamedTuple, TypeGuard

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lightning_adam._compat.lightning import either


def is_wandb(logger: Logger) -> TypeGuard[WandbLogger]:
    """Returns whether a logger is a WandbLogger of `lightning` or `pytorch_lightning`."""
    return isinstance(logger, either("loggers.WandbLogger"))


def is_tensorboard(logger: Logger) -> TypeGuard[TensorBoardLogger]:
    """Returns whether a logger is a TensorBoardLogger of either package."""
    return isinstance(logger, either("loggers.TensorBoardLogger"))


def is_csv(logger: Logger) -> bool:
    """Returns whether a logger is a CSVLogger of either package."""
    return isinstance(logger, either("loggers.CSVLogger"))


def run_folder(logger: Logger) -> Path | None:
    """Returns the local folder of a logger's run; None if there is none.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> run_folder(CSVLogger("logs", version="a_run")).name
        'a_run'
    """
    if is_wandb(logger):
        run = logger.experiment
        return None if getattr(run, "disabled", False) else Path(run.dir)
    folder = getattr(logger, "log_dir", None)
    return Path(folder) if folder and "://" not in str(folder) else None


class Location(NamedTuple):
    """Where a logger writes its run."""

    place: str
    report: str
    """The command that writes a report of the run; empty if reports cannot read it."""


def location(logger: Logger) -> Location | None:
    """Returns where a logger writes its run; None if it writes nothing.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> location(CSVLogger("logs", name="mnist", version="a_run"))
        Location(place='logs/mnist/a_run', report='lightning-adam report logs/mnist/a_run')
    """
    folder = run_folder(logger)
    if is_wandb(logger):
        if folder is None:
            return None
        url = getattr(logger.experiment, "url", None)
        place = _relative_path(folder.parent)
        return Location(f"{url} and {place}" if url else place, report_command(folder.parent))
    if folder is not None:
        is_read = is_csv(logger) or is_tensorboard(logger)
        return Location(_relative_path(folder), report_command(folder) if is_read else "")
    # MLflow and others write to a store, not to a folder.
    parts = [getattr(logger, name, None) for name in ("save_dir", "name", "version")]
    place = "/".join(str(part) for part in parts if part not in (None, ""))
    return Location(place, "") if place else None


def report_command(run: Path) -> str:
    """Returns the command that writes a report of a run."""
    return f"lightning-adam report {shlex.quote(_relative_path(run))}"


def _relative_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
