"""The job of a run: its records in the history, and its result for the launcher."""

import os
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_adam.config.variables import STORAGE_VARIABLE, TRIAL_VARIABLE
from lightning_adam.tune.history import History
from lightning_adam.tune.job import Job, NoMetricError, Trial, to_metric
from lightning_adam.tune.runs import Outcome, Request, Run, Stage
from tests.support.tables import each_row
from tests.tune.simulation import START


def begin(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    number = history.begin(Request(Stage.race, START, replicate=len(history.runs())), "owner")
    assert number is not None
    trial = Trial("search", "minimize", "race", number, 1.0, {})
    monkeypatch.setenv(TRIAL_VARIABLE, trial.as_variable())


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> History:
    history = History("journal:trials.journal", "search", "minimize")
    monkeypatch.setenv(STORAGE_VARIABLE, history.url)
    begin(history, monkeypatch)
    runtime = SimpleNamespace(runtime=SimpleNamespace(output_dir="race/0"))
    monkeypatch.setattr(HydraConfig, "get", lambda: runtime)
    return history


def last_run(history: History) -> Run:
    return history.runs()[-1]


def run(function: Any) -> Any:
    return Job(function)(DictConfig({}))


def test_number_of_any_library_is_a_metric(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = (0.25, np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25]), np.array(0.25))
    with each_row() as row:
        for value in numbers:
            with row(repr(value)):
                assert run(lambda config, value=value: value) == 0.25
                assert (last_run(history).value, last_run(history).folder) == (0.25, "race/0")
            begin(history, monkeypatch)
    assert type(to_metric(np.float64(0.5))) is float


def test_return_value_that_is_not_a_number_is_an_error(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = [None, "0.25", True, {"val/loss": 0.25}, torch.zeros(2), []]
    with each_row() as row:
        for value in values:
            with row(repr(value)):
                line = r'return trainer\.callback_metrics\["val/loss"\]'
                with pytest.raises(NoMetricError, match=line):
                    run(lambda config, value=value: value)
                assert last_run(history).outcome is Outcome.failed
            begin(history, monkeypatch)


def test_exception_is_stored_and_raised_again(history: History) -> None:
    def function(config: DictConfig) -> float:
        raise ValueError("shapes do not match\nsecond line")

    with pytest.raises(ValueError, match="shapes do not match"):
        run(function)
    assert last_run(history).outcome is Outcome.failed
    assert last_run(history).error == "ValueError: shapes do not match"


def test_run_sends_heartbeats_while_it_trains(history: History) -> None:
    def function(config: DictConfig) -> float:
        History(history.url, "search", "minimize").reap_stale()
        return 0.25

    assert run(function) == 0.25
    assert last_run(history).outcome is Outcome.complete


def test_run_that_the_search_has_ended_is_not_trained(history: History) -> None:
    history.fail(0, "killed")
    trained: list[int] = []
    with pytest.raises(RuntimeError, match="Run 0 had no heartbeat"):
        run(lambda config: trained.append(1))
    assert trained == []


def test_metric_is_returned_if_the_storage_cannot_be_opened(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, shown in (
        ("journal:not/here.journal", "journal:not/here.journal"),
        ("postgresql://me:secret@localhost:1/tune", r"postgresql://me:\*\*\*@localhost:1/tune"),
    ):
        monkeypatch.setenv(STORAGE_VARIABLE, place)
        with pytest.warns(UserWarning, match=f"{shown} cannot be opened here") as warned:
            assert run(lambda config: 0.25) == 0.25
        assert "secret" not in str(warned[0].message)


def test_job_outside_of_a_search_uses_no_history() -> None:
    assert TRIAL_VARIABLE not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(lambda config: 0.25) == 0.25


def test_wandb_run_is_in_the_group_of_the_search_unless_the_user_sets_one(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_JOB_TYPE", "mine")
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    seen: dict[str, str | None] = {}

    def function(config: DictConfig) -> float:
        seen.update({name: os.environ.get(name) for name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE")})
        return 0.25

    run(function)
    assert seen == {"WANDB_RUN_GROUP": "search", "WANDB_JOB_TYPE": "mine"}
    assert "WANDB_RUN_GROUP" not in os.environ
