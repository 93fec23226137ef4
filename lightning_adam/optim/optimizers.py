"""Config → torch optimizer: the class, its groups, and the implementation that works here."""

import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_adam.config.errors import ConfigError, refusal
from lightning_adam.config.forms import name_of
from lightning_adam.config.reading import CustomOptimizer, read_optimizer
from lightning_adam.config.schema import AdamConfig, WeightDecayOn
from lightning_adam.optim.param_groups import later_groups, param_groups
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.names import clean_name, group_name
from lightning_adam.statistics.sharding import distributed_tensor

SHOWN = ("lr", "betas", "eps", "weight_decay")
"""The settings that `describe` shows, where the optimizer has them."""


class Implementation(NamedTuple):
    """Which of torch's implementations takes the step, and why."""

    fused: bool
    foreach: bool
    reason: str


def build_optimizer(module: nn.Module, optimizer: Any) -> Optimizer:
    """Builds Adam, AdamW or a class of another library over the named groups of a module.

    Says once what it built. A group that is added later, as `BaseFinetuning` does, is sorted into
    what decays and what does not, as the first ones are.

    Args:
        module: The module to train; its parameters are on the device they will be trained on.
        optimizer: The optimizer config: a composed Hydra node, a dict, an `AdamConfig`, or, with
            a `_target_` or as a `functools.partial`, any class that takes parameter groups.

    Returns:
        `torch.optim.AdamW` if the decay is decoupled, else `torch.optim.Adam`, or what the config
        names; its groups have each a `name` and `param_names`.

    Raises:
        ConfigError: If a value is out of range, eps is 0 in a parameter's dtype, a group is for no
            parameter, or `fused=true` cannot work here.

    Example:
        >>> built = build_optimizer(nn.Linear(3, 4), {"lr": 0.01, "decoupled_weight_decay": True})
        >>> type(built).__name__, [group["name"] for group in built.param_groups]
        ('AdamW', ['decay', 'no_decay'])
        >>> node = {"_target_": "torch.optim.NAdam", "weight_decay": 0.1}
        >>> built = build_optimizer(nn.Linear(3, 4), node)
        >>> type(built).__name__, [group["weight_decay"] for group in built.param_groups]
        ('NAdam', [0.1, 0.0])
    """
    config, where = read_optimizer(optimizer)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{where}: expected a torch.nn.Module to train, but got {type(module).__name__}; give"
            " the module itself, not its parameters"
        )
    if isinstance(config, CustomOptimizer):
        built, reason = _custom(module, config, where), "as its config calls it"
    else:
        built, reason = _adam(module, config, where)
    _sort_later_groups(built, module, config.weight_decay_on)
    rank_zero_info(f"{type(built).__name__}, {reason}\n{describe(built)}")
    return built


def _adam(module: nn.Module, config: AdamConfig, where: str) -> tuple[Adam, str]:
    groups = param_groups(
        module, config, where, {"lr": config.lr, "weight_decay": config.weight_decay}
    )
    _check_group_eps(config, where, groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    implementation = choose_implementation(config, where, parameters)
    adam = AdamW if config.decoupled_weight_decay else Adam
    built = adam(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        amsgrad=config.amsgrad,
        maximize=config.maximize,
        capturable=config.capturable,
        fused=implementation.fused,
        foreach=implementation.foreach,
    )
    return built, implementation.reason


def _custom(module: nn.Module, config: CustomOptimizer, where: str) -> Optimizer:
    """The class that the config names, over our groups."""
    target = name_of(config.factory)
    groups = param_groups(module, config, where, hyperparameters(config.factory))
    try:
        built = config.factory(groups)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{where}._target_={target}: expected arguments that it takes, but {cause}; type"
            f" {where}.ARGUMENT=VALUE"
        ) from error
    if not isinstance(built, Optimizer):
        raise refusal(
            where, "_target_", target, "expected a torch.optim.Optimizer", "torch.optim.NAdam"
        )
    for index, group in enumerate(config.groups):
        for name in ("weight_decay", "betas", "eps"):
            if getattr(group, name) is not None and name not in built.defaults:
                expected = f"expected a setting of {target}, whose groups have"
                expected += f" {', '.join(built.defaults)}"
                raise refusal(f"{where}.groups.{index}", name, getattr(group, name), expected, None)
    return built


def hyperparameters(factory: functools.partial[Any]) -> dict[str, Any]:
    """The arguments that a class will be built with, as far as that is known.

    Example:
        >>> hyperparameters(functools.partial(Adam, weight_decay=0.1))["lr"]
        0.001
    """
    try:
        parameters = inspect.signature(factory.func).parameters
    except (TypeError, ValueError):
        return dict(factory.keywords)
    defaults = {name: each.default for name, each in parameters.items()}
    known = {
        name: value for name, value in defaults.items() if value is not inspect.Parameter.empty
    }
    return known | factory.keywords


def choose_implementation(
    config: AdamConfig, where: str, parameters: list[nn.Parameter]
) -> Implementation:
    """Takes what the config names; where it names nothing, fused if it works.

    Without fused it is foreach on CUDA and the for-loop elsewhere, as torch chooses too.

    Args:
        config: The optimizer config.
        where: The config's full name, for errors.
        parameters: What will be trained.

    Raises:
        ConfigError: If the config asks for an implementation that cannot work here.

    Example:
        >>> choose_implementation(AdamConfig(), "optimizer", [nn.Parameter(torch.zeros(2))])
        Implementation(fused=True, foreach=False, reason='fused: float32 on cpu')
    """
    if config.foreach:
        reason = f"{where}.foreach=true"
    elif config.fused is False:
        reason = f"{where}.fused=false"
    else:
        obstacle = obstacle_to(parameters, config.capturable, fused=True)
        if obstacle is None:
            return Implementation(True, False, f"fused: {', '.join(sorted(_kinds(parameters)))}")
        if config.fused:
            expected = f"expected a place where fused works, but {obstacle}"
            raise refusal(where, "fused", True, expected, None)
        reason = f"not fused, for {obstacle}"
    foreach = config.foreach
    if foreach is None:
        foreach = any(parameter.device.type == "cuda" for parameter in parameters)
    obstacle = obstacle_to(parameters, config.capturable, foreach=foreach)
    if obstacle is not None:
        name, instead = ("capturable", False) if config.capturable else ("foreach", None)
        expected = f"expected a setting that torch can train with, but {obstacle}"
        raise refusal(where, name, getattr(config, name), expected, instead)
    return Implementation(False, foreach, f"{'foreach' if foreach else 'for-loop'}: {reason}")


def describe(optimizer: Optimizer) -> str:
    """A table of an optimizer's groups.

    Example:
        >>> print(describe(build_optimizer(nn.Linear(3, 4), {"weight_decay": 0.1})))
        group     tensors  parameters  lr     betas         eps    weight_decay  names
        decay     1        12          0.001  (0.9, 0.999)  1e-08  0.1           weight
        no_decay  1        4           0.001  (0.9, 0.999)  1e-08  0             bias
    """
    columns = [name for name in SHOWN if name in optimizer.defaults]
    rows = [["group", "tensors", "parameters", *columns, "names"]]
    for group in optimizer.param_groups:
        names = group["param_names"]
        rows.append(
            [
                group["name"],
                str(len(names)),
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                *(_shown(group[column]) for column in columns),
                ", ".join(names[:2]) + (", …" if len(names) > 2 else ""),
            ]
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, Tensor):
        value = value.item()
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def settings(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer as a run's config records it: torch's own defaults and groups.

    Example:
        >>> recorded = settings(build_optimizer(nn.Linear(3, 4), {"weight_decay": 0.1}))
        >>> recorded["class"], recorded["param_groups"]["no_decay"]["weight_decay"]
        ('Adam', 0.0)
    """
    groups = {}
    for index, group in enumerate(optimizer.param_groups):
        plain = {key: value for key, value in group.items() if key in optimizer.defaults}
        # A warm-up has set lr to 0 by now; the peak is what was asked for.
        peak = group.get("initial_lr", group.get("lr"))
        plain["lr"] = peak.item() if isinstance(peak, Tensor) else peak
        groups[group_name(group, index)] = plain
    return {"class": type(optimizer).__name__, **optimizer.defaults, "param_groups": groups}


def names_of(optimizers: Sequence[Optimizer], module: nn.Module) -> list[str]:
    """What tells several optimizers of a module apart: the part of it that each trains, if any.

    Args:
        optimizers: The optimizers; the name of the only one is empty.
        module: What they train.

    Returns:
        The shortest paths of modules that differ, or the optimizers' positions.

    Example:
        >>> gan = nn.ModuleDict({"generator": nn.Linear(3, 4), "discriminator": nn.Linear(4, 1)})
        >>> names_of([torch.optim.Adam(gan[part].parameters()) for part in gan], gan)
        ['generator', 'discriminator']
    """
    if len(optimizers) == 1:
        return [""]
    names = {id(each): clean_name(name).split(".") for name, each in module.named_parameters()}
    paths = []
    for optimizer in optimizers:
        parameters = (each for group in optimizer.param_groups for each in group["params"])
        owners = [names[id(each)][:-1] for each in parameters if id(each) in names]
        paths.append(_common_path(owners))
    numbers = [str(index) for index in range(len(optimizers))]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        found = [".".join(path[:depth]) for path in paths]
        if len(set(found)) == len(found):
            named = [name or number for name, number in zip(found, numbers, strict=True)]
            # A part may itself be called by a number.
            return named if len(set(named)) == len(named) else numbers
    return numbers


def _common_path(paths: Sequence[Sequence[str]]) -> Sequence[str]:
    """The parts that all paths begin with."""
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in shared]


def _kinds(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """One parameter of each dtype and device."""
    return {f"{dtype_name(each.dtype)} on {each.device.type}": each for each in parameters}


def obstacle_to(parameters: Sequence[Tensor], capturable: bool, **flags: Any) -> str | None:
    """What torch itself says against an implementation: one element of each kind takes a step.

    Example:
        >>> obstacle_to([torch.zeros(2)], False, fused=True) is None
        True
    """
    distributed = {isinstance(each, distributed_tensor()) for each in parameters}
    if len(distributed) > 1 and (flags.get("fused") or flags.get("foreach")):
        return "some parameters are DTensors and others plain tensors, which cannot stand together"
    for kind, parameter in _kinds(parameters).items():
        element = torch.zeros(1, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        element.grad = torch.zeros_like(element)
        try:
            Adam([element], capturable=capturable, **flags).step()
        except (RuntimeError, AssertionError) as error:
            return f"{kind} cannot: {error}"
    return None


def _sort_later_groups(
    optimizer: Optimizer, module: nn.Module, weight_decay_on: WeightDecayOn
) -> None:
    """Has groups that are added from now on sorted, named and scheduled as the first ones are."""
    add = optimizer.add_param_group

    def add_sorted(group: dict[str, Any]) -> None:
        for each in later_groups(module, optimizer, group, weight_decay_on):
            add(each)

    optimizer.add_param_group = add_sorted  # type: ignore[method-assign,assignment]


def _check_group_eps(config: AdamConfig, where: str, groups: Sequence[Mapping[str, Any]]) -> None:
    for group in groups:
        eps, place = group.get("eps", config.eps), where
        if "eps" in group:
            own = (
                group["name"].startswith(each.name) and each.eps == eps for each in config.groups
            )
            place = f"{where}.groups.{list(own).index(True)}"
        check_eps(group, eps, place)


def check_eps(group: Mapping[str, Any], eps: float, where: str) -> None:
    """Adam's state has the parameters' dtype: an eps that rounds to 0 there gives 0/0.

    Raises:
        ConfigError: If it does.

    Example:
        >>> check_eps({"params": [torch.zeros(2)], "param_names": ["weight"]}, 1e-8, "optimizer")
    """
    for dtype in {each.dtype for each in group["params"] if each.is_floating_point()}:
        if rounds_to_0(eps, dtype):
            expected = f"expected a number that is not 0 in {dtype_name(dtype)}"
            expected += f", the dtype of {group['param_names'][0]}"
            raise refusal(where, "eps", eps, expected, 1e-4)
