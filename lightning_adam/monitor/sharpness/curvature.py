"""The curvature that Adam's steps see: the Hessian of a loss, preconditioned as a step is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam.config.errors import ConfigError

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix, as what it makes of a vector."""


class Eigenpair(NamedTuple):
    """The largest eigenvalue of a symmetric matrix, and its direction."""

    value: float
    vector: Tensor
    """Of length 1."""


class Stability(NamedTuple):
    """How one parameter's curvature counts towards instability: H becomes scale·(±H + λ)·scale."""

    parameter: Tensor
    scale: Tensor
    """The root of η(1-β1)/(2+2β1)/P of each element, in the parameter's shape."""
    weight_decay: float
    """λ, where the decay is coupled: it is a part of the gradient, and so of the Hessian."""
    maximize: bool


def stability_of(optimizer: Optimizer, lrs: Sequence[float]) -> list[Stability]:
    """What each parameter that Adam has stepped brings along.

    P = (1-β1ᵗ)(√v̂+ε) is Adam's preconditioner. Preconditioned gradient descent with momentum β1
    is stable while λ₁(P⁻¹H) is below (2+2β1)/((1-β1)η) (Cohen et al. 2022, arXiv 2207.14484).

    Args:
        optimizer: Adam or AdamW, after a step.
        lrs: The learning rates of its groups, as the step used them.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> adam = torch.optim.Adam([weight], lr=0.1, eps=0.0)
        >>> weight.sum().backward()
        >>> adam.step()
        >>> (stability,) = stability_of(adam, [0.1])
        >>> (stability.scale**2 * 38).round(decimals=4)
        tensor([1., 1.])
    """
    found = []
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        beta1, beta2 = map(float, group["betas"])
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            step = float(state.get("step", 0))
            if step < 1 or not parameter.requires_grad:
                continue
            moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            moment = moment.to(torch.promote_types(moment.dtype, torch.float32))
            root = (moment / (1 - beta2**step)).sqrt()
            preconditioner = (1 - beta1**step) * (root + group["eps"])
            scale = (lr * (1 - beta1) / (2 + 2 * beta1) / preconditioner).sqrt()
            decay = 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])
            found.append(Stability(parameter, scale, decay, group["maximize"]))
    return found


def preconditioned_hessian(
    loss: Tensor, parameters: Sequence[Tensor], stability: Sequence[Stability]
) -> Product:
    """D^½(H+λ)D^½, which has the eigenvalues of D(H+λ) and is symmetric.

    D is η(1-β1)/(2+2β1)·P⁻¹ of each element: 1 is the largest stable eigenvalue, whatever the
    groups' learning rates and betas.

    Args:
        loss: Of the parameters.
        parameters: What it was computed with, in the place of those that the optimizer has.
        stability: Of each of them.

    Raises:
        ConfigError: If the loss cannot be differentiated by them.
    """
    scales = [each.scale for each in stability]
    sign = -1.0 if any(each.maximize for each in stability) else 1.0
    with _twice():
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        _refuse_once_differentiable(gradients)
    # Of a parameter that does not enter the loss, or only linearly, there is nothing more to know.
    curved = [each for each in gradients if each is not None and each.requires_grad]

    def product(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [scale.numel() for scale in scales])
        directions = [
            part.view_as(scale) * scale for part, scale in zip(parts, scales, strict=True)
        ]
        along = [
            direction.to(gradient.dtype)
            for direction, gradient in zip(directions, gradients, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        bent: Sequence[Tensor | None] = [None] * len(parameters)
        if curved:
            with _twice():
                bent = torch.autograd.grad(
                    curved, parameters, along, retain_graph=True, allow_unused=True
                )
        rows = zip(stability, scales, directions, bent, strict=True)
        return torch.cat(
            [
                scale.mul(
                    each.weight_decay * direction + (0 if second is None else sign * second)
                ).flatten()
                for each, scale, direction, second in rows
            ]
        )

    return product


def _refuse_once_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """By itself torch passes over the nodes that would say so: no parameter lies behind them."""
    waiting = [each.grad_fn for each in gradients if each is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function of it is marked with @once_differentiable")
        waiting += [each for each, _ in node.next_functions]


@contextmanager
def _twice() -> Iterator[None]:
    """What torch says of an operation without a second derivative, as a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = " ".join(str(error).split())
        raise ConfigError(
            f"SharpnessMonitor cannot differentiate the loss twice: {cause}",
            "Use SharpnessMonitor(loss=...) with other operations, or remove the callback",
        ) from error


def largest_eigenvalue(
    product: Product, start: Tensor, iterations: int, tolerance: float
) -> Eigenpair:
    """The largest eigenvalue, by Lanczos' method with full reorthogonalisation.

    What it finds never exceeds the eigenvalue, up to rounding, and grows with the iterations. A
    matrix with NaN has NaN.

    Args:
        product: The matrix.
        start: A vector that is not orthogonal to the direction sought.
        iterations: The most products to form, and vectors to keep.
        tolerance: The residual, as a share of the eigenvalue, at which it ends earlier.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0]))
        >>> round(largest_eigenvalue(lambda each: matrix @ each, torch.ones(3), 3, 0.0).value, 4)
        3.0
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(float(image.dot(basis[-1])))
        # Twice is enough (Parlett 1998, The Symmetric Eigenvalue Problem, section 6.9).
        for _ in range(2):
            for each in basis:
                image = image - image.dot(each) * each
        residual = float(image.norm())
        known = torch.tensor([*diagonal, residual], dtype=torch.float64)
        if not known.isfinite().all():
            return Eigenpair(torch.nan, basis[0])
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value, weights = float(values[-1]), vectors[:, -1]
        is_close = residual * abs(float(weights[-1])) <= tolerance * abs(value)
        # What is left of an exhausted space is rounding.
        is_exhausted = residual <= 1e-6 * float(values.abs().max())
        if is_close or is_exhausted or len(basis) == min(iterations, start.numel()):
            vector = _combined(weights.tolist(), basis)
            return Eigenpair(value, vector / vector.norm())
        beside.append(residual)
        basis.append(image / residual)


def _tridiagonal(diagonal: Sequence[float], beside: Sequence[float]) -> Tensor:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    # `eigh` reads the lower half.
    if beside:
        matrix += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)
    return matrix


def _combined(weights: Iterable[float], basis: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(basis[0])
    for weight, vector in zip(weights, basis, strict=True):
        total.add_(vector, alpha=weight)
    return total
