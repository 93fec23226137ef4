"""Where a recipe has left its run, and how that is looked at."""

import os
import shlex
import sys
from pathlib import Path

import lightning as L
import wandb
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_adam import ConfigError
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import read_runs


def finish(result: str, logger: Logger, checkpoint: ModelCheckpoint) -> None:
    """Ends the run, writes its page beside it, and says where all of it is."""
    look, rows = where_to_look(logger), folder_of(logger)
    wandb.finish()
    print(f"\n{result}")
    print(f"checkpoint: {format_value(checkpoint.best_model_path)}")
    print(look)
    if rows is not None:
        report = Path(HydraConfig.get().runtime.output_dir, "report.html")
        write_report(read_runs([rows]), report)
        print(f"report: {format_value(str(report))}")


def validated(trainer: L.Trainer, metric: str, resumed_from: str | None, epochs: int) -> float:
    """A metric of the last validation.

    Raises:
        ConfigError: If there was none, for what was resumed had been trained to its end; what it
            says to type are so many epochs more.
    """
    if metric not in trainer.callback_metrics:
        raise ConfigError(
            f"trainer.max_epochs={trainer.max_epochs} is no more than {resumed_from} has done",
            f"Use for example trainer.max_epochs={trainer.current_epoch + epochs}",
        )
    return float(trainer.callback_metrics[metric])


def where_to_look(logger: Logger) -> str:
    """The run's place and, where there is one, the command that shows it."""
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        if not run.offline:
            return f"run: {run.url}"
        folder = format_value(run.dir.removesuffix("/files"))
        return f"run: {folder}\nlook: {format_value(f'{sys.prefix}/bin/wandb')} leet {folder}"
    folder = format_value(str(logger.log_dir))
    if isinstance(logger, TensorBoardLogger):
        viewer = format_value(f"{sys.prefix}/bin/tensorboard")
        return f"run: {folder}\nlook: {viewer} --logdir {folder}"
    return f"run: {folder}"


def folder_of(logger: Logger) -> Path | None:
    """Where the rows are that a report can be made of."""
    if isinstance(logger, WandbLogger):
        return Path(logger.experiment.dir).parent
    return Path(str(logger.log_dir)) if isinstance(logger, CSVLogger) else None


def format_value(path: str) -> str:
    """A path for the shell, from the current folder if it lies below that."""
    relative = os.path.relpath(path)
    return shlex.quote(path if relative.startswith("..") else relative)
