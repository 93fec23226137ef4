"""Files of the flight recorder: read from a run and shown in the report."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_adam import AdamMonitor
from lightning_adam.reports.report import page
from lightning_adam.reports.runs import Event, Run, read_runs
from lightning_adam.statistics.catalogue import STATISTICS
from tests.reports.parsed_report import ParsedReport, report_of, unpack
from tests.reports.run_files import KEY, LAYER_KEY, run_of, wait_for_end
from tests.support.exploding import Exploding, files_of, numbers, read, recorded
from tests.support.monitored import TwoOptimizers
from tests.support.tables import each_row
from tests.support.training import loader, trainer

AT = 12


def run_with_events(logger: Any, at: int = AT) -> Path:
    """Returns the folder of a run with events."""
    monitor = AdamMonitor(5, flight_recorder=8)
    fit = trainer(max_epochs=1, logger=logger, callbacks=[monitor])
    fit.fit(Exploding(at, "inf in a weight"), loader(at + 3))
    if isinstance(logger, CSVLogger):
        logger.save()
        return Path(logger.log_dir)
    folder = Path(logger.experiment.dir).parent
    wandb.finish()
    (file,) = folder.glob("*.wandb")
    wait_for_end(file)
    return folder


def assert_read(event: Event, file: Path) -> None:
    """Asserts that the event has exactly the values of the file."""
    expected: dict[str, dict[int, float]] = {}
    for row in read(file):
        for key, value in numbers(row).items():
            expected.setdefault(key, {})[int(row["trainer/global_step"])] = value
    found = {
        key: dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        for key, series in event.series.items()
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("kind", ["csv", "wandb"])
def test_event_is_read_from_the_folder_of_its_run(kind: str, tmp_path: Path) -> None:
    is_wandb = kind == "wandb"
    logger = WandbLogger(offline=True, save_dir=tmp_path) if is_wandb else CSVLogger(tmp_path)
    folder = run_with_events(logger)
    (run,) = read_runs([folder])
    (event,) = run.events
    assert (event.step, event.reason, str(event)) == (AT, "not_finite", "not_finite at step 12")
    (file,) = files_of(folder / "files" if is_wandb else folder)
    assert_read(event, file)
    assert run.notes == []
    data = maps_of(report_of(run))
    shown = data[0]
    assert shown["event"] == "not_finite at step 12"
    assert shown["layers"] == ["net.0", "net.1", "net.3"]
    assert {each["statistic"] for each in data} == {
        name
        for name, each in STATISTICS.items()
        if any(each.key_of(f"layer/{layer}/") in event.series for layer in shown["layers"])
    }
    update_norm = next(each for each in data if each["statistic"] == "update_norm")
    values = unpack(update_norm["values"]).reshape(3, -1)
    series = event.series["adam_update/layer/net.1/update_norm"]
    assert np.array_equal(unpack(update_norm["steps"]), series.steps)
    assert np.array_equal(values[1], series.values.astype(values.dtype))


def maps_of(found: ParsedReport) -> list[dict[str, Any]]:
    return list(found.charts["events"]["maps"])


def test_layers_of_several_optimizers_are_distinguished() -> None:
    class Breaking(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                raise ZeroDivisionError
            super().training_step(batch, batch_idx)

    with pytest.raises(ZeroDivisionError):
        recorded(Breaking(torch.optim.Adam), batches=5)
    (folder,) = Path("recorded").iterdir()
    (folder / "metrics.csv").write_text("step,loss\n0,1.0\n", encoding="utf-8")
    (run,) = read_runs([folder])
    assert run.is_monitored, "there may have been nothing to log yet"
    shown = maps_of(report_of(run))[0]
    assert shown["layers"] == [
        *(f"first: first.{place}" for place in (0, 1, 3)),
        *(f"second: second.{place}" for place in (0, 1, 3)),
    ]


def test_each_event_of_each_run_has_its_maps() -> None:
    def run(name: str, steps: list[int]) -> Run:
        plain = run_of({KEY: {0: 1.0}}, name)
        for step in steps:
            series = run_of({LAYER_KEY.format("net"): {step - 2: 1.0, step - 1: 2.0 * step}}).series
            plain.events.append(Event(step, "loss_spike", series))
        return plain

    maps = maps_of(report_of(run("a", [100, 2000]), run("b", []), run("c", [100])))
    assert [(each["run"], each["event"]) for each in maps] == [
        (0, "loss_spike at step 100"),
        (0, "loss_spike at step 2,000"),
        (2, "loss_spike at step 100"),
    ]
    assert [unpack(each["values"])[-1] for each in maps] == [200.0, 4000.0, 200.0]


UNREADABLE = (
    ("step_12_not_finite.csv", "trainer/global_step,layer,grad_norm\n1,net,what\n"),
    ("step_12_not_finite.csv", "layer,grad_norm\nnet,1.0\n"),
    ("step_many_not_finite.csv", ""),
    ("step_1.csv", ""),
)
"""Names and contents of invalid files."""


def test_file_that_cannot_be_read_is_noted(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n", encoding="utf-8")
    folder = tmp_path / "adam_flight_recorder"
    with each_row() as row:
        for name, content in UNREADABLE:
            with row((name, content)):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                (folder / name).write_text(content, encoding="utf-8")
                (run,) = read_runs([tmp_path])
                note = f"{run.name}: the flight recorder's {name} could not be read."
                assert run.notes == [note]
                assert page([run])


def test_resumed_run_has_the_events_of_all_parts(tmp_path: Path) -> None:
    same: Any = {"id": "abc", "resume": "allow", "offline": True}
    for part, at in (("first", 12), ("second", 6)):
        (tmp_path / part).mkdir()
        run_with_events(WandbLogger(save_dir=tmp_path / part, **same), at)
    (run,) = read_runs([tmp_path])
    assert [event.step for event in run.events] == [6, 12]
