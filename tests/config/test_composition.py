"""The config groups in an app that does not import the package."""

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_adam import AdamMonitor, ConfigError
from lightning_adam.config.errors import format_override
from lightning_adam.config.monitor import Kernel, MonitorConfig, Scope
from lightning_adam.config.optimizer import (
    AdamConfig,
    CustomOptimizerConfig,
    GroupConfig,
    LayerDecayConfig,
    Resume,
    WeightDecayOn,
    parse_optimizer,
)
from lightning_adam.config.schedule import (
    SCHEDULES,
    Anneal,
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    CustomSchedulerConfig,
    Decay,
    ExponentialConfig,
    InverseSqrtConfig,
    LinearConfig,
    Mode,
    MultiStepConfig,
    OneCycleConfig,
    PlateauConfig,
    PolynomialConfig,
    SchedulerInterval,
    ThresholdMode,
    WSDConfig,
    parse_schedule,
)
from lightning_adam.monitor.settings import monitor_config
from tests.support.tables import each_row

DEFAULT_PATH = """
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


def test_presets_are_composed_at_their_default_paths(tmp_path: Path) -> None:
    cfg = composed(tmp_path, DEFAULT_PATH)
    assert set(cfg) == {"optimizer", "scheduler", "adam_monitor"}
    assert OmegaConf.to_object(cfg.optimizer) == AdamConfig(
        weight_decay=0.01, decoupled_weight_decay=True
    )
    assert OmegaConf.to_object(cfg.scheduler) == CosineConfig()
    assert OmegaConf.to_object(cfg.adam_monitor) == MonitorConfig()


def test_each_scheduler_preset_equals_its_dataclass(tmp_path: Path) -> None:
    presets = {name: kind for name, kind in SCHEDULES.items() if name != "custom"}
    assert len(presets) == 11
    with each_row() as row:
        for option, config in presets.items():
            with row(option):
                cfg = composed(tmp_path, DEFAULT_PATH, [f"lightning_adam/scheduler={option}"])
                assert OmegaConf.to_object(cfg.scheduler) == config()


def test_custom_optimizer_preset_has_the_defaults_of_its_dataclass(tmp_path: Path) -> None:
    line = ["lightning_adam/optimizer=custom", "optimizer._target_=torch.optim.NAdam"]
    cfg = composed(tmp_path, DEFAULT_PATH, [*line, "optimizer.lr=1"])
    parsed, plain = parse_optimizer(cfg.optimizer).config, CustomOptimizerConfig()
    for entry in fields(CustomOptimizerConfig):
        if entry.init:
            assert getattr(parsed, entry.name) == getattr(plain, entry.name), entry.name
            assert entry.name in cfg.optimizer, "it could not be overridden"
    assert parsed.weight_decay_on is WeightDecayOn.all


GROUP = GroupConfig(
    name="head",
    match="net.head.*",
    lr_scale=10.0,
    weight_decay=0.5,
    weight_decay_on=WeightDecayOn.matrices,
    betas=[0.5, 0.6],
    eps=1e-4,
)
LENGTH: dict[str, Any] = {"total_steps": 50, "count_skipped_steps": True}
WARMUP: dict[str, Any] = {**LENGTH, "warmup_steps": 5}
DECAY: dict[str, Any] = {**WARMUP, "min_lr_ratio": 0.1}
OVERRIDDEN: list[Any] = [
    AdamConfig(
        lr=0.5,
        betas=[0.8, 0.9],
        eps=1e-6,
        weight_decay=0.25,
        amsgrad=True,
        maximize=True,
        decoupled_weight_decay=True,
        fused=True,
        foreach=False,
        capturable=True,
        weight_decay_on=WeightDecayOn.all,
        no_decay=["*_table", "net.[ab].*"],
        groups=[GROUP],
        layer_decay=LayerDecayConfig(pattern="net.blocks.*", rate=0.5),
        resume=Resume.config,
    ),
    ConstantConfig(warmup_ratio=0.25),
    ConstantConfig(warmup_epochs=0.5),
    ConstantConfig(**WARMUP),
    LinearConfig(**DECAY),
    LinearConfig(min_lr=1e-6),
    CosineConfig(**DECAY),
    CosineRestartsConfig(**DECAY, num_cycles=3, cycle_mult=2.0),
    PolynomialConfig(**DECAY, power=2.0),
    InverseSqrtConfig(**WARMUP, timescale=7),
    ExponentialConfig(**DECAY, gamma=0.5, decay_steps=9),
    MultiStepConfig(**WARMUP, milestones=[0.5, 20.0], gamma=0.5),
    OneCycleConfig(
        **LENGTH, pct_start=0.5, div_factor=5.0, final_div_factor=10.0, anneal=Anneal.linear
    ),
    WSDConfig(**DECAY, decay_steps=9, decay=Decay.sqrt),
    WSDConfig(decay_ratio=0.3),
    PlateauConfig(
        **DECAY,
        monitor="val/acc",
        strict=False,
        mode=Mode.max,
        factor=0.5,
        patience=3,
        threshold=0.1,
        threshold_mode=ThresholdMode.abs,
        cooldown=2,
    ),
    MonitorConfig(
        every_n_steps=7,
        scopes=[Scope.layer],
        statistics=["eps_*"],
        layer_depth=2,
        worst={"grad_norm": 3},
        histograms_every_n_steps=70,
        layer_table=True,
        findings={"eps_dominates": {"threshold": 0.2}},
        stop_on=["not_finite"],
        alert=True,
        flight_recorder=20,
        kernel=Kernel.eager,
    ),
]
PARSERS: dict[str, Any] = {
    "optimizer": lambda node: parse_optimizer(node).config,
    "scheduler": lambda node: parse_schedule(node).config,
    "adam_monitor": monitor_config,
}


def changed(config: Any) -> dict[str, Any]:
    """Returns the fields that differ from their defaults."""
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    return {name: value for name, value in values.items() if value != getattr(type(config)(), name)}


def owner(config: Any, name: str) -> type:
    """Returns the class that declares a field, as several schedules share it."""
    classes = [
        each for each in type(config).__mro__ if name in vars(each).get("__annotations__", ())
    ]
    return classes[-1]


def test_every_overridden_field_is_parsed(tmp_path: Path) -> None:
    tested = {(owner(config, name), name) for config in OVERRIDDEN for name in changed(config)}
    all_fields = {
        (owner(config, entry.name), entry.name)
        for config in [*OVERRIDDEN, *(kind() for kind in SCHEDULES.values())]
        for entry in fields(config)
        if entry.name not in ("name", "_target_") and not isinstance(config, CustomSchedulerConfig)
    }
    assert all_fields == tested
    with each_row() as row:
        for config in OVERRIDDEN:
            place, preset = "scheduler", f"lightning_adam/scheduler={getattr(config, 'name', '')}"
            if isinstance(config, AdamConfig):
                place, preset = "optimizer", "lightning_adam/optimizer=adam"
            if isinstance(config, MonitorConfig):
                place, preset = "adam_monitor", "lightning_adam/monitor=default"
            with row(preset):
                pairs = changed(config).items()
                line = [format_override(f"{place}.{name}", value) for name, value in pairs]
                cfg = composed(tmp_path, DEFAULT_PATH, [preset, *shlex.split(" ".join(line))])
                assert PARSERS[place](cfg[place]) == config


def test_overridden_custom_scheduler_is_parsed(tmp_path: Path) -> None:
    line = (
        "lightning_adam/scheduler=custom scheduler._target_=torch.optim.lr_scheduler.StepLR"
        " +scheduler.step_size=5 scheduler.interval=epoch scheduler.frequency=2"
        " scheduler.monitor=val/acc scheduler.count_skipped_steps=true scheduler.strict=false"
    )
    parsed = parse_schedule(composed(tmp_path, DEFAULT_PATH, line.split()).scheduler)
    config = parsed.config
    assert isinstance(config, CustomSchedulerConfig)
    assert config.factory.keywords == {"step_size": 5}
    assert (config.interval, config.frequency) == (SchedulerInterval.epoch, 2)
    assert (config.monitor, config.count_skipped_steps, config.strict) == ("val/acc", True, False)
    assert str(parsed.path) == "scheduler"


def test_adam_preset_has_the_defaults_of_adam(tmp_path: Path) -> None:
    cfg = composed(tmp_path, DEFAULT_PATH, ["lightning_adam/optimizer=adam"])
    assert OmegaConf.to_object(cfg.optimizer) == AdamConfig()


def test_relocated_presets_are_parsed_under_their_new_name(tmp_path: Path) -> None:
    cfg = composed(tmp_path, RELOCATED, ["model.optimizer.lr=0.25"])
    assert set(cfg) == {"model", "callbacks"}
    parsed = parse_optimizer(cfg.model.optimizer)
    assert (parsed.config, str(parsed.path)) == (AdamConfig(lr=0.25), "model.optimizer")
    assert str(parse_schedule(cfg.model.scheduler).path) == "model.scheduler"
    assert isinstance(instantiate(cfg.callbacks.adam_monitor), AdamMonitor)


def test_recursive_instantiate_does_not_change_the_optimizer_config(tmp_path: Path) -> None:
    model = instantiate(composed(tmp_path, RELOCATED).model)
    assert parse_optimizer(model.optimizer).config == AdamConfig()


def test_preset_can_be_used_twice_in_one_config(tmp_path: Path) -> None:
    cfg = composed(tmp_path, TWICE, ["discriminator.betas=[0.5,0.9]"])
    assert (cfg.generator.lr, cfg.discriminator.lr) == (1e-4, 1e-3)
    assert (cfg.generator.betas, cfg.discriminator.betas) == ([0.9, 0.999], [0.5, 0.9])
    assert (cfg.generator.weight_decay, cfg.discriminator.weight_decay) == (0.0, 0.01)


PLACES = {"optimizer": DEFAULT_PATH, "model.optimizer": RELOCATED, "discriminator": TWICE}
TYPOS = {
    "lrr=1": "Key 'lrr' not in 'AdamConfig'",
    "lr=abc": "Value 'abc' of type 'str' could not be converted to Float",
    "betas=0.9": "float is not a ListConfig, (list or tuple|TupleConfig, list, or tuple)",
    "betas=[a,b]": "could not be converted to Float",
    "weight_decay_on=biases": r"expected one of \[matrices, all\]",
    "fused=often": "not a valid bool",
}


def test_typos_and_wrong_types_are_errors_of_the_composition(tmp_path: Path) -> None:
    with each_row() as row:
        for (place, config), (override, expected) in itertools.product(
            PLACES.items(), TYPOS.items()
        ):
            with row(f"{place}.{override}"):
                with pytest.raises(HydraException) as invalid:
                    composed(tmp_path, config, [f"{place}.{override}"])
                messages = f"{invalid.value} {invalid.value.__cause__}"
                assert re.search(expected, messages)
                assert place in messages


def test_values_before_the_preset_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(HydraException):
        composed(tmp_path, SELF_FIRST, ["optimizer.lr=abc"])


def test_added_key_is_an_error_when_it_is_parsed(tmp_path: Path) -> None:
    cfg = composed(tmp_path, DEFAULT_PATH, ["+optimizer.nesterov=true"])
    with pytest.raises(ConfigError, match=r"^optimizer\.nesterov=true is not a setting\. "):
        parse_optimizer(cfg.optimizer)
