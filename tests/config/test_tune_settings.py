"""The settings of `hydra/sweeper=adam_tune`: defaults and invalid values."""

import re
from typing import Any

import pytest

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.tune import Direction, Range, SpaceConfig, TuneConfig, parse_tune
from tests.support.tables import each_row

GIVEN = {"direction": "minimize", "study_name": "mnist"}


def test_missing_settings_have_their_defaults() -> None:
    given = {"lr": {"low": 1e-5, "high": 0.5}, "beta1": None}
    config = parse_tune({**GIVEN, "n_trials": 7, "space": given})
    space = SpaceConfig(lr=Range(1e-5, 0.5), beta1=None)
    expected = TuneConfig(direction=Direction.minimize, study_name="mnist", n_trials=7, space=space)
    assert config.config == expected


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"direction": None}, "Set hydra.sweeper.direction=minimize or hydra.sweeper.direction="),
    ({"direction": "down"}, "hydra.sweeper.direction=down"),
    ({"study_name": " "}, 'study_name=" " must not be empty'),
    ({"n_trials": 0}, "hydra.sweeper.n_trials=0"),
    ({"stages": {}}, "hydra.sweeper.stages"),
    ({"space": {"lr": {"low": 0.1}}}, "hydra.sweeper.space.lr.high is required. Set"),
    ({"space": {"lr": {"low": 0.0, "high": 0.1}}}, "hydra.sweeper.space.lr.low=0.0 must be above"),
    ({"space": {"lr": {"low": 0.1, "high": 0.1}}}, "hydra.sweeper.space.lr.low=0.1 must be less"),
    ({"space": {"beta2": {"low": 0.9, "high": 1.0}}}, "space.beta2.high=1.0 must be below 1"),
    ({"space": {"dropout": {"low": 0.1, "high": 0.5}}}, "hydra.sweeper.space.dropout"),
]


def test_invalid_settings_are_named() -> None:
    with each_row() as row:
        for changes, sentence in INVALID:
            with row(changes), pytest.raises(ConfigError, match=re.escape(sentence)):
                parse_tune({**GIVEN, **changes})
    warmup = {"warmup_ratio": {"low": 0.0, "high": 0.1}}
    assert parse_tune({**GIVEN, "space": warmup}).config.space.warmup_ratio == Range(0.0, 0.1)
