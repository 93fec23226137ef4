"""A trial in its process: what it writes to the archive, and what the launcher receives."""

import math
import os
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_adam.config.variables import TRIAL_VARIABLE
from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.job import Identity, Job, NoMetricError, as_metric
from lightning_adam.tune.story import Outcome
from tests.support.tables import each_row
from tests.tune.searching import DEFAULT

PLACE = "journal:trials.journal"


def begin(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> int:
    number = archive.begin("lr", DEFAULT, 0, 0, {}, {}, "host/1/a", 1)
    monkeypatch.setenv(
        TRIAL_VARIABLE, Identity(PLACE, "search", "minimize", "lr", number).as_variable()
    )
    return number


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Archive:
    archive = Archive(PLACE, "search", "minimize")
    begin(archive, monkeypatch)
    runtime = SimpleNamespace(runtime=SimpleNamespace(output_dir="lr/0"))
    monkeypatch.setattr(HydraConfig, "get", lambda: runtime)
    return archive


def record(archive: Archive) -> Record:
    return archive.records("lr")[-1]


def run(function: Any) -> Any:
    return Job(function)(DictConfig({}))


def test_number_of_any_library_is_a_metric(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = (0.25, np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25]), np.array(0.25))
    with each_row() as row:
        for value in numbers:
            with row(repr(value)):
                assert run(lambda config, value=value: value) == 0.25
                trial = record(archive).trial
                assert (trial.value, trial.folder) == (0.25, "lr/0")
                assert record(archive).job
            begin(archive, monkeypatch)
    assert type(as_metric(np.float64(0.5))) is float


def test_value_that_is_no_number_raises_with_what_to_return(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = [None, "0.25", True, {"val/loss": 0.25}, torch.zeros(2), []]
    with each_row() as row:
        for value in values:
            with row(repr(value)):
                sentence = r'return trainer\.callback_metrics\["val/loss"\]'
                with pytest.raises(NoMetricError, match=sentence):
                    run(lambda config, value=value: value)
                assert record(archive).trial.outcome is Outcome.failed
            begin(archive, monkeypatch)


def test_exception_is_stored_and_raised_again(archive: Archive) -> None:
    def function(config: DictConfig) -> float:
        raise ValueError("shapes do not match\nsecond line")

    with pytest.raises(ValueError, match="shapes do not match"):
        run(function)
    trial = record(archive).trial
    assert (trial.outcome, trial.error) == (Outcome.failed, "ValueError: shapes do not match")


def test_metric_that_is_nan_is_a_failure(archive: Archive) -> None:
    assert math.isnan(run(lambda config: math.nan))
    assert record(archive).trial.error == "diverged: the metric is nan"


def test_trial_that_the_search_has_given_up_is_not_run(archive: Archive) -> None:
    archive.lose("lr", 0)
    trained: list[int] = []
    with pytest.raises(RuntimeError, match="given this trial up"):
        run(lambda config: trained.append(1))
    assert trained == []


def test_metric_is_returned_though_the_archive_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    who = Identity("journal:not/here.journal", "search", "minimize", "lr", 0)
    monkeypatch.setenv(TRIAL_VARIABLE, who.as_variable())
    with pytest.warns(UserWarning, match="cannot be reached from here"):
        assert run(lambda config: 0.25) == 0.25


def test_job_outside_of_a_search_uses_no_archive() -> None:
    assert TRIAL_VARIABLE not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(lambda config: 0.25) == 0.25


def test_wandb_run_is_in_the_group_of_the_search_unless_the_user_sets_one(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
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
