"""Parsing of configs in any form: valid values, and the message of every error."""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from omegaconf import OmegaConf

from lightning_adam import ConfigError
from lightning_adam.config.errors import ConfigPath, Source
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.optimizer import (
    AdamConfig,
    GroupConfig,
    LayerDecayConfig,
    WeightDecayOn,
    parse_optimizer,
)
from lightning_adam.config.parsing import Limits, ParsedConfig
from lightning_adam.config.schedule import SCHEDULES, CosineConfig, parse_schedule
from lightning_adam.monitor.settings import monitor_config
from tests.support.tables import each_row

SETTINGS = {"lr": 0.02, "betas": [0.8, 0.9], "weight_decay_on": "all", "fused": False}


def test_every_form_is_parsed_equally() -> None:
    expected = AdamConfig(lr=0.02, betas=[0.8, 0.9], weight_decay_on=WeightDecayOn.all, fused=False)
    forms = {
        "dict": SETTINGS,
        "dataclass": expected,
        "DictConfig": OmegaConf.create(SETTINGS),
        "typed node": OmegaConf.merge(OmegaConf.structured(AdamConfig), SETTINGS),
    }
    with each_row() as row:
        for name, node in forms.items():
            with row(name):
                parsed = parse_optimizer(node)
                assert (parsed.config, str(parsed.path)) == (expected, "optimizer")
                assert parsed.path.source is Source.PYTHON


def test_missing_value_is_named_with_its_path() -> None:
    root = OmegaConf.create({"model": {"optimizer": {"lr": "???"}}})
    cli = ConfigPath("model.optimizer", source=Source.LIGHTNING_CLI)
    table: list[tuple[Any, ConfigPath | None, str]] = [
        (root.model.optimizer, None, "cfg.model.optimizer.lr"),
        ({"lr": "???"}, cli, "--model.optimizer.lr"),
        ({"layer_decay": {"rate": "???"}}, cli, "--model.optimizer.layer_decay.rate"),
        ({"_target_": "torch.optim.NAdam", "optimizer_lr": "???"}, None, "optimizer_lr"),
    ]
    with each_row() as row:
        for node, path, name in table:
            with row(name):
                with pytest.raises(ConfigError) as raised:
                    parse_optimizer(node, path)
                assert str(raised.value) == f"{name} is required. Set {name}=VALUE"


def test_parsed_config_is_returned_as_it_is() -> None:
    optimizer, schedule = parse_optimizer(SETTINGS), parse_schedule({"name": "cosine"})
    assert isinstance(optimizer, ParsedConfig)
    assert parse_optimizer(optimizer) is optimizer
    assert parse_schedule(schedule) is schedule


def test_interpolations_are_resolved_in_the_whole_config() -> None:
    root = OmegaConf.create({"peak": 0.5, "model": {"optimizer": {"lr": "${peak}"}}})
    parsed = parse_optimizer(root.model.optimizer)
    assert (parsed.config, str(parsed.path)) == (AdamConfig(lr=0.5), "model.optimizer")
    assert parsed.path.source is Source.OMEGACONF


def test_integers_become_floats() -> None:
    config = parse_optimizer({"lr": 1, "betas": [0, 0.9], "weight_decay": 0}).config
    assert isinstance(config, AdamConfig)
    assert [type(each) for each in (config.lr, *config.betas, config.weight_decay)] == [float] * 4


INVALID_OPTIMIZERS: list[tuple[dict[str, Any], str, str]] = [
    ({"lr": 0}, "lr=0 must be above 0", "lr=0.001"),
    ({"lr": -1e-3}, "lr=-0.001 must be above 0", "lr=0.001"),
    ({"lr": float("nan")}, "lr=nan must be a finite number", "lr=0.001"),
    ({"lr": float("inf")}, "lr=inf must be a finite number", "lr=0.001"),
    ({"lr": "fast"}, "lr='fast' must be a number", "lr=0.001"),
    ({"lr": True}, "lr=True must be a number", "lr=0.001"),
    ({"lr": None}, "lr=None must be a number", "lr=0.001"),
    ({"lr": [1]}, "lr=[1] must be a number", "lr=0.001"),
    ({"betas": [0.9]}, "betas=[0.9] must have at least 2 items", "betas=[0.9, 0.999]"),
    (
        {"betas": [0.9, 1.0]},
        "betas=[0.9, 1.0] has 1.0, which must be below 1",
        "betas=[0.9, 0.999]",
    ),
    (
        {"betas": [-0.1, 0.9]},
        "betas=[-0.1, 0.9] has -0.1, which must be at least 0",
        "betas=[0.9, 0.999]",
    ),
    (
        {"betas": [0.9, 0.99, 0.999]},
        "betas=[0.9, 0.99, 0.999] must have at most 2 items",
        "betas=[0.9, 0.999]",
    ),
    ({"betas": 0.9}, "betas=0.9 must be a list", "betas=[0.9, 0.999]"),
    (
        {"betas": ["a", 0.9]},
        "betas=['a', 0.9] has 'a', which must be a number",
        "betas=[0.9, 0.999]",
    ),
    ({"eps": 0}, "eps=0 must be above 0", "eps=1e-08"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0", "weight_decay=0.01"),
    (
        {"weight_decay": float("inf")},
        "weight_decay=inf must be a finite number",
        "weight_decay=0.01",
    ),
    (
        {"weight_decay_on": "biases"},
        "weight_decay_on='biases' must be 'matrices' or 'all'",
        "weight_decay_on='matrices'",
    ),
    ({"no_decay": "bias"}, "no_decay='bias' must be a list", "no_decay=['*_token', '*pos_embed*']"),
    (
        {"no_decay": ["bias"], "weight_decay_on": "all"},
        "no_decay=['bias'] has no effect with weight_decay_on='all'",
        "weight_decay_on='matrices'",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "weight_decay_on": "biases"}]},
        "groups.0.weight_decay_on='biases' must be 'matrices' or 'all'",
        "groups.0.weight_decay_on='matrices'",
    ),
    ({"resume": "cofnig"}, "resume='cofnig' must be 'checkpoint' or 'config'", "resume='config'"),
    ({"amsgrad": "perhaps"}, "amsgrad='perhaps' must be a boolean", "amsgrad=False"),
    ({"lr": "???"}, "lr is required", "Set lr=VALUE"),
    ({"lr": "${peak}"}, "lr cannot be resolved: Interpolation key 'peak' not found", "Set lr="),
    (
        {"fused": True, "foreach": True},
        "foreach=True cannot be combined with fused=True",
        "foreach=None",
    ),
    ({"beta": [0.9, 0.99]}, "beta=[0.9, 0.99] is not a setting", "betas=[0.9, 0.99]"),
    (
        {"groups": {"head": {}}},
        "groups={'head': {}} must be a list",
        "groups=[{'name': 'head', 'match': 'net.head.*', 'lr_scale': 10}]",
    ),
    ({"groups": [{"match": "*"}]}, "groups.0.name is required", "Set groups.0.name=VALUE"),
    (
        {"groups": [{"name": "head"}]},
        "groups.0 (head) needs exactly one of match, regex, module_class, not none",
        "groups.0.match='net.head.*'",
    ),
    (
        {"groups": [{"name": "head", "match": "*", "regex": "."}]},
        "groups.0 (head) needs exactly one of match, regex, module_class, not match and regex",
        "groups.0.regex=None",
    ),
    (
        {"groups": [{"name": "head", "regex": "("}]},
        "groups.0.regex='(' is not a regular expression: missing )",
        r"groups.0.regex='head\\.'",
    ),
    (
        {"groups": [{"name": "a", "match": "*"}, {"name": "b", "match": "*", "lr_scale": 0}]},
        "groups.1.lr_scale=0 must be above 0",
        "groups.1.lr_scale=0.1",
    ),
    (
        {"groups": [{"name": "a", "match": "*"}, {"name": "a", "match": "b"}]},
        "groups.1.name='a' is already used by one of the groups decay, no_decay, a, a_no_decay",
        "groups.1.name='a_1'",
    ),
    (
        {"groups": [{"name": "a", "match": "*"}, {"name": "a_no_decay", "match": "b"}]},
        "groups.1.name='a_no_decay' is already used by ",
        "groups.1.name='a_no_decay_1'",
    ),
    (
        {"groups": [{"name": "no_decay", "match": "*"}]},
        "groups.0.name='no_decay' is already used by one of the groups decay, no_decay",
        "groups.0.name='no_decay_0'",
    ),
    (
        {"groups": [{"name": "the head", "match": "*"}]},
        "groups.0.name='the head' must consist of letters, digits, . and _",
        "groups.0.name='head'",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "scale": 3}]},
        "groups.0.scale=3 is not a setting",
        "groups.0.lr_scale=3",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "betas": [1]}]},
        "groups.0.betas=[1] has 1, which must be below 1",
        "groups.0.betas=[0.9, 0.999]",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "betas": [0.9]}]},
        "groups.0.betas=[0.9] must have at least 2 items",
        "groups.0.betas=[0.9, 0.999]",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "weight_decay": -1}]},
        "groups.0.weight_decay=-1 must be at least 0",
        "groups.0.weight_decay=0.01",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "eps": 0}]},
        "groups.0.eps=0 must be above 0",
        "groups.0.eps=1e-08",
    ),
    (
        {"layer_decay": {"rate": 0.5}},
        "layer_decay.pattern=None is required with a rate",
        "layer_decay.pattern='net.blocks.*'",
    ),
    (
        {"layer_decay": {"pattern": "a.*"}},
        "layer_decay.rate=None is required with a pattern",
        "layer_decay.rate=0.75",
    ),
    (
        {"layer_decay": {"pattern": "a", "rate": 0.5}},
        "layer_decay.pattern='a' must have a * in place of the layer's number",
        "layer_decay.pattern='a.*'",
    ),
    (
        {"layer_decay": {"pattern": "a.*", "rate": 1.5}},
        "layer_decay.rate=1.5 must be at most 1",
        "layer_decay.rate=0.75",
    ),
    (
        {"layer_decay": {"pattern": "a.*", "rate": 0}},
        "layer_decay.rate=0 must be above 0",
        "layer_decay.rate=0.75",
    ),
    (
        {"layer_decay": 0.5},
        "layer_decay=0.5 must be a dictionary",
        "layer_decay={'pattern': None, 'rate': None}",
    ),
    ({"nesterov": True}, "nesterov=True is not a setting", "Use one of lr, betas, eps, "),
    (
        {"_target_": "torch.optim.Adamw", "lr": 0.1},
        "_target_='torch.optim.Adamw' cannot be imported and called: ",
        "Set _target_='torch.optim.AdamW'",
    ),
    (
        {"_target_": "torch.optim.adam"},
        "_target_='torch.optim.adam' cannot be imported and called: ",
        "Set _target_='torch.optim.Adam'",
    ),
    (
        {"_target_": "torch.optim.Unheard"},
        "_target_='torch.optim.Unheard' cannot be imported and called: ",
        "Set _target_='package.module.Class'",
    ),
    (
        {"_target_": "Adam"},
        "_target_='Adam' cannot be imported and called: ",
        "Set _target_='package.module.Class'",
    ),
]


TORCH = "torch.optim.lr_scheduler"
INVALID_SCHEDULES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "name is required, one of constant, linear, cosine, ", "name='cosine'"),
    ({"name": "cosin"}, "name='cosin' must be one of constant, linear, cosine, ", "name='cosine'"),
    (
        {"name": "cosine", "warmup_steps": -1},
        "warmup_steps=-1 must be at least 0",
        "warmup_steps=100",
    ),
    (
        {"name": "cosine", "warmup_steps": 1.5},
        "warmup_steps=1.5 must be an integer",
        "warmup_steps=100",
    ),
    (
        {"name": "cosine", "warmup_steps": True},
        "warmup_steps=True must be a number",
        "warmup_steps=100",
    ),
    (
        {"name": "cosine", "warmup_ratio": 1.5},
        "warmup_ratio=1.5 must be at most 1",
        "warmup_ratio=0.05",
    ),
    (
        {"name": "cosine", "warmup_ratio": -0.1},
        "warmup_ratio=-0.1 must be at least 0",
        "warmup_ratio=0.05",
    ),
    (
        {"name": "linear", "min_lr_ratio": -0.5},
        "min_lr_ratio=-0.5 must be at least 0",
        "min_lr_ratio=0.1",
    ),
    (
        {"name": "linear", "min_lr_ratio": 1.5},
        "min_lr_ratio=1.5 must be at most 1",
        "min_lr_ratio=0.1",
    ),
    ({"name": "linear", "total_steps": 0}, "total_steps=0 must be at least 1", "total_steps=1000"),
    (
        {"name": "linear", "total_steps": 2**63},
        f"total_steps={2**63} must be below {2**63}",
        "total_steps=1000",
    ),
    (
        {"name": "linear", "warmup_steps": 1, "warmup_ratio": 0.1},
        "warmup_ratio=0.1 cannot be combined with warmup_steps",
        "warmup_ratio=None",
    ),
    (
        {"name": "linear", "warmup_steps": 1, "warmup_ratio": 0.0},
        "warmup_ratio=0.0 cannot be combined with warmup_steps",
        "warmup_ratio=None",
    ),
    (
        {"name": "constant", "min_lr_ratio": 0.1},
        "min_lr_ratio=0.1 is not a setting",
        "Use one of name, total_steps, count_skipped_steps, warmup_steps, warmup_ratio, warmup_ep",
    ),
    ({"name": "polynomial", "power": 0}, "power=0 must be above 0", "power=2.0"),
    ({"name": "inverse_sqrt", "timescale": 0}, "timescale=0 must be at least 1", "timescale=10000"),
    ({"name": "wsd", "decay_steps": 0}, "decay_steps=0 must be at least 1", "decay_steps=100"),
    ({"name": "wsd", "decay_ratio": 0}, "decay_ratio=0 must be above 0", "decay_ratio=0.1"),
    ({"name": "wsd", "decay_ratio": 1.5}, "decay_ratio=1.5 must be at most 1", "decay_ratio=0.1"),
    (
        {"name": "wsd", "decay": "sqr"},
        "decay='sqr' must be 'cosine', 'linear' or 'sqrt'",
        "decay='sqrt'",
    ),
    (
        {"name": "wsd", "decay_steps": 5, "decay_ratio": 0.1},
        "decay_ratio=0.1 cannot be combined with decay_steps",
        "decay_ratio=None",
    ),
    ({"name": "plateau", "mode": "down"}, "mode='down' must be 'min' or 'max'", "mode='min'"),
    ({"name": "plateau", "factor": 1}, "factor=1 must be below 1", "factor=0.1"),
    ({"name": "plateau", "factor": 0}, "factor=0 must be above 0", "factor=0.1"),
    ({"name": "plateau", "cooldown": -1}, "cooldown=-1 must be at least 0", "cooldown=0"),
    ({"name": "plateau", "patience": -1}, "patience=-1 must be at least 0", "patience=10"),
    ({"name": "plateau", "threshold": -1}, "threshold=-1 must be at least 0", "threshold=0.0001"),
    (
        {"name": "plateau", "threshold_mode": "r"},
        "threshold_mode='r' must be 'rel' or 'abs'",
        "threshold_mode='rel'",
    ),
    (
        {"name": "plateau", "warmup_steps": 5, "warmup_ratio": 0.1},
        "warmup_ratio=0.1 cannot be combined with warmup_steps",
        "warmup_ratio=None",
    ),
    (
        {"name": "linear", "warmup_epochs": -1},
        "warmup_epochs=-1 must be at least 0",
        "warmup_epochs=5",
    ),
    (
        {"name": "linear", "warmup_ratio": 0.1, "warmup_epochs": 1},
        "warmup_epochs=1.0 cannot be combined with warmup_ratio",
        "warmup_epochs=None",
    ),
    ({"name": "linear", "min_lr": -1}, "min_lr=-1 must be at least 0", "min_lr=1e-06"),
    (
        {"name": "linear", "min_lr": 1e-5, "min_lr_ratio": 0.1},
        "min_lr=1e-05 cannot be combined with min_lr_ratio",
        "min_lr=None",
    ),
    (
        {"name": "cosine_restarts", "num_cycles": 0},
        "num_cycles=0 must be at least 1",
        "num_cycles=4",
    ),
    (
        {"name": "cosine_restarts", "cycle_mult": 0},
        "cycle_mult=0 must be above 0",
        "cycle_mult=2.0",
    ),
    ({"name": "exponential", "gamma": 0}, "gamma=0 must be above 0", "gamma=0.95"),
    ({"name": "exponential", "gamma": 1.5}, "gamma=1.5 must be at most 1", "gamma=0.95"),
    (
        {"name": "exponential", "decay_steps": 0},
        "decay_steps=0 must be at least 1",
        "decay_steps=1000",
    ),
    ({"name": "multistep", "gamma": 2}, "gamma=2 must be at most 1", "gamma=0.1"),
    (
        {"name": "multistep", "milestones": [0.5, 0]},
        "milestones=[0.5, 0] has 0, which must be above 0",
        "milestones=[0.5, 0.75]",
    ),
    (
        {"name": "multistep", "milestones": 30},
        "milestones=30 must be a list",
        "milestones=[0.5, 0.75]",
    ),
    ({"name": "one_cycle", "pct_start": 0}, "pct_start=0 must be above 0", "pct_start=0.3"),
    ({"name": "one_cycle", "pct_start": 1}, "pct_start=1 must be below 1", "pct_start=0.3"),
    (
        {"name": "one_cycle", "div_factor": 0.5},
        "div_factor=0.5 must be at least 1",
        "div_factor=25.0",
    ),
    (
        {"name": "one_cycle", "final_div_factor": 0.5},
        "final_div_factor=0.5 must be at least 1",
        "final_div_factor=10000.0",
    ),
    (
        {"name": "one_cycle", "anneal": "cos"},
        "anneal='cos' must be 'cosine' or 'linear'",
        "anneal='cosine'",
    ),
    (
        {"name": "one_cycle", "warmup_steps": 5},
        "warmup_steps=5 is not a setting of one_cycle",
        "Use one of name, total_steps, count_skipped_steps, pct_start, ",
    ),
    (
        {"name": "custom"},
        "_target_=None is required",
        "_target_='torch.optim.lr_scheduler.OneCycleLR'",
    ),
    (
        {"_target_": f"{TORCH}.ChainedScheduler", "schedulers": 3},
        "schedulers=3 must be a list of schedulers",
        f"schedulers=[{{'_target_': '{TORCH}.LinearLR', '_partial_': True}}]",
    ),
    (
        {
            "_target_": f"{TORCH}.ChainedScheduler",
            "schedulers": [{"_target_": f"{TORCH}.steplr", "_partial_": True}],
        },
        f"schedulers.0._target_='{TORCH}.steplr' cannot be imported and called: ",
        f"Set schedulers.0._target_='{TORCH}.StepLR'",
    ),
    (
        {
            "_target_": f"{TORCH}.ChainedScheduler",
            "schedulers": [
                {
                    "_target_": f"{TORCH}.SequentialLR",
                    "_partial_": True,
                    "schedulers": [
                        {"_target_": f"{TORCH}.LinearLR", "_partial_": True},
                        {"_target_": f"{TORCH}.StepLR", "step_size": 5},
                    ],
                }
            ],
        },
        "schedulers.0.schedulers.1._partial_=False must be true for a scheduler within another",
        "Use for example schedulers.0.schedulers.1._partial_=True",
    ),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "step": 5},
        "step=5 is not a setting",
        "step_size=5",
    ),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "name": "step", "step_size": 5},
        "name='step' cannot be combined with a _target_",
        "name='custom'",
    ),
    (
        {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "T_max": "total_steps",
            "interval": "epoch",
        },
        "interval='epoch' cannot be combined with the argument total_steps",
        "interval='step'",
    ),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 5, "interval": "steps"},
        "interval='steps' must be 'step' or 'epoch'",
        "interval='step'",
    ),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 5, "frequency": 0},
        "frequency=0 must be at least 1",
        "frequency=1",
    ),
]
INVALID_MONITORS: list[tuple[dict[str, Any], str, str]] = [
    ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1", "every_n_steps=50"),
    ({"every_n_steps": 2.5}, "every_n_steps=2.5 must be an integer", "every_n_steps=50"),
    (
        {"histograms_every_n_steps": 0},
        "histograms_every_n_steps=0 must be at least 1",
        "histograms_every_n_steps=500",
    ),
    ({"layer_depth": 0}, "layer_depth=0 must be at least 1", "layer_depth=2"),
    ({"flight_recorder": 0}, "flight_recorder=0 must be at least 1", "flight_recorder=200"),
    (
        {"scopes": ["modle"]},
        "scopes=['modle'] has 'modle', which must be 'model', 'group', 'layer' or 'tensor'",
        "scopes=['model']",
    ),
    (
        {"stop_on": ["not_finite"], "findings": None},
        "stop_on=['not_finite'] has no effect, because findings=",
        "stop_on=[]",
    ),
]
"""Invalid values, the prefix of the error, and the suggestion at its end or its prefix."""

TABLES = pytest.mark.parametrize(
    ("parse", "table"),
    [
        pytest.param(parse_optimizer, INVALID_OPTIMIZERS, id="optimizer"),
        pytest.param(parse_schedule, INVALID_SCHEDULES, id="scheduler"),
        pytest.param(monitor_config, INVALID_MONITORS, id="monitor"),
    ],
)
EXAMPLE = "Use for example "


@TABLES
def test_error_names_the_setting_its_value_the_problem_and_a_suggestion(
    parse: Callable[[Any], object], table: list[tuple[dict[str, Any], str, str]]
) -> None:
    with each_row() as row:
        for values, beginning, suggestion in table:
            with row(values):
                with pytest.raises(ConfigError) as invalid:
                    parse(values)
                message = str(invalid.value)
                assert message.startswith(beginning)
                assert "\n" not in message
                assert message.endswith(f" {invalid.value.suggestion}")
                if suggestion.startswith(("Use ", "Set ")):
                    assert invalid.value.suggestion.startswith(suggestion)
                else:
                    assert invalid.value.suggestion == f"{EXAMPLE}{suggestion}"


@TABLES
def test_suggestion_works(
    parse: Callable[[Any], object], table: list[tuple[dict[str, Any], str, str]]
) -> None:
    with each_row() as row:
        for values, _, suggestion in table:
            if not suggestion.startswith(("Use ", "Set ")):
                with row(values):
                    with pytest.raises(ConfigError) as invalid:
                        parse(values)
                    parse(corrected(values, invalid.value))


def corrected(values: dict[str, Any], error: ConfigError) -> Any:
    """Returns the values with the error's suggestion applied."""
    assert error.path is not None
    node = OmegaConf.create(values)
    if "is not a setting" in error.problem:
        parent, _, name = error.path.field.rpartition(".")
        del (OmegaConf.select(node, parent) if parent else node)[name]
    name, _, value = error.suggestion.removeprefix(EXAMPLE).partition("=")
    OmegaConf.update(node, name, ast.literal_eval(value), merge=False)
    return OmegaConf.to_container(node)


def test_every_bounded_field_has_an_invalid_value() -> None:
    tables = [*INVALID_OPTIMIZERS, *INVALID_SCHEDULES, *INVALID_MONITORS]
    tested = {beginning.partition("=")[0].rpartition(".")[2] for _, beginning, _ in tables}
    configs = [AdamConfig, GroupConfig, LayerDecayConfig, *SCHEDULES.values(), MonitorConfig]
    bounded = {name for config in configs for name in bounded_fields(config)}
    assert {"lr", "betas", "rate", "frequency", "flight_recorder"} <= bounded
    assert bounded <= tested


def bounded_fields(config: type) -> Iterator[str]:
    hints = get_type_hints(config, include_extras=True)
    for entry in fields(config):
        for each in parts(hints[entry.name]):
            # All integers have this upper limit.
            if isinstance(each, Limits) and each.limits != {"lt": 2**63}:
                yield entry.name


def parts(hint: Any) -> Iterator[Any]:
    """Yields a type with its arguments and its metadata, recursively."""
    yield hint
    for each in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from parts(each)


STEP_LR = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 5}
VALID: list[tuple[Callable[[Any], object], dict[str, Any]]] = [
    (parse_optimizer, {"lr": 1e-300, "betas": [0, 0], "eps": 1e-300, "weight_decay": 0}),
    (parse_optimizer, {"layer_decay": {"pattern": "*", "rate": 1}}),
    (
        parse_optimizer,
        {"groups": [{"name": "a", "match": "*", "weight_decay": 0, "betas": [0, 0]}]},
    ),
    (parse_schedule, {"name": "cosine", "warmup_steps": 0, "total_steps": 1, "min_lr_ratio": 0}),
    (parse_schedule, {"name": "linear", "warmup_ratio": 0, "min_lr_ratio": 1}),
    (parse_schedule, {"name": "linear", "warmup_ratio": 1, "total_steps": 2**63 - 1}),
    (parse_schedule, {"name": "inverse_sqrt", "timescale": 1}),
    (parse_schedule, {"name": "wsd", "decay_steps": 1}),
    (parse_schedule, {"name": "wsd", "decay_ratio": 1}),
    (parse_schedule, {"name": "plateau", "patience": 0, "threshold": 0, "cooldown": 0}),
    (parse_schedule, {"name": "plateau", "warmup_steps": 5}),
    (parse_schedule, {"name": "cosine", "warmup_epochs": 0, "min_lr": 0}),
    (parse_schedule, {"name": "exponential", "gamma": 1, "decay_steps": 1}),
    (parse_schedule, {"name": "multistep", "milestones": [], "gamma": 1}),
    (parse_schedule, {"name": "one_cycle", "div_factor": 1, "final_div_factor": 1}),
    (parse_schedule, {**STEP_LR, "frequency": 1}),
    (monitor_config, {"every_n_steps": 1, "layer_depth": 1, "flight_recorder": 1}),
    (monitor_config, {"histograms_every_n_steps": 1}),
]
"""Values at the limits of their ranges."""


def test_limits_of_ranges_are_accepted() -> None:
    with each_row() as row:
        for parse, values in VALID:
            with row(values):
                parse(values)


@pytest.mark.parametrize(
    "form", [CosineConfig, lambda name: OmegaConf.structured(CosineConfig(name))]
)
def test_preset_with_the_name_of_another_is_an_error(form: Any) -> None:
    expected = (
        r"^name='linear' does not belong to the fields of cosine\."
        r" Use lightning_adam/scheduler=linear$"
    )
    with pytest.raises(ConfigError, match=expected):
        parse_schedule(form("linear"))
    expected = r" Use lightning_adam/scheduler@model\.scheduler=linear$"
    with pytest.raises(ConfigError, match=expected):
        parse_schedule(form("linear"), ConfigPath("model.scheduler"))


@pytest.mark.parametrize("form", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_target_merged_with_a_preset_schedule_is_an_error(form: Any) -> None:
    values = {"_target_": "torch.optim.lr_scheduler.StepLR", "name": "cosine", "step_size": 3}
    expected = (
        r"^_target_='torch\.optim\.lr_scheduler\.StepLR' is merged with the fields of"
        r" lightning_adam/scheduler, .*lightning_adam/scheduler=custom$"
    )
    with pytest.raises(ConfigError, match=expected):
        parse_schedule(form(values))


def test_numpy_scalars_are_accepted() -> None:
    config = parse_optimizer({"lr": np.float64(0.5), "weight_decay": np.float32(0)}).config
    assert config == AdamConfig(lr=0.5)


def test_structured_schedule_has_its_name() -> None:
    config = parse_schedule(CosineConfig(warmup_ratio=0.1)).config
    assert config == CosineConfig(warmup_ratio=0.1)


def test_missing_name_of_a_schedule_is_suggested_as_a_new_key() -> None:
    root = OmegaConf.create({"scheduler": {"warmup_steps": 3}})
    # Like a config that Hydra has composed.
    OmegaConf.set_struct(root, True)
    with pytest.raises(ConfigError, match=r"^scheduler\.name is required, .*\+scheduler\.name=co"):
        parse_schedule(root.scheduler)


def test_value_that_is_not_a_config_is_an_error() -> None:
    expected = r"^optimizer must be a config node, a dict, a dataclass or .*, not \[0\.001\]$"
    with pytest.raises(ConfigError, match=expected):
        parse_optimizer([1e-3])


def test_target_of_the_monitor_is_its_class() -> None:
    assert MonitorConfig()._target_ == "lightning_adam.AdamMonitor"


PLUGIN = ("hydra_plugins.lightning_adam", "lightning_adam.config.hydra_plugin")
"""Modules that every Hydra app of the environment imports."""
COMMAND = ("lightning_adam.config.explain", "lightning_adam.cli")
HEAVY = {"lightning", "numpy", "pydantic", "pydantic_core", "pytorch_lightning", "torch"}


@pytest.mark.parametrize("module", [*PLUGIN, *COMMAND])
def test_hydra_plugin_imports_no_heavy_libraries(module: str) -> None:
    loaded = packages_loaded(module)
    assert "lightning_adam" in loaded
    assert loaded & HEAVY == set()
    if module in PLUGIN:
        own = {"lightning_adam", module.partition(".")[0]}
        assert loaded - packages_loaded("hydra._internal.hydra") == own


@functools.cache
def packages_loaded(module: str) -> set[str]:
    """Returns the packages, except those of Python, that the import of a module loads."""
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    names = {each.partition(".")[0] for each in done.stdout.split()}
    return names - sys.stdlib_module_names
