"""What the device has not delivered yet is logged later, under the step that it belongs to."""

from typing import Any

import pytest
import torch

from lightning_adam import AdamMonitor, AdamStatistics
from lightning_adam.statistics.measurement import Arriving
from tests.statistics.cases import stepped
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY, fit_monitored
from tests.test_skipped_steps import BAD, COSINE, Failing, counts, counts_of, fit


class Late(Arriving):
    """Arrives when it has been asked for a number of times, as from a device that is behind."""

    asked_for = 3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked = 0

    def has_arrived(self) -> bool:
        self.asked += 1
        return self.asked > self.asked_for


def rows(recorder: MemoryLogger) -> list[tuple[int | None, dict[str, float]]]:
    return [(step, row) for step, row in recorder.rows if any("adam_" in key for key in row)]


@pytest.mark.parametrize("every_n_steps", [1, 3])
@pytest.mark.parametrize("asked_for", [1, 3, 1000])
def test_late_rows_are_those_that_are_in_time(
    every_n_steps: int, asked_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is lost, none is mixed up with a later one, and the order stays."""
    monitor: dict[str, Any] = {
        "statistics": "all",
        "histograms_every_n_steps": 4,
        "layer_table": False,
    }
    _, in_time = fit_monitored(AdamMonitor(every_n_steps, **monitor), batches=12)
    monkeypatch.setattr("lightning_adam.monitor.Arriving", Late)
    monkeypatch.setattr(Late, "asked_for", asked_for)
    _, late = fit_monitored(AdamMonitor(every_n_steps, **monitor), batches=12)
    assert len(rows(in_time)) == (12 if every_n_steps == 1 else 5)
    assert rows(late) == rows(in_time)
    of_loss = [at for at, (_, row) in enumerate(late.rows) if "loss" in row]
    of_monitor = [at for at, (_, row) in enumerate(late.rows) if KEY in row]
    if asked_for == 1000:
        assert min(of_monitor) > max(of_loss), "they came at the end, when they were waited for"


def test_an_exception_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Failing):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4:
                raise ZeroDivisionError("planted")
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr("lightning_adam.monitor.Arriving", Late)
    monkeypatch.setattr(Late, "asked_for", 1000)
    kept = MemoryLogger()
    monkeypatch.setattr("tests.test_skipped_steps.MemoryLogger", lambda: kept)
    with pytest.raises(ZeroDivisionError, match="planted"):
        fit(Breaking("for-loop"), AdamMonitor(1), precision="32-true")
    assert kept.steps_of(KEY) == [0, 1, 2, 3]


@pytest.mark.parametrize("every_n_steps", [1, 2, 3])
@pytest.mark.parametrize("asked_for", [1, 2, 1000])
def test_steps_that_the_device_skipped_are_known_as_late_as_the_rest(
    every_n_steps: int, asked_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's step, and what was skipped before it, are right however late it comes.

    Until the first flag arrives the monitor takes skipped steps for steps, so that it may measure
    one that turns out not to be due: such a row is left out, and the next ones are due again.
    """
    monkeypatch.setattr("lightning_adam.monitor.Arriving", Late)
    monkeypatch.setattr(Late, "asked_for", asked_for)
    statistics = ["lr", "step", "skipped_steps", "grad_norm"]
    monitor = AdamMonitor(every_n_steps, statistics=statistics)
    found = counts_of(fit(Failing("fused", COSINE, BAD), monitor))
    expected = counts(BAD, every_n_steps)
    assert set(found) <= set(expected)
    if every_n_steps == 1:
        assert found == expected


def test_what_is_on_the_host_has_arrived() -> None:
    statistics = AdamStatistics()
    statistics.update(stepped([torch.nn.Parameter(torch.randn(3))], decoupled=True))
    arriving = Arriving(statistics.measurement, [torch.tensor(2.0)])
    assert arriving.has_arrived()
    assert arriving.measurement().values() == statistics.compute()
    assert arriving.others() == [2.0]
