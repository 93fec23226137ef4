"""The sweeper's config: an invalid value is an error with a suggestion, valid ones make a plan."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.tune import StageConfig
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.plan import build_stage
from lightning_adam.tune.point import Point
from tests.support.tables import each_row
from tests.tune.searching import DEFAULT, plan_of, shipped_stages

INVALID_STAGES: list[tuple[dict[str, Any], str]] = [
    ({"share": 0}, "share=0 must be above 0. Use for example hydra.sweeper.stages.it.share=1"),
    (
        {"space": {"momentum": [0.9]}},
        "space.momentum is not a hyperparameter of the search. Use lr, ",
    ),
    (
        {"space": {"beta_1": [0.9]}},
        "space.beta_1 is not a hyperparameter of the search. Did you mean beta1?",
    ),
    (
        {"space": {"lr": {"low": 1e-3}}},
        "space.lr={low:0.001} must be {low: ..., high: ...} or a list",
    ),
    ({"space": {"lr": {"low": 1e-2, "high": 1e-3}}}, "space.lr.low=0.01 must be less than high"),
    ({"space": {"lr": {"low": "a", "high": 1e-3}}}, "space.lr.low=a must be a number above 0"),
    ({"space": {"lr": [True]}}, "space.lr=[true] has true, which must be a number above 0"),
    (
        {"space": {"beta1": [0.9, 1.0]}},
        "space.beta1=[0.9,1.0] has 1.0, which must be a number above 0 and below 1",
    ),
    (
        {"space": {"beta2": {"low": 0.9, "high": 1}}},
        "beta2.high=1 must be a number above 0 and below 1",
    ),
    (
        {"space": {"amsgrad": {"low": 0, "high": 1}}},
        "space.amsgrad={low:0,high:1} must be a list of true and false",
    ),
    ({"space": {"amsgrad": [0, 1]}}, "space.amsgrad=[0,1] has 0, which must be true or false"),
    ({"space": {"amsgrad": []}}, "space.amsgrad=[] must be a list of true and false"),
    ({"space": {"lr": []}}, "space.lr=[] must be {low: ..., high: ...} or a list"),
    ({"space": {"lr": [0]}}, "Use for example 'hydra.sweeper.stages.it.space.lr=[0.001]'"),
    ({"try_first": [{"beta3": 0.9}]}, "try_first.beta3 is not a hyperparameter of the search"),
    ({"try_first": [{"lr": 0}]}, "'hydra.sweeper.stages.it.try_first=[{lr:0.001}]'"),
    ({"try_first": [{"lr": "beta1"}]}, "try_first.lr=beta1 must be a number above 0"),
    ({"try_first": [{"amsgrad": 1}]}, "try_first.amsgrad=1 must be true or false"),
]
INVALID_SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"direction": None}, "Set hydra.sweeper.direction=minimize or hydra.sweeper.direction="),
    (
        {"n_trials": 0},
        "hydra.sweeper.n_trials=0 must be at least 1. Use for example hydra.sweeper.n_trials=40",
    ),
    (
        {"n_seeds": 0},
        "hydra.sweeper.n_seeds=0 must be at least 1. Use for example hydra.sweeper.n_seeds=2",
    ),
    (
        {"n_jobs": -1},
        "hydra.sweeper.n_jobs=-1 must be at least 1. Use for example hydra.sweeper.n_jobs=1",
    ),
    ({"study_name": " "}, 'hydra.sweeper.study_name=" " must not be empty. Use'),
    (
        {"stages": {"start": {}}},
        "hydra.sweeper.stages.start is the name of the run with the app's own settings",
    ),
]


def test_invalid_stage_raises() -> None:
    with each_row() as row:
        for stage, sentence in INVALID_STAGES:
            with row(stage):
                with pytest.raises(ConfigError) as raised:
                    plan_of({"it": stage})
                assert sentence in str(raised.value)
                assert "hydra.sweeper.stages.it." in str(raised.value)


def test_invalid_search_raises() -> None:
    with each_row() as row:
        for changes, sentence in INVALID_SEARCHES:
            with row(changes):
                with pytest.raises(ConfigError) as raised:
                    plan_of(**changes)
                assert sentence in str(raised.value)


def test_dimension_that_is_switched_off_is_left_out() -> None:
    stages = shipped_stages()
    stages["lr"]["space"]["lr"] = None
    plan = plan_of(stages, n_trials=12)
    assert [stage.name for stage in plan.stages] == ["beta1", "warmup"]
    assert set(plan.too_large) == {"beta2", "eps", "weight_decay", "amsgrad"}


def test_zero_is_accepted_for_weight_decay_and_beta1() -> None:
    config = StageConfig(space={"weight_decay": [0, 0.1]}, try_first=[{"beta1": 0}])
    stage = build_stage("it", config)
    assert [each.betas for each in stage.first_points(DEFAULT)] == [(0, 0.999)]
    assert stage.alternatives(DEFAULT) is not None


def test_first_point_of_a_missing_setting_is_left_out() -> None:
    space = {"lr": {"low": 1e-4, "high": 1e-2}}
    first: list[dict[str, Any]] = [
        {"beta1": 0.5},
        {"beta2": "beta1"},
        {"amsgrad": True},
        {"lr": 1e-2},
    ]
    stage = build_stage("it", StageConfig(space=space, try_first=first))
    assert stage.first_points(Point(lr=1e-3)) == [Point(lr=1e-2)]
    assert len(stage.first_points(DEFAULT)) == 4


def test_suggested_value_is_accepted() -> None:
    with each_row() as row:
        for name, dimension in DIMENSIONS.items():
            with row(name):
                example = dimension.example
                assert dimension.allows(example)
                space = {name: [example]}
                stage = build_stage("it", StageConfig(space=space, try_first=[{name: example}]))
                assert stage.space == space
                if not dimension.is_switch:
                    ends = {"low": example / 10, "high": example}
                    assert build_stage("it", StageConfig(space={name: ends})).space == {name: ends}


def test_every_combination_of_lists_is_tried_once() -> None:
    space = {"amsgrad": [False, True], "weight_decay": [0.01, 0.1]}
    stage = build_stage("it", StageConfig(space=space, try_first=[{"amsgrad": True}]))
    found = stage.alternatives(DEFAULT)
    assert found is not None
    assert DEFAULT not in found
    assert [(each.amsgrad, each.weight_decay) for each in found] == [
        (True, 0.01),
        (False, 0.1),
        (True, 0.1),
    ]
    config = StageConfig(space={**space, "lr": {"low": 1, "high": 2}})
    assert build_stage("it", config).alternatives(DEFAULT) is None


@settings(deadline=None, derandomize=True, max_examples=40)
@given(n_trials=st.integers(1, 200), n_seeds=st.integers(1, 5), left=st.integers(0, 200))
def test_budgets_of_stages_add_up_to_what_is_left(n_trials: int, n_seeds: int, left: int) -> None:
    plan = plan_of(n_trials=n_trials, n_seeds=n_seeds)
    used = 0
    for place, stage in enumerate(plan.stages):
        part = plan.part_of(stage, plan.stages[place + 1 :], DEFAULT, left - used)
        assert part == 0 or part >= n_seeds
        used += part
    assert used <= left
    # Little is left over where the first stages can use it all.
    assert used >= left - n_seeds or not any("lr" in each.space for each in plan.stages)
