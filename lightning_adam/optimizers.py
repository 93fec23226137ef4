"""Config → torch optimizer: the class, its groups, and the implementation that works here."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Adam, AdamW

from lightning_adam.param_groups import group_name, param_groups
from lightning_adam.schema import AdamConfig, ConfigError, read_optimizer, refusal


class Implementation(NamedTuple):
    """Which of torch's implementations takes the step, and why."""

    fused: bool
    foreach: bool
    reason: str


def build_optimizer(
    module: nn.Module, optimizer: Any, *, fused_obstacle: str | None = None
) -> Adam | AdamW:
    """Builds Adam or AdamW over the named groups of a module, and says once what it built.

    Args:
        module: The module to train; its parameters are on the device they will be trained on.
        optimizer: The optimizer config: a composed Hydra node, a dict, or an `AdamConfig`.
        fused_obstacle: Why the caller's training loop cannot use the fused implementation
            (default: None, it can).

    Returns:
        `torch.optim.AdamW` if the decay is decoupled, else `torch.optim.Adam`, with the groups
        `decay` and `no_decay`, each with its `name` and `param_names`.

    Raises:
        ConfigError: If a value is out of range, eps is 0 in a parameter's dtype, or `fused=true`
            cannot work here.

    Example:
        >>> built = build_optimizer(nn.Linear(3, 4), {"lr": 0.01, "decoupled_weight_decay": True})
        >>> type(built).__name__, [group["name"] for group in built.param_groups]
        ('AdamW', ['decay', 'no_decay'])
    """
    config, where = read_optimizer(optimizer)
    groups = param_groups(module, config.weight_decay, config.weight_decay_on)
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    _check_dtypes(config, where, parameters)
    implementation = choose_implementation(config, where, parameters, fused_obstacle)
    optimizer_class = AdamW if config.decoupled_weight_decay else Adam
    built = optimizer_class(
        groups,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        maximize=config.maximize,
        capturable=config.capturable,
        fused=implementation.fused,
        foreach=implementation.foreach,
    )
    rank_zero_info(f"{optimizer_class.__name__}, {implementation.reason}\n{describe(built)}")
    return built


def choose_implementation(
    config: AdamConfig, where: str, parameters: list[nn.Parameter], fused_obstacle: str | None
) -> Implementation:
    """Takes what the config names; where it names nothing, fused if it works.

    Without fused it is foreach on CUDA and the for-loop elsewhere, as torch chooses too.

    Args:
        config: The optimizer config.
        where: The config's full name, for errors.
        parameters: What will be trained.
        fused_obstacle: Why the training loop cannot use the fused implementation, if it cannot.

    Raises:
        ConfigError: If the config asks for an implementation that cannot work here.

    Example:
        >>> choose_implementation(AdamConfig(), "optimizer", [nn.Parameter(torch.zeros(2))], None)
        Implementation(fused=True, foreach=False, reason='fused: float32 on cpu')
    """
    if config.foreach:
        reason = f"{where}.foreach=true"
    elif config.fused is False:
        reason = f"{where}.fused=false"
    else:
        obstacle = fused_obstacle or _obstacle(config, parameters, fused=True)
        if obstacle is None:
            return Implementation(True, False, f"fused: {', '.join(sorted(_kinds(parameters)))}")
        if config.fused:
            expected = f"expected a place where fused works, but {obstacle}"
            raise refusal(where, "fused", True, expected, None)
        reason = f"not fused, for {obstacle}"
    foreach = config.foreach
    if foreach is None:
        foreach = any(parameter.device.type == "cuda" for parameter in parameters)
    obstacle = _obstacle(config, parameters, foreach=foreach)
    if obstacle is not None:
        raise ConfigError(f"{where}: expected settings that torch can train with, but {obstacle}")
    return Implementation(False, foreach, f"{'foreach' if foreach else 'for-loop'}: {reason}")


def describe(optimizer: torch.optim.Optimizer) -> str:
    """A table of an optimizer's groups.

    Example:
        >>> print(describe(build_optimizer(nn.Linear(3, 4), {"weight_decay": 0.1})))
        group     tensors  parameters  lr     betas         eps    weight_decay  names
        decay     1        12          0.001  (0.9, 0.999)  1e-08  0.1           weight
        no_decay  1        4           0.001  (0.9, 0.999)  1e-08  0             bias
    """
    rows = [("group", "tensors", "parameters", "lr", "betas", "eps", "weight_decay", "names")]
    for group in optimizer.param_groups:
        names = group["param_names"]
        rows.append(
            (
                group["name"],
                str(len(names)),
                f"{sum(parameter.numel() for parameter in group['params']):,}",
                f"{group['lr']:g}",
                f"({group['betas'][0]:g}, {group['betas'][1]:g})",
                f"{group['eps']:g}",
                f"{group['weight_decay']:g}",
                ", ".join(names[:2]) + (", …" if len(names) > 2 else ""),
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
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
        plain["lr"] = group.get("initial_lr", group.get("lr"))
        groups[group_name(group, index)] = plain
    return {"class": type(optimizer).__name__, **optimizer.defaults, "param_groups": groups}


def _kinds(parameters: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    """One parameter of each dtype and device."""
    return {f"{_short(each.dtype)} on {each.device.type}": each for each in parameters}


def _obstacle(config: AdamConfig, parameters: list[nn.Parameter], **flags: Any) -> str | None:
    """What torch itself says against an implementation: one element of each kind takes a step."""
    for kind, parameter in _kinds(parameters).items():
        element = torch.zeros(1, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        element.grad = torch.zeros_like(element)
        try:
            Adam([element], capturable=config.capturable, **flags).step()
        except (RuntimeError, AssertionError) as error:
            return f"{kind} cannot: {error}"
    return None


def _check_dtypes(config: AdamConfig, where: str, parameters: list[nn.Parameter]) -> None:
    """Adam's state has the parameters' dtype: an eps that rounds to 0 there gives 0/0."""
    for dtype in {parameter.dtype for parameter in parameters if parameter.is_floating_point()}:
        if torch.tensor(config.eps, dtype=dtype) == 0:
            expected = f"expected a number that is not 0 in {_short(dtype)}"
            raise refusal(where, "eps", config.eps, expected, 1e-4)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
