"""Training runs, and the files of their loggers."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import wandb
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch.optim import Optimizer

from lightning_adam import AdamMonitor
from tests.support.commands import GLOBAL_STEP, history, offline_runs, our_rows
from tests.support.training import run_training

Row = Mapping[str, Any]


class OfflineRun(NamedTuple):
    """A training run with a W&B and a TensorBoard logger."""

    module: L.LightningModule
    optimizer: Optimizer
    folder: Path
    """The folder of the offline run of W&B."""
    rows: list[dict[str, Any]]
    """The history in W&B."""
    events: EventAccumulator


class Table(NamedTuple):
    step: int
    columns: list[str]
    rows: list[list[Any]]


def fit_offline(
    folder: Path, module: L.LightningModule, monitor: AdamMonitor, batches: int, **flags: Any
) -> OfflineRun:
    loggers = [WandbLogger(offline=True, save_dir=folder), TensorBoardLogger(folder)]
    with pytest.MonkeyPatch.context() as environment:
        # An offline run stages its tables there, until it is synced.
        environment.setenv("WANDB_DATA_DIR", str(folder))
        try:
            run = run_training(module, monitor, data=batches, logger=loggers, **flags)
        finally:
            wandb.finish()
    (offline_run,) = offline_runs(folder)
    rows, events = history(offline_run), events_under(folder)
    return OfflineRun(module, run.trainer.optimizers[0], offline_run, rows, events)


def events_under(folder: Path) -> EventAccumulator:
    """Returns the event files of TensorBoard, with all histograms."""
    (events,) = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(events), size_guidance={"histograms": 0}).Reload()


def steps_of(rows: Iterable[Row], key: str) -> list[int]:
    return [row[GLOBAL_STEP] for row in rows if key in row]


def tables(offline_run: Path, rows: Sequence[Row], key: str) -> list[Table]:
    """Returns the tables under a key of a run's history."""
    found = []
    for row in rows:
        if f"{key}.path" in row:
            text = (offline_run / "files" / row[f"{key}.path"]).read_text(encoding="utf-8")
            content = json.loads(text)
            found.append(Table(row[GLOBAL_STEP], content["columns"], content["data"]))
    return found


def csv_rows(folder: Path) -> dict[int, dict[str, float]]:
    """Returns this package's keys in the CSV logger's file, by step."""
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    return our_rows(rows, "step")
