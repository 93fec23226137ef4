"""Where a search writes, what seeds its trainings, and what it takes for another search."""

import logging
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_adam.errors import ConfigError
from lightning_adam.tune.sweeper import _check_single, _flat, _is_of_hydra, _seeds, sweep_folder
from tests.tune.searching import plan_of


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "multirun/adam_tune_mnist"),
        ("runs/at_${now:%H}/x", "runs/adam_tune_mnist"),
        ("${now:%Y}", "adam_tune_mnist"),
        ("sweeps/${hydra.job.name}/${now:%H}", "sweeps/train/adam_tune_mnist"),
        ("my sweep", "my sweep"),
        ("sweeps/${hydra.job.name}", "sweeps/train"),
    ],
)
def test_a_folder_that_is_named_by_the_time_would_not_be_found_again(
    typed: str, expected: str
) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": typed}, "job": {"name": "train"}}})
    assert sweep_folder(config, "mnist") == Path.cwd() / expected
    if "now" in typed:
        assert (Path.cwd() / str(config.hydra.sweep.dir)).resolve() == Path.cwd() / expected


@pytest.mark.parametrize(
    ("app", "changes", "expected"),
    [
        ({"seed": 7}, {}, ("seed", [7, 8])),
        ({"trainer": {"seed": 0}}, {"seed_key": "trainer.seed"}, ("trainer.seed", [0, 1])),
        ({"seed": 7}, {"n_seeds": 1}, ("seed", [7])),
        ({}, {"n_seeds": 1}, ("seed", [None])),
    ],
)
def test_seeds_follow_the_apps_own(
    app: dict[str, Any], changes: dict[str, Any], expected: tuple[str, list[int | None]]
) -> None:
    assert _seeds(OmegaConf.create(app), plan_of(**changes)) == expected


def test_an_app_without_a_seed_is_told_that_chance_alone_differs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert _seeds(OmegaConf.create({"lr": 1}), plan_of()) == ("seed", [None, None])
    assert "type hydra.sweeper.seed_key=KEY" in caplog.text


@pytest.mark.parametrize("found", [None, "7", True, 1.5])
def test_a_seed_key_that_is_typed_has_to_hold_a_whole_number(found: Any) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.seed_key=my\.seed: expected"):
        _seeds(OmegaConf.create({"my": {"seed": found}}), plan_of(seed_key="my.seed"))


@pytest.mark.parametrize("typed", ["optimizer.lr=1e-3,1e-2", "seed=range(3)", "x=choice(a,b)"])
def test_several_values_are_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match="expected one value") as refused:
        _check_single(["optimizer.eps=1e-8", typed])
    assert str(refused.value).startswith(f"{typed}: ")


def test_lists_are_one_value() -> None:
    _check_single(["optimizer.betas=[0.9,0.95]", "+model={width:8}"])


def test_groups_of_hydras_own_are_not_typed_back() -> None:
    assert _is_of_hydra("lightning_adam/tune@hydra.sweeper.stages=mine")
    assert not _is_of_hydra("lightning_adam/optimizer@model.optimizer=adam")
    assert not _is_of_hydra("optimizer.lr=1e-3")


def test_searches_are_told_apart_by_all_that_the_app_is_configured_by() -> None:
    config = OmegaConf.create({"a": {"b": 1, "c": []}, "d": {}, "e": "${a.b}", "f": "???"})
    assert _flat(config) == {"a.b": "1", "a.c": "[]", "d": "{}", "e": '"${a.b}"', "f": "???"}
