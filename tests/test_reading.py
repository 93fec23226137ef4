"""A config in any of its forms, and what a refusal says."""

import shlex
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from lightning_adam import ConfigError
from lightning_adam.monitor_settings import read_monitor
from lightning_adam.reading import read_optimizer, read_scheduler
from lightning_adam.schema import AdamConfig, CosineConfig, MonitorConfig, WeightDecayOn

SETTINGS = {"lr": 0.02, "betas": [0.8, 0.9], "weight_decay_on": "all", "fused": False}


@pytest.mark.parametrize(
    "node",
    [
        SETTINGS,
        AdamConfig(lr=0.02, betas=[0.8, 0.9], weight_decay_on=WeightDecayOn.all, fused=False),
        OmegaConf.create(SETTINGS),
        OmegaConf.merge(OmegaConf.structured(AdamConfig), SETTINGS),
    ],
    ids=["dict", "dataclass", "DictConfig", "typed node"],
)
def test_every_form_reads_the_same(node: Any) -> None:
    config, where = read_optimizer(node)
    assert config == AdamConfig(
        lr=0.02, betas=[0.8, 0.9], weight_decay_on=WeightDecayOn.all, fused=False
    )
    assert where == "optimizer"


def test_interpolations_are_resolved_where_the_node_stands() -> None:
    root = OmegaConf.create({"peak": 0.5, "model": {"optimizer": {"lr": "${peak}"}}})
    config, where = read_optimizer(root.model.optimizer)
    assert (config, where) == (AdamConfig(lr=0.5), "model.optimizer")


def test_whole_numbers_become_floats() -> None:
    config, _ = read_optimizer({"lr": 1, "betas": [0, 0.9], "weight_decay": 0})
    assert isinstance(config, AdamConfig)
    assert [type(each) for each in (config.lr, *config.betas, config.weight_decay)] == [float] * 4


@pytest.mark.parametrize(
    ("values", "given", "expected"),
    [
        ({"lr": 0}, "optimizer.lr=0.0", "above 0"),
        ({"lr": -1e-3}, "optimizer.lr=-0.001", "above 0"),
        ({"lr": float("nan")}, "optimizer.lr=nan", "finite"),
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
        ({"layer_decay": 0.5}, "optimizer.layer_decay=0.5", "expected pattern and rate"),
        ({"nesterov": True}, "optimizer.nesterov=true: no such field", "the fields are lr, betas"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(
    values: dict[str, Any], given: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read_optimizer(values)
    sentence = str(refused.value)
    assert sentence.startswith(given)
    assert expected in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("values", "given", "expected"),
    [
        ({}, "scheduler.name: expected", "type for example +scheduler.name=cosine"),
        ({"name": "cosin"}, "scheduler.name=cosin", "constant, linear, cosine"),
        ({"name": "cosine", "warmup_steps": -1}, "scheduler.warmup_steps=-1", "at least 0"),
        ({"name": "cosine", "warmup_steps": 1.5}, "scheduler.warmup_steps=1.5", "Integer"),
        ({"name": "cosine", "warmup_ratio": 1.5}, "scheduler.warmup_ratio=1.5", "in [0, 1]"),
        ({"name": "linear", "min_lr_ratio": -0.5}, "scheduler.min_lr_ratio=-0.5", "in [0, 1]"),
        ({"name": "linear", "total_steps": 0}, "scheduler.total_steps=0", "at least 1"),
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
    ],
)
def test_a_schedule_that_cannot_work_is_refused(
    values: dict[str, Any], given: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        read_scheduler(values)
    assert str(refused.value).startswith(given)
    assert expected in str(refused.value)


def test_a_word_that_is_none_of_those_expected_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"interval=steps: .*type for example .*interval=step$"):
        read_scheduler({"_target_": "torch.optim.lr_scheduler.StepLR", "interval": "steps"})


@pytest.mark.parametrize(
    "node",
    [
        CosineConfig(name="linear"),
        OmegaConf.structured(CosineConfig(name="linear")),
    ],
    ids=["dataclass", "typed node"],
)
def test_another_name_than_the_presets_is_refused(node: Any) -> None:
    expected = r"name=linear: expected cosine, .*type lightning_adam/scheduler=linear$"
    with pytest.raises(ConfigError, match=expected):
        read_scheduler(node)


@pytest.mark.parametrize("form", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_a_target_merged_under_a_schedule_is_refused_by_name(form: Any) -> None:
    values = {"_target_": "torch.optim.lr_scheduler.StepLR", "name": "cosine", "step_size": 3}
    expected = r"_target_=torch\.optim\.lr_scheduler\.StepLR: .*lightning_adam/scheduler=custom$"
    with pytest.raises(ConfigError, match=expected):
        read_scheduler(form(values))


def test_numbers_of_numpy_are_numbers() -> None:
    config, _ = read_optimizer({"lr": np.float64(0.5), "weight_decay": np.float32(0)})
    assert config == AdamConfig(lr=0.5)


def test_a_schedule_of_a_typed_node_knows_its_name() -> None:
    config, _ = read_scheduler(CosineConfig(warmup_ratio=0.1))
    assert config == CosineConfig(warmup_ratio=0.1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"every_n_steps": 0}, "at least 1"),
        ({"every_n_steps": 2.5}, "Integer"),
        ({"scopes": ["modle"]}, "model, group"),
        ({"stop_on": ["not_finite"], "findings": None}, r"looks for none; .*stop_on=\[\]"),
    ],
)
def test_a_monitor_that_cannot_work_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_monitor(values)


def test_refusals_name_the_place_in_the_users_config() -> None:
    root = OmegaConf.create({"model": {"optimizer": {"lr": -1}}})
    with pytest.raises(ConfigError, match=r"^model\.optimizer\.lr=-1\.0: .*type for example"):
        read_optimizer(root.model.optimizer)


def test_what_a_refusal_says_to_type_is_one_shell_word_that_works() -> None:
    with pytest.raises(ConfigError) as refused:
        read_optimizer({"betas": [0.9]})
    typed = shlex.split(str(refused.value).partition("type for example ")[2])
    assert typed == ["optimizer.betas=[0.9,0.999]"]
    config, _ = read_optimizer(OmegaConf.from_dotlist(typed).optimizer)
    assert config == AdamConfig(betas=[0.9, 0.999])


def test_something_else_than_a_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a config node, a dict, a dataclass or"):
        read_optimizer([1e-3])


def test_the_monitors_target_is_the_class() -> None:
    assert MonitorConfig()._target_ == "lightning_adam.AdamMonitor"


@pytest.mark.parametrize(
    "module", [f"lightning_adam.{name}" for name in ("schema", "reading", "hydra_plugin", "cli")]
)
def test_neither_torch_nor_lightning_is_imported(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'lightning'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_refusal_is_quoted_as_its_sentence_alone() -> None:
    assert repr(ConfigError("optimizer.lr=-1: ...")) == "optimizer.lr=-1: ..."
