"""A user's own app, outside the repository, is tuned by one command."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.story import Outcome
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


def refused(folder: Path, *words: str) -> str:
    tuned = tune(folder, *words)
    assert tuned.returncode == 1, tuned.output
    assert "Traceback" not in tuned.output
    assert not (folder / "trained.txt").exists()
    return tuned.output


def test_one_command_tunes_an_app_and_its_last_line_is_typed_back(app: Path) -> None:
    tuned = tune(app, "hydra.sweeper.n_trials=20", MINIMIZE)
    assert tuned.returncode == 0, tuned.output
    assert len(trained_settings(app)) == 20
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


@pytest.mark.slow
def test_groups_that_are_relocated_are_found(tmp_path: Path) -> None:
    folder = write_app(tmp_path / "app", "@model.net.optimizer", "model.net.optimizer")
    tuned = tune(folder, "hydra.sweeper.n_trials=6", MINIMIZE)
    assert tuned.returncode == 0, tuned.output
    assert tuned.after("type: ").startswith("model.net.optimizer.lr=")


@pytest.mark.slow
def test_what_is_typed_for_the_app_is_where_the_search_begins(app: Path) -> None:
    words = ["optimizer.lr=1e-5", "optimizer.betas=[0.95,0.99]", "hydra.sweeper.n_trials=5"]
    tuned = tune(app, *words, MINIMIZE, "hydra.sweeper.n_seeds=1")
    assert trained_settings(app)[0] == "1e-05 [0.95, 0.99]"
    assert all(line.endswith("[0.95, 0.99]") for line in trained_settings(app))
    assert tuned.after("type: ").startswith("optimizer.lr=1e-5 'optimizer.betas=[0.95,0.99]' ")


REFUSED = [
    ([], ["hydra.sweeper.direction=minimize or hydra.sweeper.direction=maximize"]),
    (["hydra.sweeper.direction=down"], ["minimize", "maximize"]),
    ([MINIMIZE, "hydra.sweeper.n_trails=9"], ["n_trails", "TuneConf"]),
    ([MINIMIZE, "hydra.sweeper.stages.lr.shear=2"], ["shear", "StageConfig"]),
    ([MINIMIZE, "hydra.sweeper.n_trials=0"], ["hydra.sweeper.n_trials=40"]),
    ([MINIMIZE, "optimizer.lrr=1e-3"], ["lrr"]),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_cannot_work_is_refused_before_a_trial(
    words: list[str], said: list[str], app: Path
) -> None:
    output = refused(app, *words)
    assert [each for each in said if each not in output] == []


@pytest.mark.slow
def test_a_search_in_which_nothing_ended_well_fails_and_says_where_it_stands(app: Path) -> None:
    program = (app / "train.py").read_text()
    (app / "train.py").write_text(program.replace("return (math", "return math.nan; (math"))
    tuned = tune(app, MINIMIZE, "hydra.sweeper.n_trials=3")
    assert tuned.returncode == 1
    assert "none of 2 trials has ended with a finite metric" in tuned.output
    assert "type: " not in tuned.output
    told = app / "multirun/adam_tune_train/tune.md"
    assert str(told.relative_to(app)) in tuned.output
    assert "diverged: the metric is nan" in told.read_text()


@pytest.mark.slow
def test_an_interrupted_search_says_that_the_same_command_goes_on(app: Path) -> None:
    words = [sys.executable, *TUNE[1:], MINIMIZE, "hydra.sweeper.n_trials=6"]
    search = subprocess.Popen(
        words,
        cwd=app,
        env=variables(app, SECONDS="0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (app / "trained.txt").exists() or len(trained_settings(app)) < 2:
        assert search.poll() is None
        time.sleep(0.02)
    search.send_signal(signal.SIGINT)
    output = search.communicate()[0]
    assert search.returncode == 1
    assert "adam_tune: interrupted; the same command goes on" in output
    assert "Traceback" not in output
    assert tune(app, MINIMIZE, "hydra.sweeper.n_trials=6").returncode == 0
    assert len(trained_settings(app)) <= 7


def test_an_app_that_returns_nothing_is_told_so_at_its_first_trial(app: Path) -> None:
    program = (app / "train.py").read_text()
    (app / "train.py").write_text(program.replace("return (math", "(math"))
    tuned = tune(app, MINIMIZE)
    assert tuned.returncode == 1
    assert "the app returned None: expected the validation metric as a number" in tuned.output
    assert len(trained_settings(app)) == 1


@pytest.mark.slow
def test_another_search_under_the_same_name_is_refused(app: Path) -> None:
    tune(app, MINIMIZE, "hydra.sweeper.n_trials=2")
    tuned = tune(app, MINIMIZE, "hydra.sweeper.n_trials=2", "optimizer.eps=1e-6")
    assert tuned.returncode == 1
    assert "optimizer.eps was 1e-08, now 1e-06" in tuned.output
    assert "hydra.sweeper.study_name=train_2" in tuned.output
    assert len(trained_settings(app)) == 2


@pytest.mark.slow
def test_a_larger_budget_goes_on_and_a_search_that_is_over_only_tells(app: Path) -> None:
    tune(app, MINIMIZE, "hydra.sweeper.n_trials=4")
    few = trained_settings(app)
    assert len(few) <= 4
    tune(app, MINIMIZE, "hydra.sweeper.n_trials=9")
    more = trained_settings(app)
    assert more[: len(few)] == few
    assert len(few) < len(more) <= 9
    tuned = tune(app, MINIMIZE, "hydra.sweeper.n_trials=9")
    assert trained_settings(app) == more
    assert tuned.after("type: ").startswith("optimizer.lr=")


@pytest.mark.slow
def test_stages_of_ones_own_are_a_file_beside_the_apps_configs(app: Path) -> None:
    stages = app / "conf/lightning_adam/tune"
    stages.mkdir(parents=True)
    (stages / "mine.yaml").write_text("betas: {space: {beta1: [0.5, 0.8]}}\n")
    words = ["lightning_adam/tune@hydra.sweeper.stages=mine", "hydra.sweeper.n_seeds=1"]
    tuned = tune(app, MINIMIZE, *words)
    assert tuned.after("type: ") == "'optimizer.betas=[0.8,0.999]'"
    assert len(trained_settings(app)) == 3


@pytest.mark.slow
def test_the_sweep_folder_that_is_typed_is_taken(app: Path) -> None:
    tune(app, MINIMIZE, "hydra.sweeper.n_trials=2", "hydra.sweep.dir=found here")
    assert (app / "found here/tune.md").is_file()
    assert not (app / "multirun").exists()


def records(folder: Path) -> list[Record]:
    journal = folder / "multirun/adam_tune_train/trials.journal"
    archive = Archive(f"journal:{journal}", "train", "minimize")
    return [each for stage in ("start", "lr", "beta1") for each in archive.records(stage)]


@pytest.mark.slow
def test_a_search_that_is_killed_between_and_within_trials_goes_on(app: Path) -> None:
    """No trial is lost, and none is run twice but those that were in flight."""
    words = [sys.executable, *TUNE[1:], MINIMIZE, "hydra.sweeper.n_trials=12"]
    kills = 0
    for seen in (2, 5, 8):
        search = subprocess.Popen(
            words,
            cwd=app,
            env=variables(app, SECONDS="0.4"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (app / "trained.txt").exists() or len(trained_settings(app)) < seen:
            assert search.poll() is None
            time.sleep(0.02)
        # The second time after the trial has ended, between it and the next.
        time.sleep(0.42 if seen == 5 else 0.1)
        os.kill(search.pid, signal.SIGKILL)
        search.wait()
        kills += 1
    tuned = tune(app, MINIMIZE, "hydra.sweeper.n_trials=12")
    assert tuned.returncode == 0, tuned.output
    found = records(app)
    lost = [each for each in found if each.is_lost]
    assert len(lost) <= kills
    over = [(each.trial.point, each.turn) for each in found if not each.is_lost]
    assert len(over) == len(set(over))
    assert {(each.trial.point, each.turn) for each in lost} <= set(over)
    assert len(trained_settings(app)) <= len(found)
    assert all(each.trial.outcome is Outcome.complete for each in found if not each.is_lost)
    uncut = write_app(app.parent / "uncut")
    tune(uncut, MINIMIZE, "hydra.sweeper.n_trials=12")
    assert [each.trial.point for each in records(uncut)] == [
        each.trial.point for each in found if not each.is_lost
    ]


@pytest.mark.slow
def test_two_processes_share_a_search_through_a_database(app: Path) -> None:
    words = [sys.executable, *TUNE[1:], MINIMIZE, "hydra.sweeper.n_trials=14"]
    words += ["hydra.sweeper.storage=sqlite:///tune.db"]
    searches = [
        subprocess.Popen(
            [*words, f"hydra.sweep.dir=machine_{number}"],
            cwd=app,
            env=variables(app, SECONDS="0.2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [search.communicate()[0] for search in searches]
    assert [search.returncode for search in searches] == [0, 0], outputs
    lines = [re.findall(r"^type: .*", output, re.MULTILINE) for output in outputs]
    assert lines[0] == lines[1] != []
    archive = Archive(f"sqlite:///{app / 'tune.db'}", "train", "minimize")
    found = [each for stage in ("start", "lr", "beta1") for each in archive.records(stage)]
    assert len({(each.trial.point, each.turn) for each in found}) == len(found) <= 14
    assert len({each.owner for each in found}) == 2
    assert len(trained_settings(app)) == len(found)
