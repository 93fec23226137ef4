"""The history of a search in a file or database, shared by processes that may be killed."""

import math
import os
import re
import signal
import sqlite3
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.tune import SpaceConfig
from lightning_adam.tune import history as module
from lightning_adam.tune.history import History, open_storage
from lightning_adam.tune.runs import Outcome, Request, Run, Stage
from lightning_adam.tune.space import Space
from tests.support import forkserver
from tests.support.commands import environment
from tests.tune.simulation import START

URLS = ["journal:trials.journal", "sqlite:///trials.db"]
REQUEST = Request(Stage.ladder, START, 1 / 8)


@pytest.fixture(params=URLS)
def url(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_history(url: str) -> History:
    return History(url, "search", "minimize")


def begin_run(history: History, request: Request = REQUEST) -> int:
    number = history.begin(request, "owner", seed=7)
    assert number is not None
    return number


def test_run_is_read_by_another_process(url: str) -> None:
    history = open_history(url)
    number = begin_run(history)
    history.set_attributes(
        number, folder="here", steps=800, state_dtypes=["bfloat16"], findings=["x"]
    )
    assert open_history(url).runs() == [
        Run(
            *(REQUEST, 0, Outcome.running),
            seed=7,
            folder="here",
            findings=("x",),
            steps=800,
            state_dtypes=("bfloat16",),
            owner="owner",
        )
    ]
    history.finish(number, 0.25, seconds=3.0)
    (run,) = open_history(url).runs()
    assert (run.outcome, run.value, run.seconds) == (Outcome.complete, 0.25, 3.0)


def test_metric_that_is_not_finite_is_a_failure() -> None:
    history = open_history(URLS[0])
    for value in (math.nan, math.inf, -math.inf):
        history.finish(
            begin_run(history, replace(REQUEST, replicate=len(history.runs()))), value, 3.0
        )
        run = history.runs()[-1]
        assert (run.outcome, run.value, run.seconds) == (Outcome.failed, None, 3.0)
        assert run.error == f"diverged: the metric is {value}"
        assert not run.is_retried


def test_ended_run_does_not_change(url: str) -> None:
    history = open_history(url)
    number = begin_run(history)
    history.finish(number, 0.25)
    history.finish(number, 9.0)
    history.fail(number, "too late")
    history.reap_stale([number], "too late")
    with pytest.raises(RuntimeError):
        history.set_attributes(number, folder="there")
    (run,) = history.runs()
    assert (run.outcome, run.value, run.error) == (Outcome.complete, 0.25, "")


def test_same_run_is_started_by_only_one_process(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = open_history(url), open_history(url)
    first = one.begin(REQUEST, "one")
    assert other.begin(REQUEST, "other") is None
    assert [each.owner for each in one.runs()] == ["one"]
    assert other.begin(replace(REQUEST, replicate=1), "other") is not None
    # A run starts again after its process was killed.
    assert first is not None
    one.set_attributes(first, lost="killed")
    one.study.tell(first, state=TrialState.FAIL)
    assert other.begin(replace(REQUEST, attempt=2), "other") is not None
    assert len(other.runs()) == 3


def test_search_of_another_config_under_the_same_name_raises(url: str) -> None:
    identity = {"model.width": "8", "data.num_workers": "0", "logger.name": "a", "eps": "1e-8"}
    open_history(url).check_identity(identity, "multirun/a")
    open_history(url).check_identity(
        {**identity, "data.num_workers": "4", "logger.name": "b"}, "multirun/a"
    )
    with pytest.raises(ConfigError) as raised:
        open_history(url).check_identity({**identity, "model.width": "9", "new": "1"}, "multirun/a")
    sentence = str(raised.value)
    assert "(model.width was 8, now 9; new was None, now 1)" in sentence
    assert sentence.endswith("start another search with hydra.sweeper.study_name=search_2")


def test_optuna_loads_the_study_with_its_parameters(url: str) -> None:
    history = open_history(url)
    params, distributions = Space(START, SpaceConfig(), 800, False).params(START, 1 / 8)
    number = history.begin(REQUEST, "owner", 7, params, distributions)
    assert number is not None
    history.finish(number, 0.25)
    (trial,) = optuna.load_study(study_name="search", storage=open_storage(url)).trials
    assert trial.value == 0.25
    assert trial.params == pytest.approx(
        {
            "lr": 1e-3,
            "one_minus_beta1": 0.1,
            "one_minus_beta2": 1e-3,
            "decay_timescale": 1000.0,
            "warmup_ratio": 0.0,
            "length": 1 / 8,
        }
    )


# ---- Killed processes


def test_run_is_lost_without_a_heartbeat_of_its_owner_and_job() -> None:
    history = open_history(URLS[0])
    number = begin_run(history)
    for name in ("owner", "0"):
        with history.keep_alive(name, [number]):
            open_history(URLS[0]).reap_stale()
            assert history.is_running(number)
    with history.keep_alive("owner", [number]):
        # After the owner has lost the run, only the job can keep it alive.
        history.reap_stale([number], "the launcher broke")
    assert history.runs()[0].error == "the launcher broke"
    number = begin_run(history)
    history.reap_stale()
    assert history.runs()[1].error == "its process was killed"
    assert history.runs()[1].is_retried


OWNER = """
import sys, time
from lightning_adam.tune.history import History
from tests.tune.test_history import REQUEST
history = History(sys.argv[1], "search", "minimize")
with history.keep_alive(sys.argv[2], [0]):
    if sys.argv[2] == "owner":
        assert history.begin(REQUEST, "owner") == 0
    open(sys.argv[2], "w").close()
    time.sleep(600)
"""


def start(url: str, name: str, folder: Path) -> ForkServerProcess:
    """Starts a process that keeps run 0 alive, and waits until it does."""
    (folder / "program.py").write_text(OWNER)
    variables = environment(PYTHONPATH=str(Path(__file__).parents[2]))
    process = forkserver.start("program.py", [url, name], folder, variables, folder / "output")
    while not (folder / name).exists():
        assert process.is_alive(), (folder / "output").read_text()
        time.sleep(0.01)
    return process


def kill(process: ForkServerProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
def test_run_is_lost_when_its_owner_and_its_job_are_killed(tmp_path: Path) -> None:
    history = open_history(URLS[0])
    owner, job = (start(URLS[0], name, tmp_path) for name in ("owner", "0"))
    history.reap_stale()
    assert history.is_running(0)
    kill(owner)
    history.reap_stale()
    assert history.is_running(0)
    kill(job)
    history.reap_stale()
    (run,) = history.runs()
    assert run.is_retried
    assert run.error == "its process was killed"


def test_run_in_a_database_is_lost_without_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    history = open_history(URLS[1])
    number = begin_run(history)

    def execute(command: str) -> str:
        with sqlite3.connect("trials.db") as database:
            return str(database.execute(command).fetchall())

    age = "UPDATE trial_heartbeats SET heartbeat = '2001-01-01 00:00:00'"
    with history.keep_alive("owner", [number]):
        execute(age)
        while "2001" in execute("SELECT heartbeat FROM trial_heartbeats"):
            time.sleep(0.01)
        history.reap_stale()
        assert history.is_running(number)
    execute(age)
    history.reap_stale()
    (run,) = history.runs()
    assert run.is_retried


# ---- Storages


def test_storage_that_cannot_be_opened_raises_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    rows = {
        "nonsense": "nonsense",
        "postgresql://me:secret@localhost:1/tune": "postgresql://me:***@localhost:1/tune",
        "sqlite:////no/such/folder/x.db": "sqlite:////no/such/folder/x.db",
    }
    for url, shown in rows.items():
        beginning = f"hydra.sweeper.storage={shown} cannot be opened: "
        with pytest.raises(ConfigError, match=re.escape(beginning)) as raised:
            open_storage(url)
        assert "secret" not in str(raised.value)
    # Only a database that does not answer is tried again.
    assert len(pauses) == 2


def test_missing_journal_is_not_created_when_it_must_exist() -> None:
    with pytest.raises(FileNotFoundError):
        open_storage("journal:missing.journal", must_exist=True)
    assert not Path("missing.journal").exists()
