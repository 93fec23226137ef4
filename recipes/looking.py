"""Where a recipe has written its run, and how to look at it."""

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
    """Ends the run, writes its report, and prints the paths of both."""
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
    """Returns a metric of the last validation.

    Raises:
        ConfigError: If there was none, because the resumed run was complete. It suggests to train
            for `epochs` more.
    """
    if metric not in trainer.callback_metrics:
        raise ConfigError(
            f"trainer.max_epochs={trainer.max_epochs} is no more than {resumed_from} has done",
            f"Use for example trainer.max_epochs={trainer.current_epoch + epochs}",
        )
    return float(trainer.callback_metrics[metric])


def where_to_look(logger: Logger) -> str:
    """Returns the path of the run and, if there is one, the command that shows it."""
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
    """Returns the folder of the run, if a report can be written of it."""
    if isinstance(logger, WandbLogger):
        return Path(logger.experiment.dir).parent
    is_read = isinstance(logger, CSVLogger | TensorBoardLogger)
    return Path(str(logger.log_dir)) if is_read else None


def format_value(path: str) -> str:
    """Returns a path for the shell, relative if it is below the current folder."""
    relative = os.path.relpath(path)
    return shlex.quote(path if relative.startswith("..") else relative)
