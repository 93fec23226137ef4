"""The sweeper: where a search writes, its seeds, and how searches are distinguished."""

import logging
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_adam.config.errors import ConfigError
from lightning_adam.tune.sweeper import _check_single, _flat, _is_of_hydra, _seeds, sweep_folder
from tests.support.tables import each_row
from tests.tune.searching import plan_of

FOLDERS = [
    ("multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "multirun/adam_tune_mnist"),
    ("runs/at_${now:%H}/x", "runs/adam_tune_mnist"),
    ("${now:%Y}", "adam_tune_mnist"),
    ("sweeps/${hydra.job.name}/${now:%H}", "sweeps/train/adam_tune_mnist"),
    ("my sweep", "my sweep"),
    ("sweeps/${hydra.job.name}", "sweeps/train"),
]
"""Values of hydra.sweep.dir, and the folders of the search `mnist`."""


def test_folder_of_a_search_does_not_depend_on_the_time() -> None:
    with each_row() as row:
        for value, expected in FOLDERS:
            with row(value):
                hydra = {"sweep": {"dir": value}, "job": {"name": "train"}}
                config = OmegaConf.create({"hydra": hydra})
                assert sweep_folder(config, "mnist") == Path.cwd() / expected
                if "now" in value:
                    found = (Path.cwd() / str(config.hydra.sweep.dir)).resolve()
                    assert found == Path.cwd() / expected


def test_seeds_follow_the_seed_of_the_app() -> None:
    rows: list[tuple[dict[str, Any], dict[str, Any], tuple[str, list[int | None]]]] = [
        ({"seed": 7}, {}, ("seed", [7, 8])),
        ({"trainer": {"seed": 0}}, {"seed_key": "trainer.seed"}, ("trainer.seed", [0, 1])),
        ({"seed": 7}, {"n_seeds": 1}, ("seed", [7])),
        ({}, {"n_seeds": 1}, ("seed", [None])),
    ]
    for app, changes, expected in rows:
        assert _seeds(OmegaConf.create(app), plan_of(**changes)) == expected


def test_app_without_a_seed_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _seeds(OmegaConf.create({"lr": 1}), plan_of()) == ("seed", [None, None])
    assert "Set hydra.sweeper.seed_key=KEY" in caplog.text


def test_seed_key_without_a_whole_number_raises() -> None:
    for found in (None, "7", True, 1.5):
        with pytest.raises(ConfigError, match=r"hydra\.sweeper\.seed_key=my\.seed must be a key"):
            _seeds(OmegaConf.create({"my": {"seed": found}}), plan_of(seed_key="my.seed"))


def test_override_with_several_values_raises_and_a_list_is_one_value() -> None:
    for override in ("optimizer.lr=1e-3,1e-2", "seed=range(3)", "x=choice(a,b)"):
        with pytest.raises(ConfigError, match="must be one value") as raised:
            _check_single(["optimizer.eps=1e-8", override])
        assert str(raised.value).startswith(f"{override} must be")
    _check_single(["optimizer.betas=[0.9,0.95]", "+model={width:8}"])


def test_groups_of_hydra_are_no_part_of_the_result() -> None:
    assert _is_of_hydra("lightning_adam/tune@hydra.sweeper.stages=mine")
    assert not _is_of_hydra("lightning_adam/optimizer@model.optimizer=adam")
    assert not _is_of_hydra("optimizer.lr=1e-3")


def test_searches_are_distinguished_by_the_whole_config() -> None:
    config = OmegaConf.create({"a": {"b": 1, "c": []}, "d": {}, "e": "${a.b}", "f": "???"})
    assert _flat(config) == {"a.b": "1", "a.c": "[]", "d": "{}", "e": '"${a.b}"', "f": "???"}
