"""Reading a config in any of its forms: what is accepted, and the sentence of every refusal."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from lightning_adam import ConfigError
from lightning_adam.config.errors import RANGES
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.optimizer import AdamConfig, WeightDecayOn, parse_optimizer
from lightning_adam.config.schedule import CosineConfig, parse_schedule
from lightning_adam.monitor.settings import monitor_config
from tests.support.tables import each_row

SETTINGS = {"lr": 0.02, "betas": [0.8, 0.9], "weight_decay_on": "all", "fused": False}


def test_every_form_reads_the_same() -> None:
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
                assert parse_optimizer(node) == (expected, "optimizer")


def test_interpolations_are_resolved_in_the_whole_config() -> None:
    root = OmegaConf.create({"peak": 0.5, "model": {"optimizer": {"lr": "${peak}"}}})
    parsed = parse_optimizer(root.model.optimizer)
    assert (config, where) == (AdamConfig(lr=0.5), "model.optimizer")


def test_integers_become_floats() -> None:
    config, _ = parse_optimizer({"lr": 1, "betas": [0, 0.9], "weight_decay": 0})
    assert isinstance(config, AdamConfig)
    assert [type(each) for each in (config.lr, *config.betas, config.weight_decay)] == [float] * 4


OPTIMIZERS_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"lr": 0}, "optimizer.lr=0.0", "above 0"),
    ({"lr": -1e-3}, "optimizer.lr=-0.001", "above 0"),
    ({"lr": float("nan")}, "optimizer.lr=nan", "finite"),
    ({"lr": float("inf")}, "optimizer.lr=inf", "finite"),
    ({"lr": "fast"}, "optimizer.lr=fast", "Float"),
    ({"lr": None}, "optimizer.lr=null", "type for example optimizer.lr=0.001"),
    ({"betas": [0.9]}, "optimizer.betas=[0.9]", "two numbers in [0, 1)"),
    ({"betas": [0.9, 1.0]}, "optimizer.betas=[0.9,1.0]", "two numbers in [0, 1)"),
    ({"betas": [-0.1, 0.9]}, "optimizer.betas=[-0.1,0.9]", "two numbers in [0, 1)"),
    ({"betas": [0.9, 0.99, 0.999]}, "optimizer.betas=", "two numbers in [0, 1)"),
    ({"betas": 0.9}, "optimizer.betas=0.9", "list"),
    ({"betas": ["a", 0.9]}, "optimizer.betas=[a,0.9]", "Float"),
    ({"eps": 0}, "optimizer.eps=0.0", "above 0"),
    ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1", "at least 0"),
    ({"weight_decay": float("inf")}, "optimizer.weight_decay=inf", "finite"),
    ({"weight_decay_on": "biases"}, "optimizer.weight_decay_on=biases", "matrices, all"),
    ({"amsgrad": "perhaps"}, "optimizer.amsgrad=perhaps", "not a valid bool"),
    ({"lr": "???"}, "optimizer.lr=???: expected a value; type optimizer.lr=VALUE", ""),
    ({"lr": "${peak}"}, "optimizer.lr: ", "Interpolation key 'peak' not found"),
    ({"fused": True, "foreach": True}, "optimizer.foreach=true", "not both"),
    ({"beta": [0.9, 0.99]}, "optimizer.beta=[0.9,0.99]: no", "'optimizer.betas=[0.9,0.99]'"),
    ({"groups": {"head": {}}}, "optimizer.groups=", "expected a list of groups"),
    ({"groups": [{"match": "*"}]}, "optimizer.groups.0.name=???", "expected a value"),
    ({"groups": [{"name": "head"}]}, "optimizer.groups.0: ", "exactly one of match, regex"),
    (
        {"groups": [{"name": "head", "match": "*", "regex": "."}]},
        "optimizer.groups.0: ",
        "has match and regex; type for example optimizer.groups.0.regex=null",
    ),
    (
        {"groups": [{"name": "head", "regex": "("}]},
        'optimizer.groups.0.regex="("',
        "expected a regular expression",
    ),
    (
        {"groups": [{"name": "a", "match": "*"}, {"name": "b", "match": "*", "lr_scale": 0}]},
        "optimizer.groups.1.lr_scale=0.0",
        "above 0",
    ),
    (
        {"groups": [{"name": "a", "match": "*"}, {"name": "a", "match": "b"}]},
        "optimizer.groups.1.name=a",
        "expected another name than decay, no_decay, a, a_no_decay",
    ),
    (
        {"groups": [{"name": "no_decay", "match": "*"}]},
        "optimizer.groups.0.name=no_decay",
        "another name",
    ),
    (
        {"groups": [{"name": "the head", "match": "*"}]},
        'optimizer.groups.0.name="the head"',
        "letters, digits",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "scale": 3}]},
        "optimizer.groups.0.scale=3: no such field",
        "optimizer.groups.0.lr_scale=3",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "betas": [1]}]},
        "optimizer.groups.0.betas=[1.0]",
        "two numbers in [0, 1)",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "weight_decay": -1}]},
        "optimizer.groups.0.weight_decay=-1.0",
        "at least 0",
    ),
    (
        {"groups": [{"name": "a", "match": "*", "eps": 0}]},
        "optimizer.groups.0.eps=0.0",
        "finite number above 0",
    ),
    ({"layer_decay": {"rate": 0.5}}, "optimizer.layer_decay.pattern=null", "beside a rate"),
    ({"layer_decay": {"pattern": "a.*"}}, "optimizer.layer_decay.rate=null", "beside a p"),
    (
        {"layer_decay": {"pattern": "a", "rate": 0.5}},
        "optimizer.layer_decay.pattern=a: expected a *",
        "type for example 'optimizer.layer_decay.pattern=a.*'",
    ),
    (
        {"layer_decay": {"pattern": "a.*", "rate": 1.5}},
        "optimizer.layer_decay.rate=1.5",
        "above 0 and at most 1",
    ),
    (
        {"layer_decay": {"pattern": "a.*", "rate": 0}},
        "optimizer.layer_decay.rate=0.0",
        "above 0 and at most 1",
    ),
    ({"layer_decay": 0.5}, "optimizer.layer_decay=0.5", "expected pattern and rate"),
    ({"nesterov": True}, "optimizer.nesterov=true: no such field", "the fields are lr, betas"),
]


SCHEDULERS_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "scheduler.name: expected", "type for example +scheduler.name=cosine"),
    ({"name": "cosin"}, "scheduler.name=cosin", "constant, linear, cosine"),
    ({"name": "cosine", "warmup_steps": -1}, "scheduler.warmup_steps=-1", "at least 0"),
    ({"name": "cosine", "warmup_steps": 1.5}, "scheduler.warmup_steps=1.5", "Integer"),
    ({"name": "cosine", "warmup_ratio": 1.5}, "scheduler.warmup_ratio=1.5", "in [0, 1]"),
    ({"name": "cosine", "warmup_ratio": -0.1}, "scheduler.warmup_ratio=-0.1", "in [0, 1]"),
    ({"name": "linear", "min_lr_ratio": -0.5}, "scheduler.min_lr_ratio=-0.5", "in [0, 1]"),
    ({"name": "linear", "min_lr_ratio": 1.5}, "scheduler.min_lr_ratio=1.5", "in [0, 1]"),
    ({"name": "linear", "total_steps": 0}, "scheduler.total_steps=0", "at least 1"),
    ({"name": "linear", "total_steps": 2**63}, "scheduler.total_steps=92", "below 2**63"),
    (
        {"name": "linear", "warmup_steps": 1, "warmup_ratio": 0.1},
        "scheduler.warmup_ratio=0.1",
        "not both",
    ),
    ({"name": "constant", "min_lr_ratio": 0.1}, "scheduler.min_lr_ratio", "no such field"),
    ({"name": "polynomial", "power": 0}, "scheduler.power=0.0", "above 0"),
    ({"name": "inverse_sqrt", "timescale": 0}, "scheduler.timescale=0", "at least 1"),
    ({"name": "wsd", "decay_steps": 0}, "scheduler.decay_steps=0", "at least 1"),
    ({"name": "wsd", "decay_ratio": 0}, "scheduler.decay_ratio=0.0", "above 0 and at most 1"),
    ({"name": "wsd", "decay": "sqr"}, "scheduler.decay=sqr", "cosine, linear, sqrt"),
    (
        {"name": "wsd", "decay_steps": 5, "decay_ratio": 0.1},
        "scheduler.decay_ratio=0.1",
        "not both",
    ),
    ({"name": "plateau", "mode": "down"}, "scheduler.mode=down", "min, max"),
    ({"name": "plateau", "factor": 1}, "scheduler.factor=1.0", "above 0 and below 1"),
    ({"name": "plateau", "factor": 0}, "scheduler.factor=0.0", "above 0 and below 1"),
    ({"name": "plateau", "cooldown": -1}, "scheduler.cooldown=-1", "at least 0"),
    ({"name": "plateau", "patience": -1}, "scheduler.patience=-1", "at least 0"),
    ({"name": "plateau", "threshold": -1}, "scheduler.threshold=-1.0", "at least 0"),
    ({"name": "plateau", "threshold_mode": "r"}, "scheduler.threshold_mode=r", "rel, abs"),
    ({"name": "plateau", "warmup_steps": 5}, "scheduler.warmup_steps=5", "no such field"),
    ({"name": "custom"}, "scheduler._target_=null", "expected the class of a scheduler"),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "step": 5},
        "scheduler.step=5",
        "scheduler.step_size=5",
    ),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "name": "step", "step_size": 5},
        "scheduler.name=step",
        "expected custom beside a _target_",
    ),
    (
        {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "T_max": "total_steps",
            "interval": "epoch",
        },
        "scheduler.interval=epoch",
        "expected step, for an argument is total_steps",
    ),
    (
        {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 5, "frequency": 0},
        "scheduler.frequency=0",
        "at least 1",
    ),
]
MONITORS_REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"every_n_steps": 0}, "adam_monitor.every_n_steps=0", "at least 1"),
    ({"every_n_steps": 2.5}, "adam_monitor.every_n_steps=2.5", "Integer"),
    ({"histograms_every_n_steps": 0}, "adam_monitor.histograms_every_n_steps=0", "at least 1"),
    ({"layer_depth": 0}, "adam_monitor.layer_depth=0", "at least 1"),
    ({"flight_recorder": 0}, "adam_monitor.flight_recorder=0", "at least 1"),
    ({"scopes": ["modle"]}, "adam_monitor.scopes=", "model, group"),
    (
        {"stop_on": ["not_finite"], "findings": None},
        "adam_monitor.stop_on=",
        "looks for none; type for example 'adam_monitor.stop_on=[]'",
    ),
]


@pytest.mark.parametrize(
    ("read", "table"),
    [
        pytest.param(parse_optimizer, OPTIMIZERS_REFUSED, id="optimizer"),
        pytest.param(parse_schedule, SCHEDULERS_REFUSED, id="scheduler"),
        pytest.param(monitor_config, MONITORS_REFUSED, id="monitor"),
    ],
)
def test_invalid_value_is_refused_in_one_line_that_names_it(
    read: Callable[[Any], object], table: list[tuple[dict[str, Any], str, str]]
) -> None:
    with each_row() as row:
        for values, beginning, part in table:
            with row(values):
                with pytest.raises(ConfigError) as refused:
                    read(values)
                sentence = str(refused.value)
                assert sentence.startswith(beginning)
                assert part in sentence
                assert "\n" not in sentence


def test_every_range_has_a_refused_value() -> None:
    tables = [*OPTIMIZERS_REFUSED, *SCHEDULERS_REFUSED, *MONITORS_REFUSED]
    beginnings = [beginning.partition("=")[0] for _, beginning, _ in tables]
    assert RANGES.keys() <= {beginning.rpartition(".")[2] for beginning in beginnings}


def test_unknown_word_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"interval=steps: .*type for example .*interval=step$"):
        parse_schedule({"_target_": "torch.optim.lr_scheduler.StepLR", "interval": "steps"})


@pytest.mark.parametrize(
    "form", [CosineConfig, lambda name: OmegaConf.structured(CosineConfig(name))]
)
def test_preset_under_the_name_of_another_is_refused(form: Any) -> None:
    expected = r"name=linear: expected cosine, .*type lightning_adam/scheduler=linear$"
    with pytest.raises(ConfigError, match=expected):
        parse_schedule(form("linear"))


@pytest.mark.parametrize("form", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_target_merged_with_a_preset_schedule_is_refused(form: Any) -> None:
    values = {"_target_": "torch.optim.lr_scheduler.StepLR", "name": "cosine", "step_size": 3}
    expected = r"_target_=torch\.optim\.lr_scheduler\.StepLR: .*lightning_adam/scheduler=custom$"
    with pytest.raises(ConfigError, match=expected):
        parse_schedule(form(values))


def test_numpy_scalars_are_accepted() -> None:
    config, _ = parse_optimizer({"lr": np.float64(0.5), "weight_decay": np.float32(0)})
    assert config == AdamConfig(lr=0.5)


def test_typed_node_of_a_schedule_has_its_name() -> None:
    config, _ = parse_schedule(CosineConfig(warmup_ratio=0.1))
    assert config == CosineConfig(warmup_ratio=0.1)


def test_refusal_names_the_place_in_the_users_config() -> None:
    root = OmegaConf.create({"model": {"optimizer": {"lr": -1}}})
    with pytest.raises(ConfigError, match=r"^model\.optimizer\.lr=-1\.0: .*type for example"):
        parse_optimizer(root.model.optimizer)


def test_suggested_override_is_one_shell_word_that_works() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_optimizer({"betas": [0.9]})
    typed = shlex.split(str(refused.value).partition("type for example ")[2])
    assert typed == ["optimizer.betas=[0.9,0.999]"]
    config, _ = parse_optimizer(OmegaConf.from_dotlist(typed).optimizer)
    assert config == AdamConfig(betas=[0.9, 0.999])


def test_value_that_is_no_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a config node, a dict, a dataclass or"):
        parse_optimizer([1e-3])


def test_target_of_the_monitor_is_its_class() -> None:
    assert MonitorConfig()._target_ == "lightning_adam.AdamMonitor"


def test_configs_are_read_without_importing_torch_or_lightning() -> None:
    modules = [
        f"lightning_adam.{name}"
        for name in ("config.schema", "config.reading", "config.hydra_plugin", "cli")
    ]
    script = f"import sys, {', '.join(modules)}; print({{'torch', 'lightning'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_repr_of_a_refusal_is_its_sentence() -> None:
    assert repr(ConfigError("optimizer.lr=-1: ...")) == "optimizer.lr=-1: ..."
