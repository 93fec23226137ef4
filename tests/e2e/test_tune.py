"""A user's own app, outside the repository, is tuned by one command."""

import math
import os
import shlex
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from lightning_adam.tune.runs import Outcome, Stage
from tests.support import forkserver
from tests.support.commands import Finished, run
from tests.support.tuning_app import MINIMIZE, TUNE, runs, trained_settings, variables, write_app

FOLDER = "multirun/adam_tune_train"
SECRET = "s3cr3t-pa55"
DATABASE = """
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

class WithPassword(SQLiteDialect_pysqlite):
    def create_connect_args(self, url):
        return super().create_connect_args(url._replace(username=None, password=None, host=None))

registry.register("sqlite.guarded", "database", "WithPassword")
"""
"""SQLite with a user and a password, which stands in for a database on a server."""
IMPATIENT = """
from lightning_adam.tune import history
history.HEARTBEAT_SECONDS, history.GRACE_SECONDS = 1, 3
import hydra
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return write_app(tmp_path / "my app")


def tune(folder: Path, *words: str) -> Finished:
    return run([*TUNE, MINIMIZE, *words], folder, variables(folder))


def start(folder: Path, *words: str, seconds: float) -> ForkServerProcess:
    """Starts a search with runs of `seconds` seconds, and writes its output to output.txt."""
    own = variables(folder, SECONDS=str(seconds))
    words = (*TUNE[2:], MINIMIZE, *words)
    return forkserver.start("train.py", words, folder, own, folder / "output.txt")


def wait_for_runs(search: ForkServerProcess, folder: Path, count: int) -> None:
    while not (folder / "trained.txt").exists() or len(trained_settings(folder)) < count:
        assert search.is_alive(), (folder / "output.txt").read_text()
        time.sleep(0.02)


def change_app(folder: Path, before: str, after: str) -> None:
    program = (folder / "train.py").read_text()
    assert before in program
    (folder / "train.py").write_text(program.replace(before, after))


def test_one_command_tunes_an_app_and_its_last_line_can_be_typed(app: Path) -> None:
    tuned = tune(app, "hydra.sweeper.n_trials=12")
    assert tuned.returncode == 0, tuned.output
    assert len(trained_settings(app)) == 12
    line = (app / FOLDER / "tune.md").read_text().splitlines()[-1]
    assert tuned.lines[-1] == f"overrides: {line}"
    words = shlex.split(line)
    assert abs(math.log10(float(words[0].removeprefix("optimizer.lr="))) + 2.3) < 0.3
    assert (app / FOLDER / "tune.html").stat().st_size > 1000
    again = run(["python", "train.py", *words], app, variables(app))
    assert again.returncode == 0, again.output
    assert trained_settings(app)[-1] in trained_settings(app)[:-1]
    assert {seed for *_, seed in trained_settings(app)} == {5, 6, 7}


def test_search_without_a_direction_fails_before_the_first_run(app: Path) -> None:
    tuned = run(TUNE, app, variables(app))
    assert tuned.returncode == 1, tuned.output
    assert "Traceback" not in tuned.output
    assert "hydra.sweeper.direction=minimize or hydra.sweeper.direction=maximize" in tuned.output
    assert not (app / "trained.txt").exists()


@pytest.mark.slow
def test_app_that_returns_nothing_fails_at_its_first_run(app: Path) -> None:
    change_app(app, "return loss", "loss")
    tuned = tune(app)
    assert tuned.returncode == 1
    assert "The app returned None, not the validation metric as a number" in tuned.output
    assert len(trained_settings(app)) == 1


@pytest.mark.slow
def test_search_in_which_every_run_diverges_fails_and_names_its_report(app: Path) -> None:
    change_app(app, "return loss", "return math.nan")
    tuned = tune(app, "hydra.sweeper.n_trials=3")
    assert tuned.returncode == 1
    assert f"None of 3 runs returned a finite metric. See {FOLDER}/tune.md" in tuned.output
    assert "overrides: " not in tuned.output
    assert "diverged: the metric is nan" in (app / FOLDER / "tune.md").read_text()


@pytest.mark.slow
def test_search_uses_the_paths_the_folder_and_the_ranges_of_the_user(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app", "@model.net.optimizer", "model.net.optimizer")
    words = ["hydra.sweeper.n_trials=7", "hydra.sweep.dir=found here"]
    words += ["hydra.sweeper.space.lr.low=0.002", "hydra.sweeper.space.beta2=null"]
    tuned = tune(app, "model.net.optimizer.betas=[0.9,0.98]", *words)
    assert tuned.after("overrides: ").startswith("'model.net.optimizer.betas=[0.9,0.98]' ")
    (first, *others) = trained_settings(app)
    assert first[0] == 1e-3
    assert all(lr >= 0.002 and beta2 == 0.98 for lr, _, beta2, *_ in others)
    assert (app / "found here/tune.md").is_file()
    assert not (app / "multirun").exists()


@pytest.mark.slow
def test_search_continues_with_a_larger_budget_and_range_but_not_another_model(app: Path) -> None:
    over = [tune(app, "hydra.sweeper.n_trials=4") for _ in range(2)]
    assert over[0].lines[-1] == over[1].lines[-1]
    before = trained_settings(app)
    assert len(before) == 4
    larger = ["hydra.sweeper.n_trials=7", "hydra.sweeper.space.lr.high=0.5", "data.num_workers=4"]
    assert tune(app, *larger).returncode == 0
    after = trained_settings(app)
    assert len(set(after)) == len(after) == 7
    other = tune(app, *larger, "width=16")
    assert other.returncode == 1
    assert "width was 8, now 16" in other.output
    assert "hydra.sweeper.study_name=train_2" in other.output
    assert trained_settings(app) == after


@pytest.mark.slow
def test_interrupted_search_says_how_to_continue(app: Path) -> None:
    search = start(app, "hydra.sweeper.n_trials=6", seconds=0.5)
    wait_for_runs(search, app, 2)
    assert search.pid is not None
    os.kill(search.pid, signal.SIGINT)
    search.join()
    output = (app / "output.txt").read_text()
    assert search.exitcode == 1
    assert "adam_tune: interrupted; run the same command to resume" in output
    assert "Traceback" not in output
    assert tune(app, "hydra.sweeper.n_trials=6").returncode == 0
    assert len(trained_settings(app)) <= 7


@pytest.mark.parametrize(
    "is_database",
    [
        pytest.param(False, id="journal", marks=pytest.mark.slow),
        pytest.param(True, id="sqlite", marks=pytest.mark.nightly),
    ],
)
def test_search_killed_within_and_between_runs_continues(app: Path, is_database: bool) -> None:
    """No run is lost, and none is repeated but those that were in flight."""
    change_app(app, "import hydra\n", IMPATIENT)
    storage = f"sqlite:///{app / 'tune.db'}" if is_database else None
    words = [f"hydra.sweeper.storage='{storage}'"] if storage else []
    kills = [(1, 0.1), (2, 0.42), (5, 0.3), (8, 0.45)]
    for begun, seconds_later in kills:
        search = start(app, *words, "hydra.sweeper.n_trials=7", seconds=0.4)
        wait_for_runs(search, app, begun)
        time.sleep(seconds_later)
        search.kill()
        search.join()
    tuned = tune(app, *words, "hydra.sweeper.n_trials=7")
    assert tuned.returncode == 0, tuned.output
    found = runs(app, storage)
    over = [each.request for each in found if each.outcome is Outcome.complete]
    assert len(found) - len(over) <= len(kills)
    assert len(trained_settings(app)) <= len(found)
    uninterrupted = write_app(app.parent / "uninterrupted")
    tune(uninterrupted, "hydra.sweeper.n_trials=7")
    assert [each.key for each in over] == [each.request.key for each in runs(uninterrupted)]


@pytest.mark.slow
def test_two_processes_share_a_search_through_a_database(app: Path) -> None:
    storage = f"sqlite:///{app / 'tune.db'}"
    folders = [write_app(app.parent / f"machine {number}") for number in range(2)]
    words = ["hydra.sweeper.n_trials=12", f"hydra.sweeper.storage='{storage}'"]
    searches = [start(folder, *words, seconds=0.2) for folder in folders]
    for search in searches:
        search.join()
    outputs = [(folder / "output.txt").read_text() for folder in folders]
    assert [search.exitcode for search in searches] == [0, 0], outputs
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    found = runs(app, storage)
    assert len({each.request.key for each in found}) == len(found) == 12
    assert {each.request.stage for each in found} == set(Stage)
    assert len({each.owner for each in found}) == 2
    assert sum(len(trained_settings(folder)) for folder in folders) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("is_typed", [True, False])
def test_password_of_the_database_is_in_no_file_and_no_output(app: Path, is_typed: bool) -> None:
    (app / "database.py").write_text(DATABASE)
    change_app(app, "import hydra\n", "import hydra, database\n")
    storage = f"sqlite+guarded://me:{SECRET}@host/{app / 'tune.db'}"
    words = [f"hydra.sweeper.storage='{storage}'"] if is_typed else []
    if not is_typed:
        with (app / "conf/config.yaml").open("a") as file:
            file.write(f"hydra: {{sweeper: {{storage: '{storage}'}}}}\n")
    tuned = tune(app, *words, "hydra.sweeper.n_trials=2", "hydra.verbose=true")
    assert tuned.returncode == 0, tuned.output
    assert (app / "tune.db").is_file()
    assert SECRET not in tuned.output
    written = [each for each in (app / "multirun").rglob("*") if each.is_file()]
    assert len(written) > 8
    assert [each for each in written if SECRET.encode() in each.read_bytes()] == []
    failed = tune(app, f"hydra.sweeper.storage='nosuch://me:{SECRET}@host/tune'")
    assert "hydra.sweeper.storage=nosuch://me:***@host/tune cannot be opened" in failed.output
    assert SECRET not in failed.output
