"""Runs of TensorBoardLogger: the same numbers as the other loggers, also in cut files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from lightning_adam._compat import tensorboard
from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Scope
from lightning_adam.reports.runs import Run, read_runs
from tests.reports.logged_training import log_training
from tests.reports.run_files import KEY, comparable, only, to_dict
from tests.support.tables import each_row

STEPS = (0, 1, 42, 127, 128, 300, 5418, 2**31, 2**40, 7, 0)
"""Of one and of several bytes, one that looks like the byte before a summary, and out of order."""
VALUES = (0.5, math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, 1.0, 2.0, 3.0)


class LoggedTwice(NamedTuple):
    csv: Run
    tensorboard: Run
    events: Any
    """Returns the numbers in TensorBoard's reader."""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> LoggedTwice:
    folder = tmp_path_factory.mktemp("logged")
    loggers = [CSVLogger(folder, version="csv"), TensorBoardLogger(folder, version="events")]
    settings = {"histograms_every_n_steps": 2, "worst": {"update_norm": 2}}
    log_training(folder, loggers, 12, {}, scopes=[*Scope], **settings)
    csv, events = read_runs([folder])
    return LoggedTwice(csv, events, read_by_tensorboard(events.path))


def read_by_tensorboard(folder: Path) -> Any:
    return EventAccumulator(str(folder), {"scalars": 0, "histograms": 0}).Reload()


def write(
    folder: Path, rows: Mapping[int, Mapping[str, float]], version: str = "a", **more: Any
) -> Path:
    """Writes an event file with Lightning's logger, and returns it."""
    logger = TensorBoardLogger(folder, version=version, default_hp_metric=False, **more)
    for step, row in rows.items():
        logger.log_metrics(dict(row), step)
    logger.finalize("success")
    return max(Path(logger.log_dir).glob("events.*"))


# ---- The same run as from other loggers


def test_run_equals_the_run_of_the_csv_logger(logged: LoggedTwice) -> None:
    csv, run = logged.csv, logged.tensorboard
    assert (csv.source, run.source) == ("CSVLogger", "TensorBoard")
    assert run.name == "lightning_logs/events"
    assert run.series.keys() == csv.series.keys()
    with each_row() as row:
        for key, expected in csv.series.items():
            with row(key):
                found = run.series[key]
                assert np.array_equal(found.steps, expected.steps)
                in_float32 = expected.values.astype(np.float32)
                assert np.array_equal(found.values, in_float32, equal_nan=True)
    assert run.config == csv.config
    assert run.config["lightning_adam"]["optimizer"]["class"] == "AdamW"
    assert run.tensors == csv.tensors != {}
    assert run.findings == csv.findings != []
    assert run.measurements == csv.measurements == 12
    assert run.has_ended
    assert csv.has_ended
    assert run.notes == csv.notes == []


def test_histograms_are_those_of_tensorboards_own_reader(logged: LoggedTwice) -> None:
    assert logged.tensorboard.histograms.keys() == set(logged.events.Tags()["histograms"])
    for key, by_step in logged.tensorboard.histograms.items():
        for event in logged.events.Histograms(key):
            counts, edges = by_step.pop(event.step)
            assert counts == event.histogram_value.bucket
            assert edges[1:] == event.histogram_value.bucket_limit
            assert np.array_equal(np.diff(edges), np.ones(64))
        assert by_step == {}


def test_times_are_those_of_the_events(logged: LoggedTwice) -> None:
    times = logged.tensorboard.times
    assert times is not None
    assert times.steps.tolist() == [*range(12)]
    assert (np.diff(times.values) >= 0).all()
    stamps = [event.wall_time for event in logged.events.Scalars(KEY)]
    assert times.values == pytest.approx(stamps, abs=5)
    assert logged.csv.times is None
    for run in (logged.csv, logged.tensorboard):
        assert run.seconds is not None
        assert 0 < run.seconds < 300


def test_any_step_and_value_is_read_as_by_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    for step, value in zip(STEPS, VALUES, strict=True):
        logger.log_metrics({KEY: value, "epoch": 1.0, "späte/Verluste 😀": step / 3}, step)
    logger.finalize("success")
    run = only(tmp_path)
    expected: dict[str, dict[int, float | str]] = {}
    for key in (KEY, "späte/Verluste 😀"):
        for event in read_by_tensorboard(run.path).Scalars(key):
            expected.setdefault(key, {})[event.step] = comparable(event.value)
    assert to_dict(run) == expected
    assert expected[KEY][0] == 3.0, "the later row counts"
    assert run.config == {"lr": 0.1}


def test_foreign_texts_histograms_and_charts_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, {0: {"loss": 1.0}, 1: {"curves": {"a": 1.0, "b": 2.0}}})  # type: ignore[dict-item]
    assert [*file.parent.rglob("curves_a/events.*")]
    logger = TensorBoardLogger(tmp_path, version="a", default_hp_metric=False)
    logger.experiment.add_text("adam_notes_tensor", "text", 0)
    logger.experiment.add_histogram("weights", np.arange(9.0), 0)
    logger.finalize("success")
    run = only(tmp_path)
    assert to_dict(run) == {"loss": {0: 1.0}}
    assert (run.histograms, run.tensors, run.notes) == ({}, {}, [])
    assert not run.is_monitored


# ---- Several files of one run


def test_files_of_a_folder_are_one_run_in_which_the_later_row_counts(tmp_path: Path) -> None:
    write(tmp_path, {step: {KEY: 1.0, "first": 1.0} for step in range(6)})
    write(tmp_path, {step: {KEY: 2.0} for step in range(4, 8)})
    run = only(tmp_path)
    assert to_dict(run) == {
        KEY: {step: 1.0 if step < 4 else 2.0 for step in range(8)},
        "first": dict.fromkeys(range(6), 1.0),
    }
    assert run.measurements == 8


def test_two_loggers_in_one_folder_are_one_run(tmp_path: Path) -> None:
    rows = {0: {KEY: 0.1}, 1: {KEY: 0.2}}
    file = write(tmp_path, rows)
    csv = CSVLogger(tmp_path, version="a")
    for step, row in rows.items():
        csv.log_metrics({**row}, step)
    csv.save()
    assert Path(csv.log_dir) == file.parent
    run = only(tmp_path)
    assert to_dict(run) == {KEY: {0: 0.1, 1: 0.2}}
    assert (run.source, run.measurements, run.notes) == ("TensorBoard", 2, [])
    assert run.times is not None


# ---- Cut and damaged files

ROWS = {step: {KEY: float(step), "loss": -float(step)} for step in range(6)}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("intact"), ROWS).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events")


def read(folder: Path, content: bytes) -> Run:
    (folder / "events.out.tfevents.1.host").write_bytes(content)
    return only(folder)


def test_file_that_is_cut_anywhere_is_read_up_to_its_last_complete_event(
    intact: bytes, folder: Path
) -> None:
    rows = [(step, key, value) for step, row in ROWS.items() for key, value in row.items()]
    complete = set()
    for length in range(len(intact)):
        run = read(folder, intact[:length])
        found = to_dict(run)
        number = sum(map(len, found.values()))
        assert {(step, key, found[key][step]) for step, key, _ in rows[:number]} == {*rows[:number]}
        assert run.has_ended is (run.notes == [])
        complete.add(number)
        if not run.has_ended:
            (note,) = run.notes
            assert "is still running, or was interrupted: " in note
    assert complete == {*range(len(rows))}


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10_000), replacement=st.binary(min_size=1, max_size=9))
@example(place=0, replacement=b"\xff" * 8)
@example(place=60, replacement=b"\0" * 9)
def test_overwritten_bytes_leave_the_events_before_them(
    place: int, replacement: bytes, intact: bytes, folder: Path
) -> None:
    place %= len(intact)
    before = to_dict(read(folder, intact[:place]))
    content = intact[:place] + replacement + intact[place + len(replacement) :]
    found = to_dict(read(folder, content[: len(intact)]))
    for key, values in before.items():
        assert values.keys() <= found[key].keys()
        # The damaged event may have got the step of another.
        assert sum(found[key][step] != value for step, value in values.items()) <= 1


def test_damaged_event_is_noted_and_the_others_are_read(intact: bytes, folder: Path) -> None:
    at = intact.index(KEY.encode())
    # Not UTF-8.
    run = read(folder, intact[:at] + b"\xff" + intact[at + 1 :])
    assert to_dict(run) == {
        KEY: {step: float(step) for step in range(1, 6)},
        "loss": {step: -float(step) for step in range(6)},
    }
    assert run.notes == [f"{run.name}: events.out.tfevents.1.host is damaged; the rest is shown."]


def test_missing_package_is_named(
    intact: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "MODULES", ("nowhere.event_pb2",))
    with pytest.raises(ConfigError, match=r"Run pip install tensorboard$"):
        read(folder, intact)
