"""Optimizer → tensors to measure: what belongs to each parameter right after a step."""

import re
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_adam.param_groups import group_name


@dataclass(frozen=True)
class TensorView:
    """One parameter with all that its step depended on. The tensors are the optimizer's own."""

    group: str
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    """None without amsgrad."""
    step: Tensor | float
    lr: Tensor | float
    beta1: Tensor | float
    beta2: Tensor | float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool


def is_measurable(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step is Adam's or AdamW's, which in torch is an Adam.

    Example:
        >>> import torch
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> is_measurable(torch.optim.AdamW(weights)), is_measurable(torch.optim.SGD(weights))
        (True, False)
    """
    return isinstance(optimizer, Adam)


def tensor_views(optimizer: Optimizer) -> list[TensorView]:
    """The tensors of an optimizer that took part in the step it has just taken.

    Args:
        optimizer: An Adam or AdamW, right after `step()`, its gradients still in place.

    Returns:
        A view for each parameter with a gradient, in the order of `param_groups`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 4)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> [(view.group, view.parameter.shape) for view in tensor_views(adam)]
        [('group_0', torch.Size([4, 3])), ('group_0', torch.Size([4]))]
    """
    views = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            views.append(
                TensorView(
                    group=key_part(group_name(group, index)),
                    parameter=parameter.detach(),
                    grad=parameter.grad,
                    exp_avg=state["exp_avg"],
                    exp_avg_sq=state["exp_avg_sq"],
                    max_exp_avg_sq=state["max_exp_avg_sq"] if group["amsgrad"] else None,
                    step=state["step"],
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decoupled=group["decoupled_weight_decay"],
                    maximize=group["maximize"],
                )
            )
    return views


def key_part(name: object) -> str:
    """A name as it may stand in a key: letters, digits, `_`, `.` and `/`.

    Example:
        >>> key_part("encoder (frozen)")
        'encoder__frozen_'
    """
    return re.sub(r"[^A-Za-z0-9_./]", "_", str(name))
