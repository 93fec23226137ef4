"""Trainings and what their loggers left on the disk, read back."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch.optim import Optimizer

from lightning_adam import AdamMonitor
from tests.support.commands import GLOBAL_STEP, history, offline_runs, our_rows
from tests.support.training import ADAMW, Lit, loader, parameters, trainer

Row = Mapping[str, Any]


class Trained(NamedTuple):
    module: L.LightningModule
    optimizer: Optimizer
    offline_run: Path
    rows: list[dict[str, Any]]
    """Of W&B's history."""
    events: EventAccumulator


class Table(NamedTuple):
    step: int
    columns: list[str]
    rows: list[list[Any]]


def fitted(
    folder: Path, monitor: AdamMonitor, batches: int, module: Any = None, **flags: Any
) -> Trained:
    """A training with a constant learning rate: at its end Adam stands as it was measured."""
    module = module or Lit(ADAMW)
    loggers = [WandbLogger(offline=True, save_dir=folder), TensorBoardLogger(folder)]
    fit = trainer(max_epochs=1, callbacks=[monitor], logger=loggers, **flags)
    with pytest.MonkeyPatch.context() as environment:
        # An offline run stages its tables there, until it is synced.
        environment.setenv("WANDB_DATA_DIR", str(folder))
        try:
            fit.fit(module, loader(batches))
        finally:
            wandb.finish()
    (offline_run,) = offline_runs(folder)
    return Trained(
        module, fit.optimizers[0], offline_run, history(offline_run), events_under(folder)
    )


def with_logger(
    monitor: AdamMonitor, logger: Logger, batches: int = 3, module: Any = None
) -> L.LightningModule:
    trained: L.LightningModule = module or Lit(ADAMW)
    trainer(max_epochs=1, callbacks=[monitor], logger=logger).fit(trained, loader(batches))
    return trained


def events_under(folder: Path) -> EventAccumulator:
    """What TensorBoard left, all of its histograms included."""
    (events,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(events), size_guidance={"histograms": 0}).Reload()


def steps_of(rows: Iterable[Row], key: str) -> list[int]:
    return [row[GLOBAL_STEP] for row in rows if key in row]


def tables(offline_run: Path, rows: Sequence[Row], key: str) -> list[Table]:
    """The tables that a run's history has under a key."""
    found = []
    for row in rows:
        if f"{key}.path" in row:
            text = (offline_run / "files" / row[f"{key}.path"]).read_text(encoding="utf-8")
            content = json.loads(text)
            found.append(Table(row[GLOBAL_STEP], content["columns"], content["data"]))
    return found


def csv_rows(folder: Path) -> dict[int, dict[str, float]]:
    """Our keys in the CSV logger's file, by step."""
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    return our_rows(rows, "step")


def have_same_parameters(one: L.LightningModule, other: L.LightningModule) -> bool:
    pairs = zip(parameters(one), parameters(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
