"""Measurements that arrive late from the device are logged under the step they belong to."""

import math
from typing import Any

import pytest
import torch

from lightning_adam import AdamMonitor, AdamStatistics
from tests.statistics.cases import stepped
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import (
    BAD_STEPS,
    KEY,
    SELF_SCALING,
    BadBatches,
    DelayedArrival,
    fit_monitored,
    fit_with_scaler,
    step_counts,
    steps_logged,
)
from tests.support.tables import each_row
from tests.support.training import TrainingRun, run_training

NEVER_IN_TIME = 1000
SCHEDULE = {"name": "cosine", "total_steps": 10, "warmup_steps": 3}


def rows(run: TrainingRun) -> list[tuple[int | None, dict[str, float]]]:
    return [(step, row) for step, row in run.logger.rows if any("adam_" in key for key in row)]


@pytest.fixture
def delay(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how often a measurement has to be asked for before it arrives."""

    def set_delay(asked_for: int) -> None:
        monkeypatch.setattr(
            "lightning_adam.monitor.tracked_optimizer.PendingMeasurement", DelayedArrival
        )
        monkeypatch.setattr(DelayedArrival, "asked_for", asked_for)

    return set_delay


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_late_rows_are_logged_unchanged_and_in_order(every_n_steps: int, delay: Any) -> None:
    def run() -> TrainingRun:
        settings: dict[str, Any] = {"statistics": "all", "histograms_every_n_steps": 4}
        return fit_monitored(AdamMonitor(every_n_steps, **settings), data=12)

    in_time = run()
    assert len(rows(in_time)) == (12 if every_n_steps == 1 else 5)
    with each_row() as row:
        for asked_for in (1, 3, NEVER_IN_TIME):
            delay(asked_for)
            late = run()
            with row(f"asked_for={asked_for}"):
                assert rows(late) == rows(in_time)
    of_loss = [at for at, (_, row) in enumerate(late.logger.rows) if "loss" in row]
    of_monitor = [at for at, (_, row) in enumerate(late.logger.rows) if KEY in row]
    assert min(of_monitor) > max(of_loss), "they are logged at the end, which waits for them"


def test_late_rows_are_logged_after_an_exception(delay: Any) -> None:
    class Breaking(BadBatches):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4:
                raise ZeroDivisionError("planted")
            return super().training_step(batch, batch_idx)

    delay(NEVER_IN_TIME)
    recorder = MemoryLogger()
    with pytest.raises(ZeroDivisionError, match="planted"):
        run_training(Breaking("for-loop"), AdamMonitor(1), logger=recorder)
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]


@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
def test_late_flags_of_skipped_steps_correct_the_step_counts(
    every_n_steps: int, delay: Any
) -> None:
    """Every logged row has the right step and the right number of skipped steps.

    Until the first flag arrives the monitor counts skipped steps as taken, and may measure one that
    is not due. Such a row is left out, and the next ones are due again.
    """
    statistics = ["lr", "step", "skipped_steps", "grad_norm"]
    expected = step_counts(BAD_STEPS, every_n_steps)
    with each_row() as row:
        for asked_for in (1, 2, NEVER_IN_TIME):
            delay(asked_for)
            module = BadBatches(SELF_SCALING, SCHEDULE, BAD_STEPS)
            run = fit_with_scaler(module, AdamMonitor(every_n_steps, statistics=statistics))
            with row(f"asked_for={asked_for}"):
                assert set(steps_logged(run)) <= set(expected)
                assert every_n_steps > 1 or steps_logged(run) == expected


def test_measurement_on_the_host_has_arrived() -> None:
    statistics = AdamStatistics()
    statistics.update(stepped([torch.nn.Parameter(torch.randn(3))], decoupled=True))
    flags = (torch.tensor(3.0), torch.tensor(1.0))
    with each_row() as row:
        for given, found in [((), None), (flags, (3, True))]:
            for loss in (None, 0.5):
                with row((given, loss)):
                    scalar = None if loss is None else torch.tensor(loss)
                    pending = PendingMeasurement(statistics.measurement, given, scalar)
                    assert pending.has_arrived()
                    assert pending.measurement().values() == statistics.compute()
                    assert pending.flags() == found
                    assert pending.loss() == loss or loss is None and math.isnan(pending.loss())
