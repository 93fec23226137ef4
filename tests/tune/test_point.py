"""Where Adam's settings stand in an app's config, and the overrides that change them."""

from typing import Any

import pytest
from hydra import compose, initialize
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.config.schedule import SCHEDULES
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.point import Places, Point, find_places, read_point
from tests.support.tables import each_row
from tests.tune.searching import DEFAULT

ADAM = OmegaConf.structured(AdamConfig(lr=1e-3))
COSINE = OmegaConf.structured(SCHEDULES["cosine"]())


def config_of(**nodes: Any) -> DictConfig:
    """`model__optimizer=...` stands at model.optimizer."""
    config = OmegaConf.create({})
    for place, node in nodes.items():
        OmegaConf.update(config, place.replace("__", "."), node, force_add=True)
    return config


FOUND: list[tuple[dict[str, Any], Places]] = [
    ({"optimizer": ADAM}, Places("optimizer")),
    ({"optimizer": ADAM, "scheduler": COSINE}, Places("optimizer", "scheduler")),
    (
        {"model__optimizer": ADAM, "lr__schedule": COSINE},
        Places("model.optimizer", "lr.schedule"),
    ),
    # The schedule beside the optimizer is its own, of others it is not guessed.
    (
        {"a__optimizer": ADAM, "a__scheduler": COSINE, "b__scheduler": COSINE},
        Places("a.optimizer", "a.scheduler"),
    ),
    (
        {"a__optimizer": ADAM, "b__scheduler": COSINE, "c__scheduler": COSINE},
        Places("a.optimizer"),
    ),
    ({"optimizer": ADAM, "data": {"lr": 1, "name": "x"}, "other": None}, Places("optimizer")),
    ({"optimizer": ADAM, "again": "${optimizer}", "unset": "???"}, Places("optimizer")),
]
"""The nodes of a config, and where its optimizer and scheduler are found."""


def test_optimizer_and_scheduler_are_found_wherever_they_stand() -> None:
    with each_row() as row:
        for nodes, expected in FOUND:
            with row(list(nodes)):
                assert find_places(config_of(**nodes), None) == expected


def test_one_of_several_optimizers_is_chosen_by_an_override() -> None:
    config = config_of(
        generator__optimizer=ADAM,
        generator__scheduler=COSINE,
        critic__optimizer=ADAM,
        critic__scheduler=COSINE,
    )
    with pytest.raises(ConfigError, match=r"generator\.optimizer, critic\.optimizer\. Choose one"):
        find_places(config, None)
    assert find_places(config, "critic.optimizer") == Places("critic.optimizer", "critic.scheduler")
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.optimizer=generator\.optimizer$"):
        find_places(config, "discriminator.optimizer")


def test_app_without_an_optimizer_raises_and_suggests_one() -> None:
    with pytest.raises(ConfigError, match="lightning_adam/optimizer: adamw"):
        find_places(OmegaConf.create({"seed": 0}), None)


def test_missing_learning_rate_raises() -> None:
    for lr in ("???", None):
        config = OmegaConf.create({"optimizer": {**dict(ADAM), "lr": lr}})
        with pytest.raises(ConfigError, match=r"optimizer\.lr=1e-3"):
            read_point(config, Places("optimizer"))


def test_warmup_ratio_is_unknown_where_warmup_is_set_in_steps() -> None:
    for schedule, expected in (
        ({}, (0.0, None)),
        ({"warmup_ratio": 0.1}, (0.1, None)),
        ({"warmup_steps": 0}, (None, 0)),
        ({"warmup_steps": 9}, (None, 9)),
    ):
        config = config_of(optimizer=ADAM, scheduler=OmegaConf.merge(COSINE, schedule))
        point = read_point(config, find_places(config, None))
        assert (point.warmup_ratio, point.warmup_steps) == expected


def test_settings_of_a_foreign_adam_are_read_as_far_as_it_has_them() -> None:
    node = {"_target_": "some.Adam", "lr": 1, "weight_decay_on": "all", "groups": []}
    node |= {"layer_decay": {}, "resume": "checkpoint"}
    point = read_point(OmegaConf.create({"optimizer": node}), Places("optimizer"))
    assert point == Point(lr=1.0)


positive = st.floats(1e-12, 10, allow_nan=False)
share = st.floats(0, 0.9999)
points = st.builds(
    Point,
    lr=positive,
    betas=st.tuples(share, share),
    eps=positive,
    weight_decay=positive,
    decoupled_weight_decay=st.booleans(),
    amsgrad=st.booleans(),
    warmup_ratio=share,
)


DEFAULTS = ("+lightning_adam/optimizer=adamw", "+lightning_adam/scheduler=cosine")
PLACES = Places("optimizer", "scheduler")


@pytest.fixture(scope="module")
def preset() -> Point:
    with initialize(version_base="1.3", config_path=None):
        return read_point(compose(overrides=[*DEFAULTS]), PLACES)


@settings(deadline=None, derandomize=True, max_examples=3)
@given(point=points)
def test_overrides_of_a_point_compose_to_that_point(preset: Point, point: Point) -> None:
    """Through Hydra's own parser and composition, from the presets."""
    overrides = PLACES.overrides(preset, point)
    with initialize(version_base="1.3", config_path=None):
        composed = compose(overrides=[*DEFAULTS, *overrides])
    assert read_point(composed, PLACES) == point
    assert PLACES.overrides(point, point) == []


def test_warmup_in_steps_is_replaced_by_a_ratio() -> None:
    start = DEFAULT.with_values(warmup_ratio=None, warmup_steps=9)
    point = DIMENSIONS["warmup_ratio"].write(start, 0.1)
    assert Places("optimizer", "schedule").overrides(start, point) == [
        "schedule.warmup_steps=null",
        "schedule.warmup_ratio=0.1",
    ]


def test_every_schedule_with_warmup_is_recognized() -> None:
    with initialize(version_base="1.3", config_path=None):
        for name in SCHEDULES:
            config = compose(overrides=[DEFAULTS[0], f"+lightning_adam/scheduler={name}"])
            expected = "scheduler" if "warmup_ratio" in config.scheduler else None
            assert find_places(config, None).scheduler == expected, name
