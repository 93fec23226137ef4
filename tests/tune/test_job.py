"""A trial in its process: what it tells the archive, and what a launcher gets back."""

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

from lightning_adam.environment import TRIAL
from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.job import Identity, Job, NoMetricError, as_metric
from lightning_adam.tune.story import Outcome
from tests.tune.searching import DEFAULT

PLACE = "journal:trials.journal"


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Archive:
    """With a trial that is under way: this process is to train it."""
    archive = Archive(PLACE, "search", "minimize")
    number = archive.begin("lr", DEFAULT, 0, 0, {}, {}, "host/1/a", 1)
    monkeypatch.setenv(TRIAL, Identity(PLACE, "search", "minimize", "lr", number).as_variable())
    runtime = SimpleNamespace(runtime=SimpleNamespace(output_dir="lr/0"))
    monkeypatch.setattr(HydraConfig, "get", lambda: runtime)
    return archive


def record(archive: Archive) -> Record:
    (found,) = archive.records("lr")
    return found


def run(function: Any) -> Any:
    return Job(function)(DictConfig({}))


@pytest.mark.parametrize(
    "value", [0.25, np.float32(0.25), torch.tensor(0.25), torch.tensor([0.25]), np.array(0.25)]
)
def test_a_number_of_any_library_is_a_metric(value: Any, archive: Archive) -> None:
    assert run(lambda config: value) == 0.25
    assert record(archive).trial.value == 0.25
    assert record(archive).trial.folder == "lr/0"
    assert record(archive).job


@pytest.mark.parametrize("value", [None, "0.25", True, {"val/loss": 0.25}, torch.zeros(2), []])
def test_anything_else_is_refused_with_what_to_return(value: Any, archive: Archive) -> None:
    with pytest.raises(NoMetricError, match=r'return trainer\.callback_metrics\["val/loss"\]'):
        run(lambda config: value)
    assert record(archive).trial.outcome is Outcome.failed


def test_what_is_raised_is_kept_and_raised_on(archive: Archive) -> None:
    def function(config: DictConfig) -> float:
        raise ValueError("shapes do not match\nsecond line")

    with pytest.raises(ValueError, match="shapes do not match"):
        run(function)
    trial = record(archive).trial
    assert (trial.outcome, trial.error) == (Outcome.failed, "ValueError: shapes do not match")


def test_a_diverged_training_is_a_failure_though_it_returns(archive: Archive) -> None:
    assert math.isnan(run(lambda config: math.nan))
    assert record(archive).trial.error == "diverged: the metric is nan"


def test_a_trial_that_the_search_has_given_up_is_not_trained(archive: Archive) -> None:
    archive.lose("lr", 0)
    trained: list[int] = []
    with pytest.raises(RuntimeError, match="given this trial up"):
        run(lambda config: trained.append(1))
    assert trained == []


def test_where_the_archive_cannot_be_reached_the_metric_goes_back_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    who = Identity("journal:not/here.journal", "search", "minimize", "lr", 0)
    monkeypatch.setenv(TRIAL, who.as_variable())
    with pytest.warns(UserWarning, match="cannot be reached from here"):
        assert run(lambda config: 0.25) == 0.25


def test_outside_of_a_search_nothing_is_looked_for() -> None:
    assert TRIAL not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(lambda config: 0.25) == 0.25


def test_the_run_of_wandb_is_of_the_searchs_group_and_the_users_words_win(
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


def test_metrics_are_plain_numbers() -> None:
    assert type(as_metric(np.float64(0.5))) is float
