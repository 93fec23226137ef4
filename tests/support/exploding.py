"""Runs that fail at a known step, and their flight recorder files."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam import AdamMonitor
from lightning_adam.statistics.catalogue import HYPERPARAMETER_STATISTICS, STATISTICS
from tests.support.memory_logger import MemoryLogger
from tests.support.training import ADAMW, Lit, loader, trainer

Row = dict[str, str]


class Exploding(Lit):
    """Applies a fault before one of its optimizer steps, counted from 1."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__(ADAMW, {"name": "constant"})
        self.at, self.how = at, how
        self.steps = 0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.steps += 1
        if self.steps == self.at:
            FAULTS[self.how](self)


def multiply_lr(module: Exploding) -> None:
    for group in module.trainer.optimizers[0].param_groups:
        group["lr"] *= 1e4


def multiply_gradient(module: Exploding) -> None:
    for parameter in module.net[0].parameters():
        assert parameter.grad is not None
        parameter.grad *= 1e6


def break_gradient(module: Exploding) -> None:
    assert isinstance(module.net[1].bias.grad, Tensor)
    module.net[1].bias.grad[2] = math.nan


def break_weight(module: Exploding) -> None:
    with torch.no_grad():
        next(module.net[3].parameters())[0, 0] = math.inf


FAULTS = {
    "learning rate": multiply_lr,
    "gradient": multiply_gradient,
    "nan in a gradient": break_gradient,
    "inf in a weight": break_weight,
}


def recorded(
    module: Any, steps: int | None = 10, batches: int = 100, **flags: Any
) -> tuple[MemoryLogger, Path]:
    """Trains with a flight recorder of `steps` steps.

    Returns:
        The logger, and the folder of the run.
    """
    recorder = MemoryLogger()
    monitor = AdamMonitor(1, ["model", "layer"], "all", flight_recorder=steps)
    settings = {"max_epochs": 1, "logger": recorder, "callbacks": [monitor], **flags}
    trainer(**settings).fit(module, loader(batches))
    return recorder, Path(recorder.log_dir)


def files_of(folder: Path | str) -> list[Path]:
    """Returns the files in the recorder's folder of a run, the earliest step first."""
    found = Path(folder).glob("adam_flight_recorder/*")
    return sorted(found, key=lambda file: int(file.name.split("_")[1]))


def read(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def steps_of(rows: list[Row]) -> list[int]:
    return list(dict.fromkeys(int(row["optimizer_step"]) for row in rows))


def numbers(row: Mapping[str, str]) -> dict[str, float]:
    """Returns the statistics that are defined, by key."""
    scope = f"layer/{row['layer']}/" if row["scope"] == "layer" else ""
    return {
        statistic.key_of(scope): float(row[name])
        for name, statistic in STATISTICS.items()
        if row[name]
    }


def is_hyperparameter(key: str) -> bool:
    """Returns whether a statistic is logged only when it changes."""
    return key.rpartition("/")[2] in HYPERPARAMETER_STATISTICS


def logged_by(recorder: MemoryLogger) -> dict[int | None, dict[str, float]]:
    """Returns the metrics that the monitor logs at each measurement, by the step on the x-axis."""

    def is_ours(key: str) -> bool:
        return key.startswith("adam_") and not is_hyperparameter(key)

    return {
        step: {key: value for key, value in row.items() if is_ours(key)}
        for step, row in recorder.rows
        if any(key.startswith("adam_") for key in row)
    }
