"""Where Adam's settings stand in an app's config, and what is typed to change them."""

from typing import Any

import pytest
from hydra import compose, initialize
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lightning_adam.errors import ConfigError
from lightning_adam.schema import SCHEDULERS, AdamConfig
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.point import Places, Point, find_places, read_point
from tests.tune.searching import DEFAULT

ADAM = OmegaConf.structured(AdamConfig(lr=1e-3))
COSINE = OmegaConf.structured(SCHEDULERS["cosine"]())


def config_of(**nodes: Any) -> DictConfig:
    """`model__optimizer=...` stands at model.optimizer."""
    config = OmegaConf.create({})
    for place, node in nodes.items():
        OmegaConf.update(config, place.replace("__", "."), node, force_add=True)
    return config


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
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
    ],
)
def test_configs_are_found_wherever_they_stand(nodes: dict[str, Any], expected: Places) -> None:
    assert find_places(config_of(**nodes), None) == expected


def test_of_several_optimizers_one_is_typed() -> None:
    config = config_of(
        generator__optimizer=ADAM,
        generator__scheduler=COSINE,
        critic__optimizer=ADAM,
        critic__scheduler=COSINE,
    )
    with pytest.raises(ConfigError, match=r"generator\.optimizer, critic\.optimizer; type the one"):
        find_places(config, None)
    assert find_places(config, "critic.optimizer") == Places("critic.optimizer", "critic.scheduler")
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.optimizer=generator\.optimizer$"):
        find_places(config, "discriminator.optimizer")


def test_an_app_without_an_optimizer_is_told_what_to_add() -> None:
    with pytest.raises(ConfigError, match="lightning_adam/optimizer: adamw"):
        find_places(OmegaConf.create({"seed": 0}), None)


@pytest.mark.parametrize("lr", ["???", None])
def test_a_learning_rate_is_needed_to_start_from(lr: Any) -> None:
    config = OmegaConf.create({"optimizer": {**dict(ADAM), "lr": lr}})
    with pytest.raises(ConfigError, match=r"optimizer\.lr=1e-3"):
        read_point(config, Places("optimizer"))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, 0.0),
        ({"warmup_ratio": 0.1}, 0.1),
        ({"warmup_steps": 0}, None),
        ({"warmup_steps": 9}, None),
    ],
)
def test_the_share_of_a_warm_up_in_steps_is_not_known(
    schedule: dict[str, Any], expected: float | None
) -> None:
    node = OmegaConf.merge(COSINE, schedule)
    config = config_of(optimizer=ADAM, scheduler=node)
    point = read_point(config, find_places(config, None))
    assert (point.warmup_ratio, point.warmup_steps) == (expected, schedule.get("warmup_steps"))


def test_settings_of_another_librarys_adam_are_read_as_far_as_it_has_them() -> None:
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


@settings(deadline=None, derandomize=True, max_examples=8)
@given(point=points)
def test_what_is_typed_brings_the_point_about(point: Point) -> None:
    """Through Hydra's own parser and composition, from presets to a point and nothing else."""
    defaults = ["+lightning_adam/optimizer=adamw", "+lightning_adam/scheduler=cosine"]
    places = Places("optimizer", "scheduler")
    with initialize(version_base="1.3", config_path=None):
        start = read_point(compose(overrides=defaults), places)
        typed = places.overrides(start, point)
        composed = compose(overrides=[*defaults, *typed])
    assert read_point(composed, places) == point
    assert places.overrides(point, point) == []


def test_a_warm_up_in_steps_makes_room_for_its_share() -> None:
    start = DEFAULT.with_values(warmup_ratio=None, warmup_steps=9)
    point = DIMENSIONS["warmup_ratio"].write(start, 0.1)
    assert Places("optimizer", "schedule").overrides(start, point) == [
        "schedule.warmup_steps=null",
        "schedule.warmup_ratio=0.1",
    ]


def test_every_schedule_that_warms_up_is_known_by_its_keys() -> None:
    for name, schedule in SCHEDULERS.items():
        node = OmegaConf.structured(schedule())
        found = find_places(config_of(optimizer=ADAM, scheduler=node), None)
        assert found.scheduler == ("scheduler" if "warmup_ratio" in node else None), name
