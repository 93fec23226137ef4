"""A user's own app, outside the repository, is tuned by one command."""

import os
import re
import shlex
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.story import Outcome
from tests.support import forkserver
from tests.support.commands import Finished, run
from tests.support.tuning_app import (
    BEST_LR,
    MINIMIZE,
    TUNE,
    trained_settings,
    variables,
    write_app,
)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_app(tmp_path / "my app")


def tune(folder: Path, *words: str) -> Finished:
    return run([*TUNE, *words], folder, variables(folder))


def start(folder: Path, *words: str, seconds: float) -> ForkServerProcess:
    """Starts a search whose trials take so many seconds; its output is in output.txt."""
    own = variables(folder, SECONDS=str(seconds))
    return forkserver.start("train.py", [*TUNE[2:], *words], folder, own, folder / "output.txt")


def wait_for_trials(search: ForkServerProcess, folder: Path, count: int) -> None:
    while not (folder / "trained.txt").exists() or len(trained_settings(folder)) < count:
        assert search.is_alive(), (folder / "output.txt").read_text()
        time.sleep(0.02)


def change_app(folder: Path, before: str, after: str) -> None:
    program = (folder / "train.py").read_text()
    assert before in program
    (folder / "train.py").write_text(program.replace(before, after))


def records(storage: str) -> list[Record]:
    archive = Archive(storage, "train", "minimize")
    return [each for stage in ("start", "lr", "beta1") for each in archive.records(stage)]


def journal(folder: Path) -> str:
    return f"journal:{folder / 'multirun/adam_tune_train/trials.journal'}"


def test_one_command_tunes_an_app_and_its_last_line_can_be_typed(app: Path) -> None:
    tuned = tune(app, MINIMIZE, "hydra.sweeper.n_trials=12", "hydra.sweeper.n_seeds=1")
    assert tuned.returncode == 0, tuned.output
    assert len(trained_settings(app)) == 12
    folder = app / "multirun/adam_tune_train"
    line = (folder / "tune.md").read_text().splitlines()[-1]
    assert tuned.after("type: ") == line
    words = shlex.split(line)
    lr = float(words[0].removeprefix("optimizer.lr="))
    assert abs(lr / BEST_LR - 1) < 0.1
    assert (folder / "tune.html").stat().st_size > 1000
    again = run(["python", "train.py", *words], app, variables(app))
    assert again.returncode == 0, again.output
    assert trained_settings(app)[-1] in trained_settings(app)[:-1]


def test_search_without_a_direction_fails_before_the_first_trial(app: Path) -> None:
    tuned = tune(app)
    assert tuned.returncode == 1, tuned.output
    assert "Traceback" not in tuned.output
    assert "hydra.sweeper.direction=minimize or hydra.sweeper.direction=maximize" in tuned.output
    assert not (app / "trained.txt").exists()


@pytest.mark.slow
def test_app_that_returns_nothing_fails_at_its_first_trial(app: Path) -> None:
    change_app(app, "return (math", "(math")
    tuned = tune(app, MINIMIZE)
    assert tuned.returncode == 1
    assert "The app returned None, not the validation metric as a number" in tuned.output
    assert len(trained_settings(app)) == 1


@pytest.mark.slow
def test_search_in_which_every_trial_diverges_fails_and_names_its_report(app: Path) -> None:
    change_app(app, "return (math", "return math.nan; (math")
    tuned = tune(app, MINIMIZE, "hydra.sweeper.n_trials=3")
    assert tuned.returncode == 1
    assert "None of 2 trials returned a finite metric" in tuned.output
    assert "type: " not in tuned.output
    report = app / "multirun/adam_tune_train/tune.md"
    assert str(report.relative_to(app)) in tuned.output
    assert "diverged: the metric is nan" in report.read_text()


@pytest.mark.slow
def test_search_uses_the_groups_stages_settings_and_folder_of_the_app(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app", "@model.net.optimizer", "model.net.optimizer")
    stages = app / "conf/lightning_adam/tune"
    stages.mkdir(parents=True)
    (stages / "mine.yaml").write_text("betas: {space: {beta1: [0.5, 0.8]}}\n")
    words = ["lightning_adam/tune@hydra.sweeper.stages=mine", "hydra.sweeper.n_seeds=1"]
    words += ["model.net.optimizer.lr=1e-5", "model.net.optimizer.betas=[0.95,0.99]"]
    tuned = tune(app, MINIMIZE, *words, "hydra.sweep.dir=found here")
    line = tuned.after("type: ")
    assert line.startswith("model.net.optimizer.lr=1e-5 ")
    assert line.endswith(" 'model.net.optimizer.betas=[0.8,0.99]'")
    assert trained_settings(app) == ["1e-05 [0.95, 0.99]", "1e-05 [0.5, 0.99]", "1e-05 [0.8, 0.99]"]
    assert (app / "found here/tune.md").is_file()
    assert not (app / "multirun").exists()


@pytest.mark.slow
def test_search_that_is_over_is_kept_and_other_settings_need_another_name(app: Path) -> None:
    n_trials = "hydra.sweeper.n_trials=9"
    tune(app, MINIMIZE, n_trials)
    trained = trained_settings(app)
    over = tune(app, MINIMIZE, n_trials)
    assert over.after("type: ").startswith("optimizer.lr=")
    other = tune(app, MINIMIZE, n_trials, "optimizer.eps=1e-6")
    assert other.returncode == 1
    assert "optimizer.eps was 1e-08, now 1e-06" in other.output
    assert "hydra.sweeper.study_name=train_2" in other.output
    assert trained_settings(app) == trained


@pytest.mark.slow
def test_interrupted_search_says_how_to_continue(app: Path) -> None:
    search = start(app, MINIMIZE, "hydra.sweeper.n_trials=6", seconds=0.5)
    wait_for_trials(search, app, 2)
    assert search.pid is not None
    os.kill(search.pid, signal.SIGINT)
    search.join()
    output = (app / "output.txt").read_text()
    assert search.exitcode == 1
    assert "adam_tune: interrupted; the same command goes on" in output
    assert "Traceback" not in output
    assert tune(app, MINIMIZE, "hydra.sweeper.n_trials=6").returncode == 0
    assert len(trained_settings(app)) <= 7


@pytest.mark.slow
def test_search_killed_within_and_between_trials_continues(app: Path) -> None:
    """No trial is lost, and none is run twice but those that were in flight."""
    n_trials = "hydra.sweeper.n_trials=8"
    kills = [(2, 0.1), (5, 0.42)]
    for begun, seconds_later in kills:
        search = start(app, MINIMIZE, n_trials, seconds=0.4)
        wait_for_trials(search, app, begun)
        time.sleep(seconds_later)
        search.kill()
        search.join()
    tuned = tune(app, MINIMIZE, n_trials)
    assert tuned.returncode == 0, tuned.output
    found = records(journal(app))
    lost = [each for each in found if each.is_lost]
    over = [each for each in found if not each.is_lost]
    assert len(lost) <= len(kills)
    seeded = [(each.trial.point, each.turn) for each in over]
    assert len(seeded) == len(set(seeded))
    assert {(each.trial.point, each.turn) for each in lost} <= set(seeded)
    assert len(trained_settings(app)) <= len(found)
    assert all(each.trial.outcome is Outcome.complete for each in over)
    uninterrupted = write_app(app.parent / "uninterrupted")
    tune(uninterrupted, MINIMIZE, n_trials)
    points = [each.trial.point for each in records(journal(uninterrupted))]
    assert points == [each.trial.point for each in over]


@pytest.mark.nightly
def test_two_processes_share_a_search_through_a_database(app: Path) -> None:
    storage = f"sqlite:///{app / 'tune.db'}"
    folders = [write_app(app.parent / f"machine {number}") for number in range(2)]
    words = [MINIMIZE, "hydra.sweeper.n_trials=14", f"hydra.sweeper.storage='{storage}'"]
    searches = [start(folder, *words, seconds=0.2) for folder in folders]
    for search in searches:
        search.join()
    outputs = [(folder / "output.txt").read_text() for folder in folders]
    assert [search.exitcode for search in searches] == [0, 0], outputs
    lines = [re.findall(r"^type: .*", output, re.MULTILINE) for output in outputs]
    assert lines[0] == lines[1] != []
    found = records(storage)
    assert len({(each.trial.point, each.turn) for each in found}) == len(found) <= 14
    assert len({each.owner for each in found}) == 2
    assert sum(len(trained_settings(folder)) for folder in folders) == len(found)
