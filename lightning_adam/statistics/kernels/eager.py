"""The reference kernel: plain torch operations in float64, on any device.

It works through a tensor in pieces, so that its temporaries stay below 32 MB whatever the tensor's
size, and it never waits for the device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_adam.statistics.catalogue import MAXIMA, SUMS
from lightning_adam.statistics.views import TensorView

PIECE = 1 << 16
"""Elements at a time: half a megabyte in float64, of which about twenty live at once."""


@torch.no_grad()
def measure(view: TensorView) -> Tensor:
    """The accumulators of one tensor.

    Args:
        view: The tensor with its state and hyperparameters, right after the step.

    Returns:
        A float64 vector in the order of `Row._fields`, on the parameter's device.

    Example:
        >>> layer = torch.nn.Linear(3, 4, bias=False)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> from lightning_adam.statistics.catalogue import Row
        >>> from lightning_adam.statistics.views import tensor_views
        >>> Row(*measure(tensor_views(adam)[0]).tolist()).grad_squares
        12.0
    """
    tensors = [view.parameter, view.grad, view.exp_avg, view.exp_avg_sq]
    if view.max_exp_avg_sq is not None:
        tensors.append(view.max_exp_avg_sq)
    device = view.parameter.device
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    for piece in _pieces(tensors):
        accumulated = _accumulate(view, *(tensor.double() for tensor in piece))
        sums += torch.stack([accumulated[name].double() for name in SUMS])
    lr = torch.zeros((), dtype=torch.float64, device=device) + view.lr
    maxima = {"largest_lr": lr, "negated_smallest_lr": -lr}
    return torch.cat([sums, torch.stack([maxima[name] for name in MAXIMA])])


def _accumulate(
    view: TensorView, p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None = None
) -> dict[str, Tensor]:
    """The sums over one piece; the letters are the catalogue's."""
    step = view.step.double() if isinstance(view.step, Tensor) else view.step
    bias1, bias2 = 1 - view.beta1**step, 1 - view.beta2**step
    lr, eps, weight_decay = view.lr, view.eps, view.weight_decay
    decoupled = view.decoupled and weight_decay > 0
    coupled = not view.decoupled and weight_decay > 0

    m_hat = m / bias1
    v_own = v / bias2
    v_hat = v_own if v_max is None else v_max / bias2
    denominator = v_hat.sqrt()
    u = m_hat / (denominator + eps)
    update = lr * u
    p_before = (p + update) / (1 - lr * weight_decay) if decoupled else p + update
    entered = -g if view.maximize else g
    if coupled:
        entered = entered + weight_decay * p_before

    active = (m != 0) | (v != 0) | (entered != 0)
    seen = ~(v_hat <= 0)  # NaN is seen
    eps_share = torch.where(seen, eps / denominator, 0.0)
    u_without_eps = torch.where(seen, m_hat / denominator, 0.0)
    second_moment = v_own.clamp(min=eps**2)
    moved = update != 0
    kept = (p - update).to(view.parameter.dtype).double() == p
    finite = p.isfinite() & g.isfinite() & m.isfinite() & v.isfinite()

    count = torch.full((), p.numel(), device=p.device)
    zero = torch.zeros((), device=p.device)
    update_squares = update.dot(update)
    return {
        "elements": count,
        "active": active.sum(),
        "grad_squares": g.dot(g),
        "entered_squares": entered.dot(entered),
        "exp_avg_squares": m.dot(m),
        "exp_avg_times_entered": m.dot(entered),
        "exp_avg_sq": v.sum(),
        "denominator": denominator.sum(),
        "entered_over_second_moment": (entered**2 / second_moment).sum(),
        "eps_dominated": (active & (denominator < eps)).sum(),
        "energy_without_eps": u_without_eps.dot(u_without_eps),
        "energy_lost_to_eps": (torch.where(seen, u, 0.0) ** 2 * eps_share * (2 + eps_share)).sum(),
        "exp_avg_sq_zero": ((v == 0) & (entered != 0)).sum(),
        "direction_squares": u.dot(u),
        "update_squares": update_squares,
        "update_nonzero": moved.sum(),
        "update_lost": (moved & kept).sum(),
        "nonfinite": (~finite).sum(),
        "weight_squares": p.dot(p),
        "decoupled_elements": count if decoupled else zero,
        "decoupled_decay_squares": _squares(lr * weight_decay * p_before) if decoupled else zero,
        "decoupled_update_squares": update_squares if decoupled else zero,
        "coupled_elements": count if coupled else zero,
        "coupled_decay_squares": _squares(weight_decay * p_before) if coupled else zero,
    }


def _squares(values: Tensor) -> Tensor:
    return values.dot(values)


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of tensors of one shape, element by element alike, whatever their strides."""
    shape = tensors[0].shape
    if shape.numel() <= PIECE:
        yield [tensor.reshape(-1) for tensor in tensors]
    elif all(tensor.is_contiguous() for tensor in tensors):
        for piece in zip(*(torch.split(tensor.view(-1), PIECE) for tensor in tensors), strict=True):
            yield list(piece)
    else:
        longest = max(range(len(shape)), key=lambda dimension: shape[dimension])
        for half in zip(*(tensor.tensor_split(2, longest) for tensor in tensors), strict=True):
            yield from _pieces(list(half))
