"""Collects the facts and settings of a run for rules and loggers."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import either, is_overridden, is_smoke_test
from lightning_adam._compat.torch import flat_shapes
from lightning_adam.config.errors import ConfigPath, Source
from lightning_adam.findings.context import GroupFacts, RunFacts
from lightning_adam.optim.length import run_length
from lightning_adam.optim.optimizers import optimizer_settings, plan_of
from lightning_adam.optim.param_groups import Plan, peak_lr
from lightning_adam.optim.schedulers import Schedule, scheduler_settings
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.names import clean_name, group_name
from lightning_adam.statistics.sharding import dtensor_types
from lightning_adam.statistics.state_reader import steps_as_adam
from lightning_adam.version import __version__

FIELDS_OF_GROUPS = ("betas", "eps", "weight_decay")
"""Settings that the config of a group may override."""


def run_facts(
    trainer: Trainer, module: LightningModule, root: nn.Module, optimizer: Optimizer
) -> RunFacts:
    """Returns the facts of a run.

    Args:
        trainer: The trainer.
        module: The module; suggestions name its config paths.
        root: The module that holds the parameters.
        optimizer: The optimizer.
    """
    paths = getattr(module, "config_paths", (ConfigPath("optimizer"), ConfigPath("scheduler")))
    schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
    own = [each for each in schedules if each.optimizer is optimizer]
    steps = None
    if len(trainer.optimizers) == 1 and not is_smoke_test(trainer):
        steps = run_length(trainer).total_steps
    batches, window = float(trainer.num_training_batches), trainer.accumulate_grad_batches
    batches = batches if math.isfinite(batches) else math.nan
    is_manual = not module.automatic_optimization
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    plan = _plan(optimizer)
    peaks = [_number(peak_lr(group)) for group in optimizer.param_groups]
    return RunFacts(
        defaults={**optimizer.defaults, "lr": _number(optimizer.defaults.get("lr", math.nan))},
        groups=groups_of(optimizer) if steps_as_adam(optimizer) else [],
        optimizer_path=with_config(paths[0] if plan is None else plan.path),
        scheduler_path=with_config(paths[1]),
        schedule=own[0].settings if own and isinstance(own[0], Schedule) else None,
        dtypes=frozenset(dtype_name(each.dtype) for each in parameters),
        peak_lr=max(peaks, default=math.nan),
        total_steps=math.inf if steps is None else steps,
        steps_per_epoch=batches / window,
        batches_per_epoch=math.nan if is_manual else batches,
        accumulate_grad_batches=window,
        samples_per_step=_samples(trainer) * window * trainer.world_size,
        is_clipped=bool(trainer.gradient_clip_val)
        or is_overridden("configure_gradient_clipping", module),
        is_manual_optimization=is_manual,
        ungrouped_parameters=_ungrouped_parameters(trainer, root),
        initial_norm=initial_norm(parameters),
    )


def with_config(path: ConfigPath) -> ConfigPath:
    """Returns a path that includes the name of its config, as findings are read without context."""
    return ConfigPath(path.config, path.field) if path.source is Source.PYTHON else path


def _samples(trainer: Trainer) -> float:
    """Returns the number of samples in a batch; NaN if unknown."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return float(size) if isinstance(size, int) else math.nan


def initial_norm(parameters: Sequence[Tensor]) -> float:
    """Returns the norm of the matrices under a standard initialization (variance 1/fan_in).

    Example:
        >>> initial_norm([torch.zeros(4, 100), torch.zeros(100)])
        2.0
    """
    matrices = [each.shape for each in parameters if each.ndim > 1]
    return math.sqrt(sum(shape[0] for shape in matrices))


def _ungrouped_parameters(trainer: Trainer, module: nn.Module) -> list[str]:
    """Returns the names of the parameters that require a gradient but are in no parameter group."""
    groups = [group for each in trainer.optimizers for group in each.param_groups]
    grouped = {id(parameter): parameter for group in groups for parameter in group["params"]}
    own = set(map(id, module.parameters()))
    # After a validation, FSDP2 exposes unsharded parameters instead of the shards in the groups.
    sharded = Counter(
        parameter.shape
        for key, parameter in grouped.items()
        if key not in own and isinstance(parameter, dtensor_types())
    )
    ungrouped = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or id(parameter) in grouped:
            continue
        if sharded[parameter.shape]:
            sharded[parameter.shape] -= 1
        else:
            ungrouped.append(clean_name(name))
    return ungrouped


def groups_of(optimizer: Optimizer) -> list[GroupFacts]:
    """Returns the parameter groups of an optimizer at the start of training."""
    groups = enumerate(optimizer.param_groups)
    return [_group(optimizer, group_name(group, index), group) for index, group in groups]


def _plan(optimizer: Optimizer) -> Plan | None:
    """Returns the plan of an optimizer; None if `build_optimizer` did not build it."""
    try:
        return plan_of(optimizer)
    except KeyError:
        return None


def _group(optimizer: Optimizer, name: str, group: Mapping[str, Any]) -> GroupFacts:
    dtypes = {each.dtype for each in group["params"] if each.is_floating_point()}
    eps = float(group["eps"])
    settings = {**group, "lr": _number(peak_lr(group)), "betas": [*map(_number, group["betas"])]}
    plan, paths = _plan(optimizer), {}
    if plan is not None and group["params"]:
        first = group["params"][0]
        places = {field: with_config(plan.path_of(first, field)) for field in FIELDS_OF_GROUPS}
        paths = {field: place / field for field, place in places.items() if place.field}
    return GroupFacts(
        name,
        {key: value for key, value in settings.items() if key not in ("params", "param_names")},
        paths,
        {dtype_name(dtype): 0.0 if rounds_to_0(eps, dtype) else eps for dtype in dtypes},
        {dtype_name(dtype): torch.finfo(dtype).eps for dtype in dtypes},
    )


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def run_settings(
    trainer: Trainer, root: nn.Module, optimizers: Sequence[Optimizer], names: Sequence[str]
) -> dict[str, Any]:
    """Returns the resolved settings of the optimizers, schedules and run, for the run's config.

    Args:
        trainer: The trainer.
        root: The module that holds the parameters.
        optimizers: The optimizers.
        names: Their names; empty for a single optimizer.
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
        "run": {
            "parameters": _number_of_parameters(root),
            "device": _device(trainer),
            "precision": str(trainer.precision),
            "strategy": _snake_case(type(trainer.strategy).__name__.removesuffix("Strategy")),
            "metric": _metric(trainer),
        },
    }


def _number_of_parameters(root: nn.Module) -> int:
    """Returns the number of parameters of the whole model, even if it is sharded."""
    shapes = flat_shapes(root)
    return sum(math.prod(shapes.get(id(each), each.shape)) for each in root.parameters())


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def _snake_case(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _metric(trainer: Trainer) -> dict[str, str] | None:
    """Returns the metric that a checkpoint, early stopping or a plateau schedule monitors."""
    kinds = either("callbacks.ModelCheckpoint") + either("callbacks.EarlyStopping")
    candidates = [each for each in trainer.callbacks if isinstance(each, kinds)]  # type: ignore[attr-defined]
    found: list[tuple[Any, Any]] = [(each.monitor, each) for each in candidates]
    for entry in trainer.lr_scheduler_configs:
        plateau = getattr(entry.scheduler, "plateau", None)
        found.append((entry.monitor, plateau or entry.scheduler))
    for name, owner in found:
        if name is not None:
            return {"name": name, "mode": str(getattr(owner, "mode", "min"))}
    return None
