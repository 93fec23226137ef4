"""The paths of Adam's hyperparameters in an app's config, and the overrides that change them."""

from dataclasses import replace
from typing import Any

import pytest
from hydra import compose, initialize
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.config.schedule import SCHEDULES
from lightning_adam.tune.configuration import (
    ConfigPaths,
    Configuration,
    find_paths,
    read_configuration,
)
from tests.support.tables import each_row

ADAM = OmegaConf.structured(AdamConfig(lr=1e-3))
COSINE = OmegaConf.structured(SCHEDULES["cosine"]())
GROUPS = ("+lightning_adam/optimizer=adamw", "+lightning_adam/scheduler=cosine")
PATHS = ConfigPaths("optimizer", "scheduler")


def config_of(**nodes: Any) -> DictConfig:
    """Returns a config; `model__optimizer=...` sets model.optimizer."""
    config = OmegaConf.create({})
    for path, node in nodes.items():
        OmegaConf.update(config, path.replace("__", "."), node, force_add=True)
    return config


FOUND: list[tuple[dict[str, Any], ConfigPaths]] = [
    ({"optimizer": ADAM}, ConfigPaths("optimizer")),
    ({"optimizer": ADAM, "scheduler": COSINE}, PATHS),
    (
        {"model__optimizer": ADAM, "lr__schedule": COSINE},
        ConfigPaths("model.optimizer", "lr.schedule"),
    ),
    # Of several schedules, only the one next to the optimizer belongs to it.
    (
        {"a__optimizer": ADAM, "a__scheduler": COSINE, "b__scheduler": COSINE},
        ConfigPaths("a.optimizer", "a.scheduler"),
    ),
    (
        {"a__optimizer": ADAM, "b__scheduler": COSINE, "c__scheduler": COSINE},
        ConfigPaths("a.optimizer"),
    ),
    ({"optimizer": ADAM, "again": "${optimizer}", "unset": "???"}, ConfigPaths("optimizer")),
]
"""The nodes of a config, and the paths of its optimizer and schedule."""


def test_optimizer_and_schedule_are_found_at_any_path() -> None:
    with each_row() as row:
        for nodes, expected in FOUND:
            with row(list(nodes)):
                assert find_paths(config_of(**nodes), None) == expected


def test_partial_node_of_a_torch_optimizer_is_tuned_with_its_defaults() -> None:
    rows = [
        ("torch.optim.Adam", 0.0, False, False),
        ("torch.optim.AdamW", 0.01, True, False),
        ("torch.optim.NAdam", 0.0, False, None),
    ]
    with each_row() as row:
        for target, decay, is_decoupled, amsgrad in rows:
            with row(target):
                node = {"_target_": target, "_partial_": True, "lr": 0.01, "eps": 1e-6}
                config = OmegaConf.create({"model": {"optim": node}})
                paths = find_paths(config, None)
                assert paths.optimizer == "model.optim"
                start = read_configuration(config, paths)
                expected = Configuration(0.01, (0.9, 0.999), 1e-6, decay, is_decoupled, amsgrad)
                assert start == expected
                # An argument that the node does not set is added.
                other = replace(start, eps=1e-5, betas=(0.8, 0.99))
                assert paths.overrides(start, other) == [
                    "++model.optim.betas=[0.8,0.99]",
                    "model.optim.eps=1e-05",
                ]


def test_one_of_several_optimizers_is_chosen_by_an_override() -> None:
    config = config_of(generator__optimizer=ADAM, critic__optimizer=ADAM, critic__scheduler=COSINE)
    with pytest.raises(ConfigError, match=r"generator\.optimizer, critic\.optimizer\. Choose one"):
        find_paths(config, None)
    found = find_paths(config, "critic.optimizer")
    assert found == ConfigPaths("critic.optimizer", "critic.scheduler")
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.optimizer=generator\.optimizer$"):
        find_paths(config, "discriminator.optimizer")


def test_config_without_an_adam_names_the_package_of_another_optimizer() -> None:
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    rows: list[tuple[dict[str, Any], str]] = [
        ({"seed": 0}, "`- lightning_adam/optimizer: adamw`"),
        ({"model": {"optimizer": sgd}}, "`- lightning_adam/optimizer@model.optimizer: adamw`"),
        ({"optimizer": {"_target_": "gone.Adam"}}, "`- lightning_adam/optimizer@optimizer: adamw`"),
    ]
    with each_row() as row:
        for nodes, line in rows:
            with row(nodes), pytest.raises(ConfigError, match=line):
                find_paths(OmegaConf.create(nodes), None)


def test_missing_learning_rate_raises() -> None:
    for lr in ("???", None):
        config = OmegaConf.create({"optimizer": {**dict(ADAM), "lr": lr}})
        with pytest.raises(ConfigError, match=r"optimizer\.lr=1e-3"):
            read_configuration(config, ConfigPaths("optimizer"))


def test_warmup_is_read_in_its_configured_unit() -> None:
    for schedule, expected in (
        ({}, (0.0, None)),
        ({"warmup_ratio": 0.1}, (0.1, None)),
        ({"warmup_steps": 0}, (None, 0)),
        ({"warmup_steps": 9}, (None, 9)),
    ):
        config = config_of(optimizer=ADAM, scheduler=OmegaConf.merge(COSINE, schedule))
        start = read_configuration(config, PATHS)
        assert (start.warmup_ratio, start.warmup_steps) == expected


def test_every_schedule_with_warmup_is_recognized() -> None:
    for name, schedule in SCHEDULES.items():
        # OmegaConf does not support the type of `factory`.
        fields = {"name": "custom"} if name == "custom" else OmegaConf.structured(schedule)
        config = config_of(optimizer=ADAM, scheduler=fields)
        expected = "scheduler" if "warmup_ratio" in config.scheduler else None
        assert find_paths(config, None).scheduler == expected, name


@pytest.fixture(scope="module")
def preset() -> Configuration:
    with initialize(version_base="1.3", config_path=None):
        return read_configuration(compose(overrides=[*GROUPS]), PATHS)


positive = st.floats(1e-12, 10, allow_nan=False)
share = st.floats(0, 0.9999)


@settings(deadline=None, derandomize=True, max_examples=3)
@given(
    configuration=st.builds(
        Configuration,
        lr=positive,
        betas=st.tuples(share, share),
        eps=positive,
        weight_decay=positive,
        decoupled_weight_decay=st.booleans(),
        amsgrad=st.booleans(),
        warmup_ratio=share,
    )
)
def test_overrides_compose_to_the_configuration(
    preset: Configuration, configuration: Configuration
) -> None:
    """The overrides are parsed and composed by Hydra, with the presets."""
    overrides = PATHS.overrides(preset, configuration)
    with initialize(version_base="1.3", config_path=None):
        composed = compose(overrides=[*GROUPS, *overrides])
    assert read_configuration(composed, PATHS) == configuration
    assert PATHS.overrides(configuration, configuration) == []
