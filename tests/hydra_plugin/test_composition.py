"""Our groups in an app that imports nothing of ours: present, typed, relocatable, repeatable."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_adam import AdamMonitor, ConfigError, schema
from lightning_adam.reading import read_optimizer, read_scheduler

DEFAULT_PLACE = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: cosine
  - lightning_adam/monitor: default
  - _self_
"""
RELOCATED = """
defaults:
  - lightning_adam/optimizer@model.optimizer: adam
  - lightning_adam/scheduler@model.scheduler: linear
  - lightning_adam/monitor@callbacks.adam_monitor: default
  - _self_
model: {width: 3}
"""
TWICE = """
defaults:
  - lightning_adam/optimizer@generator: adam
  - lightning_adam/optimizer@discriminator: adamw
  - _self_
generator: {lr: 1e-4}
"""
SELF_FIRST = """
defaults:
  - _self_
  - lightning_adam/optimizer: adamw
optimizer: {lr: 0.5}
"""


def composed(folder: Path, config: str, overrides: Sequence[str] = ()) -> DictConfig:
    (folder / "config.yaml").write_text(config)
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_the_presets_stand_at_their_default_places(tmp_path: Path) -> None:
    cfg = composed(tmp_path, DEFAULT_PLACE)
    assert set(cfg) == {"optimizer", "scheduler", "adam_monitor"}
    assert OmegaConf.to_object(cfg.optimizer) == schema.AdamConfig(
        weight_decay=0.01, decoupled_weight_decay=True
    )
    assert OmegaConf.to_object(cfg.scheduler) == schema.CosineConfig()
    assert OmegaConf.to_object(cfg.adam_monitor) == schema.MonitorConfig()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("constant", schema.ConstantConfig()),
        ("linear", schema.LinearConfig()),
        ("cosine", schema.CosineConfig()),
        ("polynomial", schema.PolynomialConfig()),
        ("inverse_sqrt", schema.InverseSqrtConfig()),
        ("wsd", schema.WSDConfig()),
        ("plateau", schema.PlateauConfig()),
    ],
)
def test_each_scheduler_preset(tmp_path: Path, option: str, expected: object) -> None:
    cfg = composed(tmp_path, DEFAULT_PLACE, [f"lightning_adam/scheduler={option}"])
    assert OmegaConf.to_object(cfg.scheduler) == expected


def test_adam_differs_from_adamw_in_the_decay(tmp_path: Path) -> None:
    cfg = composed(tmp_path, DEFAULT_PLACE, ["lightning_adam/optimizer=adam"])
    assert OmegaConf.to_object(cfg.optimizer) == schema.AdamConfig()


def test_relocated_they_are_read_under_their_new_name(tmp_path: Path) -> None:
    cfg = composed(tmp_path, RELOCATED, ["model.optimizer.lr=0.25"])
    assert set(cfg) == {"model", "callbacks"}
    config, where = read_optimizer(cfg.model.optimizer)
    assert (config, where) == (schema.AdamConfig(lr=0.25), "model.optimizer")
    assert read_scheduler(cfg.model.scheduler)[1] == "model.scheduler"
    assert isinstance(instantiate(cfg.callbacks.adam_monitor), AdamMonitor)


def test_a_recursive_instantiate_hands_the_optimizer_over_untouched(tmp_path: Path) -> None:
    model = instantiate(composed(tmp_path, RELOCATED).model)
    assert read_optimizer(model.optimizer)[0] == schema.AdamConfig()


def test_twice_in_one_config(tmp_path: Path) -> None:
    cfg = composed(tmp_path, TWICE, ["discriminator.betas=[0.5,0.9]"])
    assert (cfg.generator.lr, cfg.discriminator.lr) == (1e-4, 1e-3)
    assert (cfg.generator.betas, cfg.discriminator.betas) == ([0.9, 0.999], [0.5, 0.9])
    assert (cfg.generator.weight_decay, cfg.discriminator.weight_decay) == (0.0, 0.01)


@pytest.mark.parametrize(
    ("config", "place"),
    [(DEFAULT_PLACE, "optimizer"), (RELOCATED, "model.optimizer"), (TWICE, "discriminator")],
    ids=["default", "relocated", "twice"],
)
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lrr=1", "Key 'lrr' not in 'AdamConfig'"),
        ("lr=abc", "Value 'abc' of type 'str' could not be converted to Float"),
        ("betas=0.9", "float is not a ListConfig, (list or tuple|TupleConfig, list, or tuple)"),
        ("betas=[a,b]", "could not be converted to Float"),
        ("weight_decay_on=biases", r"expected one of \[matrices, all\]"),
        ("fused=often", "not a valid bool"),
    ],
)
def test_typos_and_wrong_types_fail_at_composition(
    tmp_path: Path, config: str, place: str, override: str, expected: str
) -> None:
    with pytest.raises(HydraException) as refused:
        composed(tmp_path, config, [f"{place}.{override}"])
    messages = f"{refused.value} {refused.value.__cause__}"
    assert re.search(expected, messages)
    assert place in messages


def test_values_before_our_preset_are_typed_too(tmp_path: Path) -> None:
    with pytest.raises(HydraException):
        composed(tmp_path, SELF_FIRST, ["optimizer.lr=abc"])


def test_a_key_added_by_force_is_refused_when_it_is_read(tmp_path: Path) -> None:
    cfg = composed(tmp_path, DEFAULT_PLACE, ["+optimizer.nesterov=true"])
    with pytest.raises(ConfigError, match="nesterov=true: no such field"):
        read_optimizer(cfg.optimizer)
