"""Optimizers after real steps, and their tensors for the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from tests.support import oracle

Grad = Callable[[Tensor, int], Tensor]
KERNELS = ("eager", "numba")
"""The kernels that measure on the CPU."""


def noise(parameter: Tensor, step: int) -> Tensor:
    return torch.randn(parameter.shape, dtype=torch.float64).to(parameter.dtype)


def stepped(
    parameters: Sequence[Any],
    *,
    steps: int = 3,
    grad: Grad = noise,
    decoupled: bool,
    **settings: Any,
) -> Optimizer:
    """Returns an optimizer after some steps, with the last gradients."""
    optimizer = (AdamW if decoupled else Adam)(parameters, **settings)
    for step in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = grad(parameter, step)
        optimizer.step()
    return optimizer


def reference_tensors(optimizer: Optimizer, group: int | None = None) -> list[oracle.Tensor]:
    """Returns the tensors of an optimizer, or of one of its groups, for the reference."""
    groups = optimizer.param_groups if group is None else [optimizer.param_groups[group]]
    return [
        oracle.Tensor(
            parameter=parameter.detach(),
            grad=parameter.grad,
            exp_avg=optimizer.state[parameter]["exp_avg"],
            exp_avg_sq=optimizer.state[parameter]["exp_avg_sq"],
            max_exp_avg_sq=optimizer.state[parameter].get("max_exp_avg_sq"),
            step=float(optimizer.state[parameter]["step"]),
            lr=each["lr"],
            beta1=each["betas"][0],
            beta2=each["betas"][1],
            eps=each["eps"],
            weight_decay=each["weight_decay"],
            amsgrad=each["amsgrad"],
            maximize=each["maximize"],
            decoupled=each["decoupled_weight_decay"],
        )
        for each in groups
        for parameter in each["params"]
        if parameter.grad is not None
    ]
