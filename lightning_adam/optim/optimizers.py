"""Config → torch optimizer: the class, its parameter groups, and the supported implementation."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_adam.config.errors import ConfigError, ConfigPath, Placeholder
from lightning_adam.config.optimizer import (
    AdamConfig,
    CustomOptimizerConfig,
    WeightDecayOn,
    parse_optimizer,
)
from lightning_adam.config.parsing import target_name
from lightning_adam.optim.console import group_table, log_info
from lightning_adam.optim.param_groups import later_groups, param_groups
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.names import group_name
from lightning_adam.statistics.sharding import distributed_tensor


class Implementation(NamedTuple):
    """One of torch's implementations of the step, and the reason for the choice."""

    fused: bool
    foreach: bool
    reason: str


def build_optimizer(module: nn.Module, optimizer: Any) -> Optimizer:
    """Builds an Adam-like optimizer over the named parameter groups of a module.

    Logs the implementation and a table of the groups. Groups that are added later, for example by
    `BaseFinetuning`, are split into decay and no decay as well.

    Args:
        module: The module to train, with its parameters on the device of the training.
        optimizer: The optimizer config: a composed Hydra node, a dict, an `AdamConfig`, or any
            class that takes parameter groups, by its `_target_` or as a `functools.partial`.

    Returns:
        `torch.optim.AdamW` for decoupled decay, otherwise `torch.optim.Adam`, or the class that the
        config names. Each group has a `name` and `param_names`.

    Raises:
        ConfigError: If a value is out of range, eps is 0 in a parameter's dtype, a group matches no
            parameter, or `fused=true` is not supported here.

    Example:
        >>> built = build_optimizer(nn.Linear(3, 4), {"lr": 0.01, "decoupled_weight_decay": True})
        >>> type(built).__name__, [group["name"] for group in built.param_groups]
        ('AdamW', ['decay', 'no_decay'])
        >>> node = {"_target_": "torch.optim.NAdam", "weight_decay": 0.1}
        >>> built = build_optimizer(nn.Linear(3, 4), node)
        >>> type(built).__name__, [group["weight_decay"] for group in built.param_groups]
        ('NAdam', [0.1, 0.0])
    """
    parsed = parse_optimizer(optimizer)
    config, path = parsed.config, parsed.path
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{path.name} needs a torch.nn.Module to train, not {type(module).__name__}",
            "Pass the module, not its parameters",
        )
    built: Optimizer
    if isinstance(config, CustomOptimizerConfig):
        built, reason = _build_custom(module, config, path), "arguments from the config"
    else:
        built, reason = _build_adam(module, config, path)
    _split_later_groups(built, module, config.weight_decay_on)
    log_info(f"{type(built).__name__}, {reason}\n{group_table(built)}")
    return built


def _build_adam(module: nn.Module, config: AdamConfig, path: ConfigPath) -> tuple[Adam, str]:
    groups = param_groups(
        module, config, path, {"lr": config.lr, "weight_decay": config.weight_decay}
    )
    _check_eps_of_groups(config, path, groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    implementation = choose_implementation(config, path, parameters)
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


def _build_custom(module: nn.Module, config: CustomOptimizerConfig, path: ConfigPath) -> Optimizer:
    target = target_name(config.factory)
    groups = param_groups(module, config, path, hyperparameters(config.factory))
    built = call_target(config.factory, path, groups)
    if not isinstance(built, Optimizer):
        problem = "must be a torch.optim.Optimizer"
        raise (path / "_target_").invalid(target, problem, "torch.optim.NAdam")
    for index, group in enumerate(config.groups):
        for name in ("weight_decay", "betas", "eps"):
            value = getattr(group, name)
            if value is not None and name not in built.defaults:
                problem = f"is not a setting of {target}, which has {', '.join(built.defaults)}"
                raise (path / "groups" / index / name).invalid(value, problem, None)
    return built


def call_target(factory: functools.partial[Any], path: ConfigPath, argument: Any) -> Any:
    """Calls the target of a config.

    Raises:
        ConfigError: If the call fails.

    Example:
        >>> call_target(functools.partial(int), ConfigPath("optimizer"), "3")
        3
    """
    try:
        return factory(argument)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise (path / "_target_").error(
            f"cannot be called with these arguments: {cause}",
            f"Set {(path / 'ARGUMENT').override(Placeholder('VALUE'))}",
            value=target_name(factory),
        ) from error


def hyperparameters(factory: functools.partial[Any]) -> dict[str, Any]:
    """Returns the known arguments of a target: those given, and the defaults of its signature.

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
    config: AdamConfig, path: ConfigPath, parameters: list[nn.Parameter]
) -> Implementation:
    """Chooses torch's implementation of the step: the configured one, otherwise fused if supported.

    Without fused it is foreach on CUDA and the for-loop elsewhere, which is torch's own choice.

    Args:
        config: The optimizer config.
        path: Its place, for errors.
        parameters: The parameters to train.

    Raises:
        ConfigError: If the configured implementation is not supported here.

    Example:
        >>> path = ConfigPath("optimizer")
        >>> choose_implementation(AdamConfig(), path, [nn.Parameter(torch.zeros(2))])
        Implementation(fused=True, foreach=False, reason='fused: float32 on cpu')
    """
    if config.foreach:
        reason = (path / "foreach").assignment(True)
    elif config.fused is False:
        reason = (path / "fused").assignment(False)
    else:
        unsupported = unsupported_reason(parameters, config.capturable, fused=True)
        if unsupported is None:
            return Implementation(True, False, f"fused: {', '.join(sorted(_kinds(parameters)))}")
        if config.fused:
            problem = f"is not supported here: {unsupported}"
            raise (path / "fused").invalid(True, problem, None)
        reason = f"fused is not supported: {unsupported}"
    foreach = config.foreach
    if foreach is None:
        foreach = any(parameter.device.type == "cuda" for parameter in parameters)
    unsupported = unsupported_reason(parameters, config.capturable, foreach=foreach)
    if unsupported is not None:
        name, example = ("capturable", False) if config.capturable else ("foreach", None)
        problem = f"is not supported here: {unsupported}"
        raise (path / name).invalid(getattr(config, name), problem, example)
    return Implementation(False, foreach, f"{'foreach' if foreach else 'for-loop'}: {reason}")


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the settings of an optimizer for a run's config: its class, defaults and groups.

    Example:
        >>> recorded = optimizer_settings(build_optimizer(nn.Linear(3, 4), {"weight_decay": 0.1}))
        >>> recorded["class"], recorded["param_groups"]["no_decay"]["weight_decay"]
        ('Adam', 0.0)
    """
    groups = {}
    for index, group in enumerate(optimizer.param_groups):
        plain = {key: value for key, value in group.items() if key in optimizer.defaults}
        # The peak: a warm-up has already set lr to its first value.
        peak = group.get("initial_lr", group.get("lr"))
        plain["lr"] = peak.item() if isinstance(peak, Tensor) else peak
        groups[group_name(group, index)] = plain
    return {"class": type(optimizer).__name__, **optimizer.defaults, "param_groups": groups}


def _kinds(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """One parameter of each dtype and device."""
    return {f"{dtype_name(each.dtype)} on {each.device.type}": each for each in parameters}


def unsupported_reason(parameters: Sequence[Tensor], capturable: bool, **flags: Any) -> str | None:
    """Returns torch's own objection to an implementation; None if it is supported.

    One element of each dtype and device takes a step.

    Example:
        >>> unsupported_reason([torch.zeros(2)], False, fused=True) is None
        True
    """
    distributed = {isinstance(each, distributed_tensor()) for each in parameters}
    if len(distributed) > 1 and (flags.get("fused") or flags.get("foreach")):
        return "some parameters are DTensors and others are plain tensors"
    for kind, parameter in _kinds(parameters).items():
        element = torch.zeros(1, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        element.grad = torch.zeros_like(element)
        try:
            Adam([element], capturable=capturable, **flags).step()
        except (RuntimeError, AssertionError) as error:
            return f"{kind}: {error}"
    return None


def _split_later_groups(
    optimizer: Optimizer, module: nn.Module, weight_decay_on: WeightDecayOn
) -> None:
    """Makes `add_param_group` split, name and schedule a group as the first ones are."""
    add = optimizer.add_param_group

    def add_split(group: dict[str, Any]) -> None:
        for each in later_groups(module, optimizer, group, weight_decay_on):
            add(each)

    optimizer.add_param_group = add_split  # type: ignore[method-assign,assignment]


def _check_eps_of_groups(
    config: AdamConfig, path: ConfigPath, groups: Sequence[Mapping[str, Any]]
) -> None:
    for group in groups:
        eps, place = group.get("eps", config.eps), path
        if "eps" in group:
            own = (
                group["name"].startswith(each.name) and each.eps == eps for each in config.groups
            )
            place = path / "groups" / list(own).index(True)
        check_eps(group, eps, place)


def check_eps(group: Mapping[str, Any], eps: float, path: ConfigPath) -> None:
    """Raises if eps is 0 in the dtype of a parameter, which is the dtype of Adam's state: 0/0.

    Raises:
        ConfigError: If it is.

    Example:
        >>> group = {"params": [torch.zeros(2)], "param_names": ["weight"]}
        >>> check_eps(group, 1e-8, ConfigPath("optimizer"))
    """
    for dtype in {each.dtype for each in group["params"] if each.is_floating_point()}:
        if rounds_to_0(eps, dtype):
            problem = f"rounds to 0 in {dtype_name(dtype)} ({group['param_names'][0]})"
            raise (path / "eps").invalid(eps, problem, 1e-4)
