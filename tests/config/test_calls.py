"""Errors of calls: the invalid argument is found in the error's text or by further calls."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import optim
from torch.optim import lr_scheduler

from lightning_adam import ConfigError, build_scheduler
from lightning_adam.config.errors import ConfigPath
from lightning_adam.optim.optimizers import call_target
from tests.support.tables import each_row

Given = dict[str, Any]

OPTIMIZERS: list[tuple[Any, Given, str]] = [
    (optim.AdamW, {"betas": [0.9, 1.5]}, "'node.betas=[0.9,0.999]'"),
    (optim.AdamW, {"lr": -1, "eps": 1e-6}, "node.lr=0.001"),
    (optim.Adam, {"eps": -1}, "node.eps=1e-08"),
    (optim.Adam, {"weight_decay": -1}, "node.weight_decay=0"),
    (optim.Adam, {"lr": "fast"}, "node.lr=0.001"),
    (optim.Adam, {"betas": 0.9, "lr": 0.1}, "'node.betas=[0.9,0.999]'"),
    (optim.NAdam, {"betas": [0.9], "lr": 0.1}, "'node.betas=[0.9,0.999]'"),
    (optim.NAdam, {"momentum_decay": -1}, "node.momentum_decay=0.004"),
    (optim.SGD, {"momentum": -1}, "node.momentum=0"),
    (optim.SGD, {"nesterov": True}, "node.nesterov=false"),
    (optim.RMSprop, {"alpha": -1, "momentum": 0.9}, "node.alpha=0.99"),
    (optim.Rprop, {"etas": [2, 3]}, "'node.etas=[0.5,1.2]'"),
    (optim.Adagrad, {"lr_decay": -1, "lr": 0.1}, "node.lr_decay=0"),
    (optim.Adagrad, {"initial_accumulator_value": -1}, "node.initial_accumulator_value=0"),
    (optim.Adadelta, {"rho": 3}, "node.rho=0.9"),
    (optim.Adafactor, {"d": 0.1}, "node.d=1.0"),
    (optim.Adafactor, {"lr": -1}, "node.lr=0.01"),
    (optim.Adafactor, {"eps": [-1, 1]}, "'node.eps=[null,0.001]'"),
    (optim.Adafactor, {"beta2_decay": 1}, "node.beta2_decay=-0.8"),
]
SCHEDULERS: list[tuple[Any, Given, str]] = [
    (lr_scheduler.ReduceLROnPlateau, {"factor": 1.5}, "node.factor=0.1"),
    (lr_scheduler.ReduceLROnPlateau, {"mode": "mi"}, "node.mode=min"),
    (
        lr_scheduler.ReduceLROnPlateau,
        {"mode": "max", "threshold": 0.1, "threshold_mode": "re"},
        "node.threshold_mode=rel",
    ),
    (lr_scheduler.ReduceLROnPlateau, {"min_lr": [1, 2]}, "node.min_lr=0"),
    (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": -1}, "node.T_0=VALUE"),
    (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 2, "T_mult": 0}, "node.T_mult=1"),
    (lr_scheduler.OneCycleLR, {"max_lr": 1}, "+node.total_steps=total_steps"),
    (lr_scheduler.OneCycleLR, {"max_lr": 1, "epochs": 3}, "+node.total_steps=total_steps"),
    (
        lr_scheduler.OneCycleLR,
        {"max_lr": 1, "total_steps": 9, "pct_start": 3},
        "node.pct_start=0.3",
    ),
    (lr_scheduler.OneCycleLR, {"max_lr": [1, 2], "total_steps": 9}, "node.max_lr=VALUE"),
    (lr_scheduler.LinearLR, {"start_factor": -1}, "node.start_factor=0.3333333333333333"),
    (lr_scheduler.LinearLR, {"end_factor": 2}, "node.end_factor=1.0"),
    (lr_scheduler.ConstantLR, {"factor": 2}, "node.factor=0.3333333333333333"),
    (lr_scheduler.CosineAnnealingLR, {}, "+node.T_max=total_steps"),
    (lr_scheduler.CosineAnnealingLR, {"eta_min": 0.1}, "+node.T_max=total_steps"),
    (lr_scheduler.StepLR, {}, "+node.step_size=VALUE"),
    (lr_scheduler.CyclicLR, {}, "+node.base_lr=VALUE +node.max_lr=VALUE"),
    (lr_scheduler.SequentialLR, {}, "+node.schedulers=VALUE +node.milestones=VALUE"),
]
"""A class, its arguments, and the suggestion of the error."""

UNKNOWN: list[tuple[Any, Given, str]] = [
    (
        lr_scheduler.SequentialLR,
        {"schedulers": [], "milestones": []},
        "node._target_=torch.optim.lr_scheduler.SequentialLR cannot be called with these arguments:"
        " ValueError: SequentialLR expects at least one scheduler, but got no scheduler."
        " Change node.schedulers or node.milestones",
    ),
    (
        lr_scheduler.MultiStepLR,
        {"milestones": 3},
        "node._target_=torch.optim.lr_scheduler.MultiStepLR cannot be called with these arguments:"
        " TypeError: 'int' object is not iterable. Change node.milestones",
    ),
]
"""A class, arguments of which the invalid one is unknown, and the error."""


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2))]


def failed(factory: Callable[..., Any], given: Given, argument: Any) -> ConfigError:
    path = ConfigPath("node", keys=frozenset(given))
    with pytest.raises(ConfigError) as raised:
        call_target(functools.partial(factory, **given), path, argument)
    return raised.value


def test_error_names_the_invalid_argument_and_suggests_a_valid_value() -> None:
    with each_row() as row:
        for cases, argument in (
            (OPTIMIZERS, parameters),
            (SCHEDULERS, lambda: optim.SGD(parameters(), lr=0.1)),
        ):
            for factory, given, expected in cases:
                with row((factory.__name__, given)):
                    error = failed(factory, given, argument())
                    assert (
                        error.suggestion.split(" ", 1)[1].removeprefix("for example ") == expected
                    )
                    assert "ARGUMENT" not in str(error)
                    assert "\n" not in str(error)


def test_error_lists_all_arguments_if_the_invalid_one_is_unknown() -> None:
    with each_row() as row:
        for factory, given, expected in UNKNOWN:
            with row((factory.__name__, given)):
                error = failed(factory, given, optim.SGD(parameters(), lr=0.1))
                assert str(error) == expected


def partial(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"torch.optim.lr_scheduler.{name}", "_partial_": True, **arguments}


LINEAR, STEP = partial("LinearLR"), partial("StepLR", step_size=2)
NESTED = partial("SequentialLR", schedulers=[LINEAR, partial("CosineAnnealingLR")], milestones=[3])
PARENTS: list[tuple[dict[str, Any], str, str]] = [
    (
        partial("ChainedScheduler", schedulers=[]),
        "_target_='torch.optim.lr_scheduler.Chain",
        "Chang",
    ),
    (
        partial("SequentialLR", schedulers=[LINEAR, STEP], milestones=[3, 4]),
        "milestones=[3, 4] is not accepted by torch.optim.lr_scheduler.SequentialLR: ",
        "Set milestones=VALUE",
    ),
    (
        partial("ChainedScheduler", schedulers=[partial("LinearLR", start_factor=3), STEP]),
        "schedulers.0.start_factor=3 is not accepted by torch.optim.lr_scheduler.LinearLR: ",
        "Use for example schedulers.0.start_factor=0.3333333333333333",
    ),
    (
        partial("ChainedScheduler", schedulers=[STEP, NESTED]),
        "schedulers.1.schedulers.1.T_max is required by torch.optim.lr_scheduler.CosineAnnealing",
        "Set schedulers.1.schedulers.1.T_max='total_steps'",
    ),
]
"""A scheduler of schedulers, and the prefixes of its error and suggestion."""


@pytest.mark.parametrize("form", [dict, lambda node: instantiate(OmegaConf.create(node))])
def test_error_names_the_invalid_child_scheduler_without_object_reprs(
    form: Callable[[Any], Any],
) -> None:
    with each_row() as row:
        for node, beginning, suggestion in PARENTS:
            with row(beginning):
                with pytest.raises(ConfigError) as raised:
                    build_scheduler(optim.SGD(parameters(), lr=0.1), form(node), 10)
                assert str(raised.value).startswith(beginning)
                assert raised.value.suggestion.startswith(suggestion)
                assert " object at " not in str(raised.value)
                assert "optimizer" not in str(raised.value)


def test_nested_scheduler_of_schedulers_is_built() -> None:
    inner = partial("SequentialLR", schedulers=[LINEAR, STEP], milestones=[3])
    node = partial("ChainedScheduler", schedulers=[inner])
    learning_rates = []
    for form in (node, instantiate(OmegaConf.create(node))):
        adam = optim.SGD(parameters(), lr=0.1)
        scheduler = build_scheduler(adam, form, 10)
        for _ in range(8):
            adam.step()
            scheduler.step()
        learning_rates.append(scheduler.get_last_lr())
    assert learning_rates[0] == learning_rates[1] == [pytest.approx(0.1 * 0.1**2)]


def test_cycle_momentum_is_suggested_as_a_new_key() -> None:
    values = {"max_lr": 1.0, "total_steps": 9}
    composed = OmegaConf.create({"scheduler": partial("OneCycleLR", **values)})
    OmegaConf.set_struct(composed, True)
    with pytest.warns(UserWarning, match=r"set \+scheduler\.cycle_momentum=false$"):
        build_scheduler(optim.Adam(parameters()), composed.scheduler, 10)
