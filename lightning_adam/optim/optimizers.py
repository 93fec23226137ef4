"""Builds torch optimizers: the class, its parameter groups, and a supported implementation."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_adam.config.calls import call_error
from lightning_adam.config.errors import ConfigError, ConfigPath
from lightning_adam.config.optimizer import (
    AdamConfig,
    CustomOptimizerConfig,
    parse_optimizer,
)
from lightning_adam.config.parsing import parameters_of, target_name
from lightning_adam.optim.console import group_table, log_info
from lightning_adam.optim.param_groups import LR_SCALE, Plan, make_plan
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.names import group_name
from lightning_adam.statistics.sharding import dtensor_types


class Implementation(NamedTuple):
    """A choice between torch's implementations of the step, with its reason."""

    fused: bool
    foreach: bool
    reason: str


def build_optimizer(module: nn.Module, optimizer: Any, root: nn.Module | None = None) -> Optimizer:
    """Builds an Adam-like optimizer over the named parameter groups of a module.

    Logs the implementation and a table of the groups. Groups that are added later, for example by
    `BaseFinetuning`, get their settings from the same config.

    Args:
        module: The module to train, with its parameters on the device of the run.
        optimizer: The optimizer config: a composed Hydra node, a dict, an `AdamConfig`, or any
            class that takes parameter groups, by its `_target_` or as a `functools.partial`.
        root: The module that contains FSDP1's wrappers, if they are outside of `module` (default:
            None, `module`).

    Returns:
        `torch.optim.AdamW` for decoupled decay, otherwise `torch.optim.Adam`, or the class that the
        config names. Each group has a `name` and `param_names`.

    Raises:
        ConfigError: If a value is out of range, eps rounds to 0 in a parameter's dtype, a group
            matches no parameter, or `fused=true` is not supported.

    Example:
        >>> built = build_optimizer(nn.Linear(3, 4), {"lr": 0.01, "decoupled_weight_decay": True})
        >>> type(built).__name__, [group["name"] for group in built.param_groups]
        ('AdamW', ['decay', 'no_decay'])
        >>> node = {"_target_": "torch.optim.NAdam", "weight_decay": 0.1}
        >>> built = build_optimizer(nn.Linear(3, 4), {**node, "weight_decay_on": "matrices"})
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
    make = functools.partial(make_plan, module, config, path, root=root)
    built: Optimizer
    if isinstance(config, CustomOptimizerConfig):
        plan = make(hyperparameters(config.factory))
        built, reason = _build_custom(plan, config), "arguments from the config"
    else:
        plan = make({"lr": config.lr, "weight_decay": config.weight_decay})
        built, reason = _build_adam(plan, config)
    _PLANS[built] = plan
    _plan_later_groups(built, make, _follow_last_group(built))
    log_info(
        "\n".join([f"{type(built).__name__}, {reason}", group_table(built), *plan.layer_lines()])
    )
    return built


_PLANS: WeakKeyDictionary[Optimizer, Plan] = WeakKeyDictionary()


def plan_of(optimizer: Optimizer) -> Plan:
    """Returns the plan from which `build_optimizer` built an optimizer.

    Raises:
        KeyError: If `build_optimizer` did not build it.
    """
    return _PLANS[optimizer]


def _build_adam(plan: Plan, config: AdamConfig) -> tuple[Adam, str]:
    groups = plan.first_groups()
    for group in groups:
        check_eps(group, group.get("eps", config.eps), plan.path_of(group["params"][0], "eps"))
    parameters = [parameter for group in groups for parameter in group["params"]]
    implementation = choose_implementation(config, plan.path, parameters)
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


def _build_custom(plan: Plan, config: CustomOptimizerConfig) -> Optimizer:
    target = target_name(config.factory)
    built = call_target(config.factory, plan.path, plan.first_groups())
    if not isinstance(built, Optimizer):
        problem = "must be a torch.optim.Optimizer"
        raise (plan.path / "_target_").invalid(target, problem, "torch.optim.NAdam")
    for index, group in enumerate(config.groups):
        for name in ("weight_decay", "betas", "eps"):
            value = getattr(group, name)
            if value is not None and name not in built.defaults:
                problem = f"is not a setting of {target}, which has {', '.join(built.defaults)}"
                raise (plan.path / "groups" / index / name).invalid(value, problem, None)
    return built


def call_target(factory: functools.partial[Any], path: ConfigPath, *arguments: Any) -> Any:
    """Calls the target of a config.

    Raises:
        ConfigError: If the call fails. It names the argument at fault if that is known.
    """
    try:
        return factory(*arguments)
    except Exception as error:
        raise call_error(factory, path, arguments, error) from error


def hyperparameters(factory: functools.partial[Any]) -> dict[str, Any]:
    """Returns the arguments of a target: from the config, and the defaults of its signature.

    Example:
        >>> hyperparameters(functools.partial(Adam, weight_decay=0.1))["lr"]
        0.001
    """
    parameters = parameters_of(factory).items()
    known = {name: each.default for name, each in parameters if each.default is not each.empty}
    return known | factory.keywords


def choose_implementation(
    config: AdamConfig, path: ConfigPath, parameters: list[nn.Parameter]
) -> Implementation:
    """Chooses torch's implementation of the step: the configured one, or else fused if supported.

    Without fused it is torch's default: foreach on CUDA and the for-loop elsewhere.

    Args:
        config: The optimizer config.
        path: Its path, for errors.
        parameters: The parameters to train.

    Raises:
        ConfigError: If the configured implementation is not supported.

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
        # Not lr, which a warm-up has already set to its first value.
        peak = group.get("initial_lr", group.get("lr"))
        plain["lr"] = peak.item() if isinstance(peak, Tensor) else peak
        groups[group_name(group, index)] = plain
    return {"class": type(optimizer).__name__, **optimizer.defaults, "param_groups": groups}


def _kinds(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns one parameter of each dtype and device."""
    return {f"{dtype_name(each.dtype)} on {each.device.type}": each for each in parameters}


def unsupported_reason(parameters: Sequence[Tensor], capturable: bool, **flags: Any) -> str | None:
    """Returns torch's error if an implementation is not supported; None if it is.

    It steps one element of each dtype and device.

    Example:
        >>> unsupported_reason([torch.zeros(2)], False, fused=True) is None
        True
    """
    distributed = {isinstance(each, dtensor_types()) for each in parameters}
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


def _plan_later_groups(
    optimizer: Optimizer, make: Callable[..., Plan], after: Callable[[], None]
) -> None:
    """Makes `add_param_group` split, name and schedule a group like the first groups.

    Args:
        optimizer: The optimizer.
        make: Makes the plan again if the module has new parameters.
        after: Called after a group was added.
    """
    add = optimizer.add_param_group

    def add_planned(group: dict[str, Any]) -> None:
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        plan = _PLANS[optimizer]
        if not plan.has_all(params):
            plan = _PLANS[optimizer] = make(plan.hyperparameters)
        for each in plan.later_groups(optimizer, {**group, "params": params}):
            if isinstance(plan.config, AdamConfig):
                eps = each.get("eps", optimizer.defaults["eps"])
                check_eps(each, eps, plan.path_of(each["params"][0], "eps"))
            add(each)
        after()

    optimizer.add_param_group = add_planned  # type: ignore[method-assign,assignment]


def _follow_last_group(optimizer: Optimizer) -> Callable[[], None]:
    """Keeps the ratios of learning rates within a group that `add_param_group` has split.

    `BackboneFinetuning` sets only the learning rate of the last group. The other parts are found by
    their names, because loading a state replaces the group objects.

    Returns:
        A function to call after a group was added.
    """
    last_lr: float | None = None

    def remember() -> None:
        nonlocal last_lr
        last_lr = float(optimizer.param_groups[-1].get("lr", 0.0))

    def follow(*_: Any) -> None:
        groups = optimizer.param_groups
        last, start = groups[-1], re.match(r"group_(\d+)_", groups[-1].get("name", ""))
        if start is None or float(last["lr"]) == last_lr:
            return
        for each in groups[int(start[1]) : -1]:
            rate = last["lr"] * (each[LR_SCALE] / last[LR_SCALE])
            if not math.isclose(each["lr"], rate):
                each["lr"] = rate
        remember()

    optimizer.register_step_pre_hook(torch.compiler.disable(follow))  # type: ignore[no-untyped-call]
    return remember


def check_eps(group: Mapping[str, Any], eps: float, path: ConfigPath) -> None:
    """Checks that eps is not 0 in the dtype of a parameter, which is the dtype of Adam's state.

    Raises:
        ConfigError: If it is 0, so that an update may be 0/0.

    Example:
        >>> group = {"params": [torch.zeros(2)], "param_names": ["weight"]}
        >>> check_eps(group, 1e-8, ConfigPath("optimizer"))
    """
    for dtype in {each.dtype for each in group["params"] if each.is_floating_point()}:
        if rounds_to_0(eps, dtype):
            problem = f"rounds to 0 in {dtype_name(dtype)} ({group['param_names'][0]})"
            raise (path / "eps").invalid(eps, problem, 1e-4)
