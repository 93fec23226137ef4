"""To all loggers of a trainer what is measured; to each what Lightning has no method for.

wandb, which takes a second to import, is imported only where one of them is W&B's.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_adam._compat.lightning import either
from lightning_adam.monitor.log_keys import DENOMINATOR, EPS_CURVE, FINDINGS, LAYERS
from lightning_adam.statistics.histograms import (
    EPS_SHOWN,
    Histogram,
    dominated_fractions,
    fold,
)

if TYPE_CHECKING:
    import wandb

ROWS_AT_ONCE = 1000
"""The rows of a layers' table that are sent together: about as many a killed run loses."""


def warn_without_logger(trainer: Trainer) -> None:
    """Warns that `callback_metrics` alone gets the measurements if the trainer has no logger."""
    if not trainer.loggers:
        rank_zero_warn(
            "AdamMonitor has no logger: its numbers are in trainer.callback_metrics only."
            " Give the Trainer one, such as WandbLogger(offline=True)."
        )


def log_values(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Logs numbers to every logger of a trainer, and to its `callback_metrics`.

    Args:
        trainer: The trainer.
        values: The numbers, by key; if there are none, nothing is logged.
        step: The step of the x-axis.

    Example:
        >>> trainer = Trainer(logger=False, barebones=True)
        >>> log_values(trainer, {"adam_update/update_norm": 2.0}, step=0)
        >>> float(trainer.callback_metrics["adam_update/update_norm"])
        2.0
    """
    trainer.callback_metrics.update(
        {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    )
    for logger in trainer.loggers if values else ():
        logger.log_metrics(values, step=step)  # type: ignore[arg-type]


def is_wandb(logger: Logger) -> TypeGuard[WandbLogger]:
    """Returns whether a logger is W&B's, of `lightning` or of `pytorch_lightning`."""
    return isinstance(logger, either("loggers.WandbLogger"))


def _is_tensorboard(logger: Logger) -> TypeGuard[TensorBoardLogger]:
    return isinstance(logger, either("loggers.TensorBoardLogger"))


def takes_histograms(logger: Logger) -> bool:
    """Whether `log_exponents` has something for a logger.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> takes_histograms(CSVLogger("."))
        False
    """
    return is_wandb(logger) or _is_tensorboard(logger)


def log_exponents(logger: Logger, exponents: Mapping[str, Sequence[int]], step: int) -> None:
    """Logs counts by binary exponent as histograms over the logarithm to base 2.

    W&B gets the curve of what any eps would dominate too.

    Args:
        logger: A logger; all but W&B's and TensorBoard's are passed over.
        exponents: What `AdamStatistics.compute_exponents` returned.
        step: The step of the x-axis.
    """
    if is_wandb(logger):
        import wandb

        histograms = {
            key: wandb.Histogram(
                np_histogram=(np.asarray(shown.counts), np.asarray(shown.log2_edges))
            )
            for key, shown in _folded(exponents).items()
        }
        curves = _eps_curves(exponents)
        for key, curve in curves.items():
            _keep_as_file(curve.table, logger, f"{key}_table")
        logger.log_metrics({**histograms, **curves}, step)  # type: ignore[dict-item]
    elif _is_tensorboard(logger):
        for key, shown in _folded(exponents).items():
            _log_to_tensorboard(logger, key, shown, step)


def _folded(exponents: Mapping[str, Sequence[int]]) -> dict[str, Histogram]:
    return {key: fold(counts) for key, counts in exponents.items()}


def _eps_curves(exponents: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What any eps would dominate, one line a scope, a chart for each optimizer."""
    lines: dict[str, dict[str, list[float]]] = {}
    for key, counts in exponents.items():
        if key.startswith(DENOMINATOR):
            optimizer, separator, group = key.removeprefix(DENOMINATOR).partition("/group/")
            chart = lines.setdefault(EPS_CURVE + optimizer, {})
            chart[f"group/{group}" if separator else "model"] = dominated_fractions(counts)
    import wandb

    return {
        key: wandb.plot.line_series(
            xs=[math.log10(eps) for eps in EPS_SHOWN],
            ys=list(chart.values()),
            keys=list(chart),
            title="elements that eps would dominate",
            xname="log10(eps)",
        )
        for key, chart in lines.items()
    }


@rank_zero_only
def log_findings(logger: Logger, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Keeps all findings so far as a file in the run's folder; W&B gets a table and a summary too.

    Args:
        logger: A logger.
        rows: What `Finding.as_row` returns, one for each; at least one.
        step: The step of the x-axis.
    """
    folder = run_folder(logger)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{FINDINGS}.json"
        # Whoever reads it in the meantime finds the old one whole.
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        unfinished.replace(file)
    if is_wandb(logger):
        import wandb

        table = wandb.Table(columns=[*rows[0]], data=[_cells(row) for row in rows])
        _keep_as_file(table, logger, FINDINGS)
        logger.log_metrics({FINDINGS: table}, step)  # type: ignore[dict-item]
        holding = [row["code"] for row in rows if row["closed"] is None]
        for code in dict.fromkeys(row["code"] for row in rows):
            first = min(row["step"] for row in rows if row["code"] == code)
            logger.experiment.summary[f"{FINDINGS}_raised/{code}"] = first
        logger.experiment.summary[f"{FINDINGS}_open"] = ", ".join(dict.fromkeys(holding))


def _cells(row: Mapping[str, Any]) -> list[Any]:
    return [json.dumps(each) if isinstance(each, list | dict) else each for each in row.values()]


def run_folder(logger: Logger) -> Path | None:
    """Where a logger keeps the files of its run; None if it keeps none.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> run_folder(CSVLogger("logs", version="a_run")).name
        'a_run'
    """
    if is_wandb(logger):
        run = logger.experiment
        return None if getattr(run, "disabled", False) else Path(run.dir)
    folder = getattr(logger, "log_dir", None)
    return Path(folder) if folder else None


@rank_zero_only
def alert(logger: Logger, title: str, text: str) -> None:
    """Sends a W&B alert, if the run is online."""
    if is_wandb(logger) and not logger.experiment.offline:
        logger.experiment.alert(title=title, text=text)


@rank_zero_only
def _keep_as_file(table: "wandb.Table", logger: WandbLogger, key: str) -> None:
    from lightning_adam._compat.wandb import keep_as_file

    keep_as_file(table, logger.experiment, key)


def _log_to_tensorboard(logger: TensorBoardLogger, key: str, shown: Histogram, step: int) -> None:
    edges, counts = shown.log2_edges, shown.counts
    centers = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    occupied = [position for position, number in enumerate(counts) if number]
    logger.experiment.add_histogram_raw(
        key,
        min=edges[occupied[0]] if occupied else 0.0,
        max=edges[occupied[-1] + 1] if occupied else 0.0,
        num=sum(counts),
        sum=sum(number * center for number, center in zip(counts, centers, strict=True)),
        sum_squares=sum(number * center**2 for number, center in zip(counts, centers, strict=True)),
        bucket_limits=edges[1:],
        bucket_counts=counts,
        global_step=step,
    )


class LayerTable:
    """Rows of layers, sent to W&B piece by piece as training goes.

    Each piece is a table of its own under `adam_layers`: in a W&B panel,
    `runs.history.concat["adam_layers"]` joins them.

    Args:
        columns: The table's columns.

    Example:
        >>> table = LayerTable(["trainer/global_step", "layer", "grad_norm"])
        >>> table.add({"trainer/global_step": 0, "layer": "net.0", "grad_norm": 1.5})
        >>> len(table.rows)
        1
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns: list[str | int] = list(columns)
        self.rows: list[list[str | float | None]] = []

    def add(self, row: Mapping[str, str | float]) -> None:
        """Keeps a row; a column that it lacks stays empty."""
        self.rows.append([row.get(str(column)) for column in self.columns])

    def send(self, loggers: Sequence[Logger], step: int) -> None:
        """Sends the rows and forgets them.

        Args:
            loggers: The trainer's; all but W&B's are passed over.
            step: The step of the x-axis.
        """
        rows, self.rows = self.rows, []
        for logger in loggers:
            if is_wandb(logger):
                import wandb

                # W&B cuts a table that is longer.
                most = wandb.Table.MAX_ROWS
                for first in range(0, len(rows), most):
                    table = wandb.Table(columns=self.columns, data=rows[first : first + most])
                    _keep_as_file(table, logger, LAYERS)
                    logger.log_metrics({LAYERS: table}, step)  # type: ignore[dict-item]
