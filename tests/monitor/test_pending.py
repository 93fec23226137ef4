"""Measurements that arrive late from the device are logged at their step."""

import math
import warnings
from typing import Any

import pytest
import torch

from lightning_adam import AdamMonitor, AdamStatistics
from lightning_adam.monitor import pending
from lightning_adam.monitor.pending import AsyncHostCopy, PendingMeasurement
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
    """Returns a function that sets how often a measurement is polled before it arrives."""

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
    assert len(rows(in_time)) == (12 if every_n_steps == 1 else 7), "percentiles are rows too"
    with each_row() as row:
        for asked_for in (1, 3, NEVER_IN_TIME):
            delay(asked_for)
            late = run()
            with row(f"asked_for={asked_for}"):
                assert rows(late) == rows(in_time)
    of_loss = [at for at, (_, row) in enumerate(late.logger.rows) if "loss" in row]
    of_monitor = [at for at, (_, row) in enumerate(late.logger.rows) if KEY in row]
    assert min(of_monitor) > max(of_loss), (
        "they are logged at the end of the run, which waits for them"
    )


class Breaking(BadBatches):
    """An exception ends the run in the fifth batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4:
            raise ZeroDivisionError("planted")
        return super().training_step(batch, batch_idx)


def fit_breaking(monitor: AdamMonitor) -> MemoryLogger:
    recorder = MemoryLogger()
    with pytest.raises(ZeroDivisionError, match="planted"):
        run_training(Breaking("for-loop"), monitor, logger=recorder)
    return recorder


def test_late_rows_are_logged_after_an_exception(delay: Any) -> None:
    delay(20)
    assert fit_breaking(AdamMonitor(1)).steps_of(KEY) == [0, 1, 2, 3]


def test_rows_that_never_arrive_do_not_delay_the_end_after_an_exception(
    delay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective never ends if another rank has exited; waiting for it would hang."""
    delay(10**9)
    monkeypatch.setattr("lightning_adam.monitor.session.EXCEPTION_WAIT_S", 0.01)
    monkeypatch.setattr(DelayedArrival, "must_not_wait", True)
    recorder_path = "lightning_adam.monitor.flight_recorder.recorder.PendingMeasurement"
    monkeypatch.setattr(recorder_path, DelayedArrival)
    monitor = AdamMonitor(1, flight_recorder=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit_breaking(monitor).steps_of(KEY) == []
    assert not [each for each in caught if "AdamMonitor failed" in str(each.message)]
    assert monitor.state_dict()["steps"] == {"": [4, 0]}


@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
def test_late_flags_of_skipped_steps_correct_the_step_counts(
    every_n_steps: int, delay: Any
) -> None:
    """Every logged row has the correct step and number of skipped steps.

    Until the first flag arrives, the monitor counts skipped steps as taken and may measure a step
    that is not due. Such a row is not logged.
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
                    sent = PendingMeasurement(statistics.measurement, given, scalar)
                    assert sent.has_arrived()
                    assert sent.measurement().values() == statistics.compute()
                    assert sent.flags() == found
                    assert sent.loss() == pytest.approx(loss or math.nan, nan_ok=True)


class FakeTensor:
    """The attributes of a CUDA tensor that a copy to the host reads."""

    is_cuda = True

    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)


def test_tensors_of_several_devices_have_arrived_when_all_devices_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: set[torch.device] = set()

    class Event:
        def record(self, stream: torch.device) -> None:
            self.device = stream

        def query(self) -> bool:
            return self.device in done

    monkeypatch.setattr("lightning_adam.monitor.pending._copy", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    copy = AsyncHostCopy([FakeTensor(0), FakeTensor(1)])  # type: ignore[list-item]
    for device in (0, 1):
        assert not copy.has_arrived()
        done.add(torch.device("cuda", device))
    assert copy.has_arrived()


def test_copies_are_on_the_host_with_any_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty, made = torch.empty, []

    def empty_unpinned(*arguments: Any, pin_memory: bool, **keywords: Any) -> torch.Tensor:
        made.append(empty(*arguments, **keywords))
        return made[-1]

    class OnDevice:
        is_cuda, shape, dtype = True, (2,), torch.float64

    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta", "otherwise nothing is tested"
    monkeypatch.setattr(torch, "empty", empty_unpinned)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda host, *_, **__: host)
    with torch.device("meta"):
        pending._copy(OnDevice())  # type: ignore[arg-type]
    assert [each.device.type for each in made] == ["cpu"]


def test_flags_are_those_of_the_measured_step(delay: Any) -> None:
    """A row that arrives after the optimizer has dropped its flags uses its own copy."""

    class LosesFlags(BadBatches):
        def on_train_batch_end(self, *arguments: Any) -> None:
            (tracked,) = self.trainer.callbacks[-1]._session.tracked  # type: ignore[attr-defined]
            tracked.counter.flags = None

    delay(1)
    statistics = ["step", "skipped_steps"]
    module = LosesFlags(SELF_SCALING, SCHEDULE, bad_batches=(1,))
    monitor = AdamMonitor(1, statistics=statistics)
    run = fit_with_scaler(module, monitor, data=4)
    assert [x for x, *_ in steps_logged(run)] == [0, 2, 3]
