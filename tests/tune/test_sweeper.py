"""The sweeper in an app of this process: runs, resumed searches, errors and passwords."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.tune import Direction, TuneConfig
from lightning_adam.config.variables import STORAGE_VARIABLE
from lightning_adam.tune.history import History
from lightning_adam.tune.runs import Request, Run, Stage
from lightning_adam.tune.sweeper import (
    _check_failures,
    _check_single,
    _flat,
    _is_of_hydra,
    _seed,
    sweep_folder,
)
from tests.support.tables import each_row
from tests.tune.simulation import START, ended

FOLDERS = [
    ("multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "multirun/adam_tune_mnist"),
    ("runs/at_${now:%H}/x", "runs/adam_tune_mnist"),
    ("${now:%Y}", "adam_tune_mnist"),
    ("sweeps/${hydra.job.name}/${now:%H}", "sweeps/train/adam_tune_mnist"),
    ("my sweep", "my sweep"),
    ("sweeps/${hydra.job.name}", "sweeps/train"),
]
"""Values of hydra.sweep.dir, and the folders of the search `mnist`."""
PARTIAL = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-3}
CONFIG = {"optimizer": PARTIAL, "seed": None, "model": {"width": 8}, "data": {"num_workers": 0}}

Tune = Callable[..., list[Run]]


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Searches for the learning rate of an app, and returns the runs of the search."""
    monkeypatch.setenv(STORAGE_VARIABLE, "")

    def searched(
        function: Callable[[DictConfig], Any],
        *words: str,
        config: dict[str, Any] = CONFIG,
        storage: str = "journal:found/trials.journal",
    ) -> list[Run]:
        Path("config.yaml").write_text(yaml.safe_dump(config))
        given = ["direction=minimize", "study_name=search", "n_trials=1"]
        given = [f"hydra.sweeper.{each}" for each in given]
        command = ["train.py", "-m", "hydra/sweeper=adam_tune", "hydra.sweep.dir=found", *given]
        monkeypatch.setattr(sys, "argv", [*command, *words])
        folder = str(Path.cwd())
        hydra.main(version_base="1.3", config_path=folder, config_name="config")(function)()
        return History(storage, "search", "minimize").runs()

    return searched


def loss(config: DictConfig) -> float:
    return float(abs(config.optimizer.lr - 0.01))


def test_search_resumes_with_a_larger_budget_and_other_workers(
    tune: Tune, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = []

    def seeded(config: DictConfig) -> float:
        seeds.append(config.seed)
        return loss(config)

    first = tune(seeded)
    wide = "hydra.sweeper.space.lr.high=0.5"
    runs = tune(seeded, "hydra.sweeper.n_trials=2", "data.num_workers=4", wide)
    assert (runs[:1], len(runs)) == (first, 2)
    assert [each.value for each in runs] == [
        abs(each.request.configuration.lr - 0.01) for each in runs
    ]
    # Many apps check `if cfg.seed:`, so the first seed is not 0.
    assert seeds == [1, 1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tune(loss, "hydra.sweeper.n_trials=3", "model.width=9")
    error = capsys.readouterr().err
    assert "model.width was 8, now 9" in error
    assert "hydra.sweeper.study_name=search_2" in error


def test_storage_url_is_not_in_any_file_or_output(
    tune: Tune, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the URL of the config nor that of the command line, which applies."""
    url = f"sqlite:///{Path.cwd()}/secret.db"
    config = {**CONFIG, "hydra": {"sweeper": {"storage": "sqlite:///secret too.db"}}}
    tune(loss, f"hydra.sweeper.storage={url}", config=config, storage=url)
    saved = [each for each in Path("found").rglob("*") if each.is_file()]
    assert {"multirun.yaml", "hydra.yaml", "overrides.yaml"} <= {each.name for each in saved}
    assert [each for each in saved if "secret" in each.read_text()] == []
    assert "secret" not in "".join(capfd.readouterr())


def test_search_stops_if_its_first_runs_fail() -> None:
    request = Request(Stage.ladder, START)
    crashed = [ended(request, number, None, error="ValueError: no data.") for number in range(5)]
    with pytest.raises(
        ConfigError, match=r"All of the first 5 runs failed, .* ValueError: no data"
    ):
        _check_failures(crashed)
    _check_failures(crashed[:4])
    # A run that diverges is not a failure of the app.
    for other in (ended(request, 5, 0.5), ended(request, 5, None, error="diverged: the metric is")):
        _check_failures([*crashed, other])


def test_folder_of_a_search_does_not_depend_on_the_time() -> None:
    with each_row() as row:
        for value, expected in FOLDERS:
            with row(value):
                config = OmegaConf.create(
                    {"hydra": {"sweep": {"dir": value}, "job": {"name": "train"}}}
                )
                assert sweep_folder(config, "mnist") == Path.cwd() / expected
                if "now" in value:
                    found = (Path.cwd() / str(config.hydra.sweep.dir)).resolve()
                    assert found == Path.cwd() / expected


def test_first_seed_is_that_of_the_app(caplog: pytest.LogCaptureFixture) -> None:
    def seed(app: dict[str, Any], key: str = "seed") -> tuple[int | None, str]:
        settings = TuneConfig(direction=Direction.minimize, seed_key=key)
        return _seed(OmegaConf.create(app), settings)

    assert seed({"seed": 7}) == (7, "seed")
    assert seed({"seed": None}) == (1, "seed")
    assert seed({"trainer": {"seed": 0}}, "trainer.seed") == (0, "trainer.seed")
    for found in ("7", True, 1.5):
        with pytest.raises(ConfigError, match=r"hydra\.sweeper\.seed_key=my\.seed must be a key"):
            seed({"my": {"seed": found}}, "my.seed")
    with caplog.at_level(logging.WARNING):
        assert seed({"lr": 1}) == (None, "seed")
    assert "Set hydra.sweeper.seed_key=KEY" in caplog.text


def test_override_with_several_values_raises_and_a_list_is_one_value() -> None:
    for override in ("optimizer.lr=1e-3,1e-2", "seed=range(3)", "x=choice(a,b)"):
        with pytest.raises(ConfigError, match="must be one value") as raised:
            _check_single(["optimizer.eps=1e-8", override])
        assert str(raised.value).startswith(f"{override} must be")
    _check_single(["optimizer.betas=[0.9,0.95]", "+model={width:8}"])


def test_hydra_overrides_are_not_in_the_result() -> None:
    assert _is_of_hydra("my/launcher@hydra.launcher=slurm")
    assert not _is_of_hydra("lightning_adam/optimizer@model.optimizer=adam")


def test_searches_are_distinguished_by_the_whole_config() -> None:
    config = OmegaConf.create({"a": {"b": 1, "c": []}, "d": {}, "e": "${a.b}", "f": "???"})
    assert _flat(config) == {"a.b": "1", "a.c": "[]", "d": "{}", "e": '"${a.b}"', "f": "???"}
