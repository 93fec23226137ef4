"""The archive of trials: in a file and in a database, written by one process and by several."""

import math
import multiprocessing
import re
from pathlib import Path

import pytest

from lightning_adam.config.errors import ConfigError
from lightning_adam.tune.archive import Archive, open_storage
from lightning_adam.tune.story import Outcome
from tests.tune.searching import DEFAULT

PLACES = ["journal:trials.journal", "sqlite:///trials.db"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(place: str, direction: str = "minimize") -> Archive:
    return Archive(place, "search", direction)


def begun(archive: Archive, turn: int = 0) -> int:
    return archive.begin("lr", DEFAULT, turn, 7, {"lr": 1e-3}, {}, "host/1/a", 1)


def test_trial_is_read_by_another_process(place: str) -> None:
    archive = opened(place)
    number = begun(archive)
    archive.note("lr", number, job="host/2/b", folder="here", precision="bf16-true")
    (record,) = opened(place).records("lr")
    assert not record.is_over
    assert (record.owner, record.job, record.attempt, record.turn) == ("host/1/a", "host/2/b", 1, 0)
    archive.note("lr", number, findings=["updates_lost"])
    archive.finish("lr", number, 0.25, seconds=3.0)
    (record,) = opened(place).records("lr")
    trial = record.trial
    assert record.is_good
    assert trial.outcome is Outcome.complete
    assert (trial.point, trial.seed, trial.value, trial.seconds) == (DEFAULT, 7, 0.25, 3.0)
    assert (trial.folder, trial.findings, record.precision) == (
        "here",
        ("updates_lost",),
        "bf16-true",
    )
    assert opened(place).records("beta1") == []


def test_metric_that_is_not_finite_is_a_failure() -> None:
    archive = opened(PLACES[0])
    for value in (math.nan, math.inf, -math.inf):
        archive.finish("lr", begun(archive), value, seconds=3.0)
        trial = archive.records("lr")[-1].trial
        assert trial.outcome is Outcome.failed
        assert trial.error == f"diverged: the metric is {value}"
        assert trial.seconds == 3.0


def test_finished_trial_does_not_change(place: str) -> None:
    archive = opened(place)
    number = begun(archive)
    archive.finish("lr", number, 0.25)
    archive.finish("lr", number, 9.0)
    archive.fail("lr", number, "too late")
    archive.lose("lr", number)
    assert not archive.note_if_running("lr", number, job="host/3/c")
    (record,) = archive.records("lr")
    assert (record.trial.outcome, record.trial.value, record.trial.error) == (
        Outcome.complete,
        0.25,
        "",
    )
    assert record.job == ""


def test_lost_trial_is_kept_and_withdrawn_trial_is_not(place: str) -> None:
    archive = opened(place)
    lost, withdrawn = begun(archive), begun(archive)
    archive.lose("lr", lost)
    archive.withdraw("lr", withdrawn)
    (record,) = archive.records("lr")
    assert (record.trial.number, record.is_lost, record.is_good) == (lost, True, False)


def test_pruned_trial_keeps_its_last_metric_and_is_no_result() -> None:
    archive = opened(PLACES[0])
    number = begun(archive)
    archive.note("lr", number, stopped_at=40)
    archive.finish("lr", number, 2.5)
    (record,) = archive.records("lr")
    assert (record.trial.outcome, record.trial.value) == (Outcome.stopped, 2.5)
    assert record.is_over
    assert not record.is_good


def test_trial_in_the_worst_quarter_at_its_step_is_pruned() -> None:
    for direction, sign in (("minimize", 1), ("maximize", -1)):
        archive = Archive(PLACES[0], direction, direction)
        for value in (0.1, 0.2, 0.3, 0.4):
            number = begun(archive)
            # There is nothing to compare with yet.
            assert not archive.should_stop("lr", number, 10, sign * value)
            archive.finish("lr", number, sign * value)
        bad, middling, good, early = (begun(archive) for _ in range(4))
        assert archive.should_stop("lr", bad, 10, sign * 0.9)
        assert not archive.should_stop("lr", middling, 10, sign * 0.3)
        assert not archive.should_stop("lr", good, 10, sign * 0.15)
        # The others have no metric at this step.
        assert not archive.should_stop("lr", early, 5, sign * 0.9)


def test_search_with_other_settings_under_the_same_name_raises(place: str) -> None:
    identity = {"model.width": "8", "optimizer.eps": "1e-8"}
    assert not opened(place).claim(identity, "multirun/a")
    assert opened(place).claim(identity, "multirun/a")
    with pytest.raises(ConfigError) as raised:
        opened(place).claim({"model.width": "9", "optimizer.eps": "1e-8", "new": "1"}, "multirun/a")
    sentence = str(raised.value)
    assert "model.width was 8, now 9" in sentence
    assert "new was None, now 1" in sentence
    assert "optimizer.eps" not in sentence
    assert sentence.endswith("start another search with hydra.sweeper.study_name=search_2")


def test_searches_in_one_storage_are_separate(place: str) -> None:
    one, other = Archive(place, "one", "minimize"), Archive(place, "other", "maximize")
    begun(one)
    assert other.records("lr") == []


def test_heartbeats_are_seen_by_other_processes(place: str) -> None:
    archive = opened(place)
    archive.beat("host/1/a", 0)
    archive.beat("host/1/a", 3)
    archive.beat("host/2/b", 1)
    assert opened(place).beats() == {"host/1/a": 3, "host/2/b": 1}


def write_many(place: str, count: int) -> None:
    archive = opened(place)
    for turn in range(count):
        archive.finish("lr", begun(archive, turn), float(turn))


@pytest.mark.slow
def test_processes_that_write_at_the_same_time_lose_nothing(place: str, tmp_path: Path) -> None:
    """Also if all of them open it for the first time at the same moment."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(place, 6)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    found = opened(place).records("lr")
    assert [each.trial.number for each in found] == list(range(18))
    assert all(each.trial.value == each.turn for each in found)


def test_invalid_storage_raises() -> None:
    for place in ("nonsense", "postgresql://localhost:1/tune"):
        beginning = f"hydra.sweeper.storage={place} cannot be reached: "
        with pytest.raises(ConfigError, match=re.escape(beginning)):
            open_storage(place)


def test_missing_journal_is_not_created_when_it_must_exist() -> None:
    with pytest.raises(FileNotFoundError):
        open_storage("journal:missing.journal", must_exist=True)
    assert not Path("missing.journal").exists()
