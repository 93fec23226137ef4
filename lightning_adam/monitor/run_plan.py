"""What the rules know of a run before its first step: lengths, settings, and the parameters."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import is_smoke_test
from lightning_adam.config.errors import ConfigPath, Source
from lightning_adam.findings.preflight import Plan, PlannedGroup
from lightning_adam.findings.rule import Training
from lightning_adam.optim.length import steps_of
from lightning_adam.optim.optimizers import optimizer_settings
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.optim.schedulers import scheduler_settings
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.names import clean_name, group_name
from lightning_adam.statistics.sharding import distributed_tensor
from lightning_adam.statistics.state_reader import steps_as_adam
from lightning_adam.version import __version__


def training_facts(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, every_n_steps: int
) -> Training:
    """Returns the facts of a run that rules read beside the measurements.

    Args:
        trainer: The trainer.
        module: The module, whose configs are named in suggestions.
        optimizer: The optimizer.
        every_n_steps: Optimizer steps from one measurement to the next.
    """
    paths = getattr(module, "config_paths", (ConfigPath("optimizer"), ConfigPath("scheduler")))
    peaks = [_number(peak_lr(group)) for group in optimizer.param_groups]
    steps = None
    if len(trainer.optimizers) == 1 and not is_smoke_test(trainer):
        steps = steps_of(trainer)
    epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return Training(
        defaults={**optimizer.defaults, "lr": _number(optimizer.defaults.get("lr", math.nan))},
        optimizer_path=_with_config(paths[0]),
        scheduler_path=_with_config(paths[1]),
        dtypes=frozenset(dtype_name(each.dtype) for each in parameters),
        peak_lr=max(peaks, default=math.nan),
        total_steps=math.inf if steps is None else steps,
        every_n_steps=every_n_steps,
        steps_per_epoch=epoch if math.isfinite(epoch) else math.nan,
    )


def _with_config(path: ConfigPath) -> ConfigPath:
    """A path that names its config: a finding is read without its context."""
    return ConfigPath(path.config) if path.source is Source.PYTHON else path


def run_plan(trainer: Trainer, module: nn.Module, optimizer: Optimizer, training: Training) -> Plan:
    """Returns what is about to be trained, for the preflight notices.

    Args:
        trainer: The trainer.
        module: The module that holds the parameters.
        optimizer: The optimizer.
        training: The facts that `training_facts` returns.
    """
    schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
    own = [scheduler_settings(each) for each in schedules if each.optimizer is optimizer]
    return Plan(
        training=training,
        groups=[
            _planned(group_name(group, index), group)
            for index, group in enumerate(optimizer.param_groups)
            if steps_as_adam(optimizer)
        ],
        schedule=own[0] if own else {},
        left_out=_left_out(trainer, module),
    )


def _left_out(trainer: Trainer, module: nn.Module) -> list[str]:
    """The names of the parameters that require a gradient and are in no group."""
    groups = [group for each in trainer.optimizers for group in each.param_groups]
    grouped = {id(parameter): parameter for group in groups for parameter in group["params"]}
    own = set(map(id, module.parameters()))
    # After a validation, FSDP2 shows whole parameters in place of the groups' shards.
    sharded = Counter(
        parameter.shape
        for key, parameter in grouped.items()
        if key not in own and isinstance(parameter, distributed_tensor())
    )
    left_out = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or id(parameter) in grouped:
            continue
        if sharded[parameter.shape]:
            sharded[parameter.shape] -= 1
        else:
            left_out.append(clean_name(name))
    return left_out


def _planned(name: str, group: Mapping[str, Any]) -> PlannedGroup:
    dtypes = {each.dtype for each in group["params"] if each.is_floating_point()}
    eps = float(group["eps"])
    settings = {**group, "lr": _number(peak_lr(group)), "betas": [*map(_number, group["betas"])]}
    return PlannedGroup(
        name,
        {key: value for key, value in settings.items() if key != "params"},
        {dtype_name(dtype): 0.0 if rounds_to_0(eps, dtype) else eps for dtype in dtypes},
        {dtype_name(dtype): torch.finfo(dtype).eps for dtype in dtypes},
    )


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def run_settings(
    trainer: Trainer, optimizers: Sequence[Optimizer], names: Sequence[str]
) -> dict[str, Any]:
    """Returns the resolved settings of optimizers and schedules, for the run's config.

    Args:
        trainer: The trainer.
        optimizers: Its optimizers.
        names: Their names; that of a single one is empty.
    """
    settings = dict(zip(names, map(optimizer_settings, optimizers), strict=True))
    schedulers = {
        name: scheduler_settings(entry.scheduler)
        for name, optimizer in zip(names, optimizers, strict=True)
        for entry in trainer.lr_scheduler_configs
        if entry.scheduler.optimizer is optimizer
    }
    return {
        "version": __version__,
        "optimizer": settings.get("", settings),
        "scheduler": schedulers.get("", schedulers) or None,
    }
