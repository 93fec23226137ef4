"""`RowLog`: passes measurements to rules, loggers and `callback_metrics` once they have arrived."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from lightning_adam._compat.lightning import logging_step
from lightning_adam.config.monitor import MonitorConfig, Scope
from lightning_adam.monitor.failsafe import Failsafe
from lightning_adam.monitor.finding_reporter import FindingReporter
from lightning_adam.monitor.layer_table import ROWS_AT_ONCE, LayerTable
from lightning_adam.monitor.log_keys import X_AXIS
from lightning_adam.monitor.pending import PendingQueue
from lightning_adam.monitor.preconditions import warn_unsupported
from lightning_adam.monitor.publishing import Publisher, log_exponents
from lightning_adam.monitor.tracked_optimizer import PendingStep
from lightning_adam.statistics.catalogue import HYPERPARAMETER_STATISTICS
from lightning_adam.statistics.histograms import percentiles
from lightning_adam.statistics.measurement import Measurement


class _Row(NamedTuple):
    """Measurements that are logged together."""

    x: int
    """The logged step."""
    steps: Sequence[PendingStep]

    def has_arrived(self) -> bool:
        return all(each.has_arrived() for each in self.steps)


class RowLog:
    """Keeps measurements until they have arrived on the host, and logs them in order.

    Args:
        config: The monitor's config.
        trainer: The trainer.
        publisher: Writes to the loggers.
        failsafe: Disabled if a measurement failed on any rank.
    """

    def __init__(
        self, config: MonitorConfig, trainer: Trainer, publisher: Publisher, failsafe: Failsafe
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._publisher = publisher
        self._failsafe = failsafe
        self.reporter: FindingReporter | None = None
        self.is_empty = True
        """Whether nothing has been logged yet."""
        self.queue: PendingQueue[_Row] = PendingQueue()
        """Rows to log."""
        self._layers = LayerTable([])
        self._hyperparameters: dict[str, float] = {}
        """The last logged values by key."""

    def start(self, statistics: Sequence[str], saved: Mapping[str, Any]) -> None:
        """Starts a run, or restores the state from a checkpoint.

        Args:
            statistics: Names of the measured statistics.
            saved: The loaded state; empty if there is none.
        """
        self._layers = LayerTable([X_AXIS, "optimizer", "layer", *statistics])
        columns, rows = saved.get("layers", [[], []])
        if columns == self._layers.columns:
            self._layers.rows = list(rows)
        self._hyperparameters = dict(saved.get("hyperparameters", {}))

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint."""
        layers = [self._layers.columns, list(self._layers.rows)]
        return {"layers": layers, "hyperparameters": dict(self._hyperparameters)}

    def append(self, steps: Sequence[PendingStep]) -> None:
        """Adds the measurements of a batch at the current logging step."""
        self.queue.append(_Row(logging_step(self._trainer), steps))

    def log_arrived(self, wait_s: float = 0.0, may_wait: bool = True) -> None:
        """Logs the rows that have arrived.

        Args:
            wait_s: How long to wait for the others, as in `PendingQueue.arrived` (default: 0).
            may_wait: Whether a finding may wait for the device (default: True).
        """
        for row in self.queue.arrived(wait_s):
            self._log(row, may_wait)

    def log_layers(self) -> None:
        """Sends the rows of the layer table."""
        rows = self._layers.take()
        if rows:
            self._publisher.each(self._layers.log, rows, logging_step(self._trainer))

    def clear(self) -> None:
        """Discards all rows that are not logged yet."""
        self.queue.clear()
        self._layers.take()

    def _log(self, row: _Row, may_wait: bool) -> None:
        values: dict[str, float] = {}
        tensors: dict[str, str] = {}
        exponents: dict[str, list[int]] = {}
        for step in (each.resolve_skipped() for each in row.steps):
            tracked, due = step.tracked, step.due
            measurement = step.pending.measurement()
            if measurement.failed_rank is not None:
                self._failsafe.disable(measurement.failed_rank)
                return
            if due.statistics:
                values |= measurement.values()
                worst = measurement.worst_tensors()
                tensors |= {key: tensor for key, (_, tensor) in worst.items()}
                self._add_layers(tracked.name, measurement, row.x)
            if self.reporter is not None and (due.statistics or step.is_first):
                loss = step.pending.loss()
                when = (due.statistics, step.is_first, may_wait)
                self.reporter.judge(tracked.name, measurement, step.step, row.x, loss, *when)
            if due.histograms:
                exponents |= measurement.exponent_counts()
            if any(due) and not tracked.has_warned:
                tracked.has_warned = True
                warn_unsupported(tracked, measurement, self._config)
        self._publish(values | percentiles(exponents), tensors, exponents, row.x)

    def _publish(
        self,
        values: Mapping[str, float],
        tensors: Mapping[str, str],
        exponents: Mapping[str, Sequence[int]],
        x: int,
    ) -> None:
        self._trainer.callback_metrics.update(
            {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        )
        changed = {key: value for key, value in values.items() if self._has_changed(key, value)}
        self._publisher.log_metrics(changed, x, tensors)
        if exponents:
            self._publisher.each(log_exponents, exponents, x)
        if len(self._layers.rows) >= ROWS_AT_ONCE:
            self.log_layers()
        self.is_empty &= not values

    def _has_changed(self, key: str, value: float) -> bool:
        """Whether to log a value: hyperparameters are only logged when they change."""
        if key.rpartition("/")[2] not in HYPERPARAMETER_STATISTICS:
            return True
        has_changed = self._hyperparameters.get(key) != value
        self._hyperparameters[key] = value
        return has_changed

    def _add_layers(self, optimizer: str, measurement: Measurement, x: int) -> None:
        for row in measurement.table(Scope.layer) if self._config.layer_table else []:
            name = {"optimizer": optimizer} if optimizer else {}
            self._layers.add({X_AXIS: x, **name, **row})
