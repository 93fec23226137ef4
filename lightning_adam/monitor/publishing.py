"""`Publisher`: writes measurements and findings to every logger of a trainer.

wandb takes a second to import, so it is only imported for a WandbLogger.
"""

import itertools
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_adam.config.monitor import Severity
from lightning_adam.monitor.failsafe import warn_only
from lightning_adam.monitor.log_keys import DENOMINATOR, EPS_CURVE, FINDINGS, TENSOR, X_AXIS
from lightning_adam.monitor.loggers import is_csv, is_tensorboard, is_wandb, location, run_folder
from lightning_adam.optim.console import log_info
from lightning_adam.statistics.histograms import (
    EPS_SHOWN,
    Histogram,
    dominated_fractions,
    fold,
)

if TYPE_CHECKING:
    import wandb


class Publisher:
    """Writes to each logger of a trainer, independently of the others.

    On an error in a logger, it warns once for that logger. Other loggers and later rows are not
    affected.

    Args:
        trainer: The trainer.

    Example:
        >>> publisher = Publisher(Trainer(logger=False, barebones=True))
        >>> publisher.log_metrics({"adam_update/update_norm": 2.0}, step=0)
        >>> publisher.each(lambda logger: logger.save())
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._failed: set[int] = set()

    def each(self, publish: Callable[..., object], *arguments: Any) -> None:
        """Calls a function with every logger and the arguments."""
        for logger in self._trainer.loggers:
            try:
                publish(logger, *arguments)
            except Exception:
                self._warn_once(logger)

    def log_metrics(
        self, values: Mapping[str, float], step: int, tensors: Mapping[str, str] | None = None
    ) -> None:
        """Logs numbers.

        Args:
            values: The numbers by key; if empty, nothing is logged.
            step: The logged step.
            tensors: Names of tensors by the key of their number; for loggers that support strings
                (default: none).
        """
        named = {f"{key}{TENSOR}": name for key, name in (tensors or {}).items()}
        if values:
            self.each(_log_metrics, values, named, step)

    def _warn_once(self, logger: Logger) -> None:
        if id(logger) not in self._failed:
            self._failed.add(id(logger))
            warn_only(
                f"{type(logger).__name__} failed to log what AdamMonitor measured. Monitoring and"
                f" training continue; later errors of this logger are not shown.\n"
                f"{traceback.format_exc()}"
            )


def takes_histograms(logger: Logger) -> bool:
    """Returns whether `log_exponents` logs to a logger.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> takes_histograms(CSVLogger("."))
        False
    """
    return is_wandb(logger) or is_tensorboard(logger)


def _log_metrics(
    logger: Logger, values: Mapping[str, float], named: Mapping[str, str], step: int
) -> None:
    if named and (is_wandb(logger) or is_csv(logger)):
        logger.log_metrics({**values, **named}, step=step)  # type: ignore[dict-item]
        return
    logger.log_metrics(values, step=step)  # type: ignore[arg-type]
    if named and is_tensorboard(logger):
        rank_zero_only(_add_texts)(logger, named, step)


def _add_texts(logger: TensorBoardLogger, texts: Mapping[str, str], step: int) -> None:
    for key, text in texts.items():
        logger.experiment.add_text(key, text, step)


def log_settings(logger: Logger, settings: Mapping[str, Any]) -> None:
    """Logs settings to the run's config, and sets the x-axis of the monitor's keys in W&B."""
    logger.log_hyperparams({"lightning_adam": settings})
    if is_wandb(logger):
        logger.experiment.define_metric("adam_*", step_metric=X_AXIS)
    elif is_tensorboard(logger):
        rank_zero_only(_rewrite_hparams)(logger)


def _rewrite_hparams(logger: TensorBoardLogger) -> None:
    """Saves `hparams.yaml` again, because the logger never overwrites it."""
    Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
    logger.save()


def log_location(logger: Logger) -> None:
    """Logs where a logger has written its run, and the command that writes a report of it."""
    found = location(logger)
    if found is not None:
        report = f"; report: {found.report}" if found.report else ""
        log_info(f"AdamMonitor logged to {found.place} ({type(logger).__name__}){report}")


def log_exponents(logger: Logger, exponents: Mapping[str, Sequence[int]], step: int) -> None:
    """Logs counts by binary exponent as histograms with log2 bins.

    W&B also gets a curve of the fraction of elements that each eps would dominate.

    Args:
        logger: A logger; only WandbLogger and TensorBoardLogger log histograms.
        exponents: The counts that `AdamStatistics.compute_exponents` returns.
        step: The logged step.
    """
    if is_wandb(logger):
        import wandb

        histograms = {}
        for key, counts in exponents.items():
            shown = fold(counts)
            binned = (np.asarray(shown.counts), np.asarray(shown.log2_edges))
            histograms[key] = wandb.Histogram(np_histogram=binned)
        curves = _eps_curves(exponents)
        for key, curve in curves.items():
            _save_as_file(curve.table, logger, f"{key}_table")
        logger.log_metrics({**histograms, **curves}, step)  # type: ignore[dict-item]
    elif is_tensorboard(logger):
        for key, counts in exponents.items():
            _log_to_tensorboard(logger, key, fold(counts), step)


def _eps_curves(exponents: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Returns a chart for each optimizer, with a line for the model and each group."""
    lines: dict[str, dict[str, list[float]]] = {}
    histogram, quantity = DENOMINATOR.split("/")
    family, curve = EPS_CURVE.split("/")
    for key, counts in exponents.items():
        _, *scope, last = key.split("/")
        if last == quantity and key.startswith(f"{histogram}/"):
            optimizer, inner = (scope[:2], scope[2:]) if scope[:1] == ["optimizer"] else ([], scope)
            chart = lines.setdefault("/".join([family, *optimizer, curve]), {})
            chart["/".join(inner) or "model"] = dominated_fractions(counts)
    import wandb

    return {
        key: wandb.plot.line_series(
            xs=[math.log10(eps) for eps in EPS_SHOWN],
            ys=list(chart.values()),
            keys=list(chart),
            title="Elements that eps would dominate",
            xname="log10(eps)",
        )
        for key, chart in lines.items()
    }


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


def log_table(
    logger: WandbLogger, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Logs a table to W&B, stored as a file of the run."""
    import wandb

    table = wandb.Table(columns=[*columns], data=[*map(list, rows)])
    _save_as_file(table, logger, key)
    logger.log_metrics({key: table}, step)  # type: ignore[dict-item]


@rank_zero_only
def _save_as_file(table: "wandb.Table", logger: WandbLogger, key: str) -> None:
    from lightning_adam._compat.wandb import keep_as_file

    keep_as_file(table, logger.experiment, key)


@rank_zero_only
def write_findings(logger: Logger, content: Mapping[str, Any]) -> None:
    """Writes `adam_findings.json` to the run's folder.

    Args:
        logger: A logger.
        content: `measurements`, `seconds`, `has_ended`, and `findings` as rows of `Finding.as_row`.
    """
    folder = run_folder(logger)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{FINDINGS}.json"
        # Replaced at once, so that a reader never finds an incomplete file.
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
        unfinished.replace(file)


@rank_zero_only
def log_findings(logger: Logger, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Logs a table and a summary of all findings to W&B.

    Args:
        logger: A logger; nothing is logged unless it is a WandbLogger.
        rows: Rows of `Finding.as_row`; at least one.
        step: The logged step.
    """
    if is_wandb(logger):
        log_table(logger, FINDINGS, [*rows[0]], [*map(_cells, rows)], step)
        shown = [row for row in rows if row["step"] and row["severity"] != Severity.info.value]
        # Latest first, so that the first step of each finding remains.
        for row in sorted(shown, key=lambda each: -each["step"]):
            logger.experiment.summary[f"{FINDINGS}_raised/{row['code']}"] = row["step"]
        is_open = dict.fromkeys(row["code"] for row in shown if row["closed"] is None)
        logger.experiment.summary[f"{FINDINGS}_open"] = ", ".join(is_open)


def _cells(row: Mapping[str, Any]) -> list[Any]:
    return [json.dumps(each) if isinstance(each, list | dict) else each for each in row.values()]


@rank_zero_only
def alert(logger: Logger, title: str, text: str) -> None:
    """Sends a W&B alert, if the run is online."""
    if is_wandb(logger) and not logger.experiment.offline:
        logger.experiment.alert(title=title, text=text)
