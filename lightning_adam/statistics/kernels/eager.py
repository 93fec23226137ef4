"""The reference kernel: plain torch operations in float64, on any device.

It processes a tensor in pieces, which bounds temporaries to 32 MB on the CPU and 200 MB on other
devices. It never waits for the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_adam.statistics.columns import COLUMNS, HYPERPARAMETERS
from lightning_adam.statistics.histograms import BINS, QUANTITIES
from lightning_adam.statistics.param_states import ParamState, ParamStates

PIECE = 1 << 16
"""Elements of a piece on the CPU: 0.5 MB in float64, of which about 30 are alive at once."""
PIECE_ON_A_DEVICE = 1 << 20
"""Elements of a piece on other devices, larger because of the cost of kernel launches."""


@torch.no_grad()
def measure(states: ParamStates, columns: Sequence[str]) -> Tensor:
    """Returns the columns of each tensor.

    Args:
        states: Parameters on one device, at least one, right after the step.
        columns: Names of `COLUMNS`, sums before maxima.

    Returns:
        The matrix `[tensors, columns]` in float64, on the tensors' device.

    Example:
        >>> layer = torch.nn.Linear(3, 4, bias=False)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3)).sum().backward()
        >>> adam.step()
        >>> from lightning_adam.statistics.state_reader import StateReader
        >>> states = StateReader().after_step(adam)
        >>> measure(states, ["elements", "grad_squares", "grad_max_abs"])
        tensor([[12., 12.,  1.]], dtype=torch.float64)
    """
    return torch.stack([_row(state, columns) for state in states])


@torch.no_grad()
def count_exponents(states: ParamStates, groups: Sequence[int], number: int) -> Tensor:
    """Counts active elements by binary exponent, for each of `QUANTITIES` and group of tensors.

    Args:
        states: Parameters on one device, at least one, right after the step.
        groups: Index of each tensor's group in the result.
        number: Number of groups.

    Returns:
        Counts, `[number, len(QUANTITIES), BINS]` in int64, on the tensors' device.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(5))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.ones(5)
        >>> adam.step()
        >>> from lightning_adam.statistics.state_reader import StateReader
        >>> int(count_exponents(StateReader().after_step(adam), [0], 1)[0, 0, 127])
        5
    """
    shape = (number, len(QUANTITIES), BINS)
    counts = torch.zeros(shape, dtype=torch.int64, device=states.parameter[0].device)
    for state, group in zip(states, groups, strict=True):
        for elements in _elements(state):
            ones = elements.active.long()
            for quantity, row in zip(QUANTITIES, counts[group], strict=True):
                row.scatter_add_(0, _exponents(_MAGNITUDES[quantity](elements)), ones)
    return counts


@torch.no_grad()
def grad_squares(grads: Sequence[Tensor]) -> Tensor:
    """Returns Σg² of gradients; NaN for sparse ones.

    Args:
        grads: Gradients on one device, at least one.

    Returns:
        The sums, `[gradients]` in float64, on the gradients' device.

    Example:
        >>> grad_squares([torch.tensor([3.0, 4.0])])
        tensor([25.], dtype=torch.float64)
    """
    device = grads[0].device
    real = [torch.view_as_real(each) if each.is_complex() else each for each in grads]
    if device.type != "cpu" and all(each.layout is torch.strided for each in real):
        # Few launches for all tensors, with accumulation in float64.
        return torch.stack(torch._foreach_norm(real, 2, dtype=torch.float64)).square()
    return torch.stack([_sum_of_squares(each) for each in real])


def _sum_of_squares(grad: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    if grad.layout is not torch.strided:
        return total + math.nan
    for (piece,) in _pieces([grad]):
        total += _squares(piece.double())
    return total


def _row(state: ParamState, columns: Sequence[str]) -> Tensor:
    sums = sum(not COLUMNS[name].is_maximum for name in columns)
    rows = (
        torch.stack([_COLUMNS[name](elements).double() for name in columns])
        for elements in _elements(state)
    )
    row = next(rows)
    for other in rows:
        row = torch.cat([row[:sums] + other[:sums], torch.maximum(row[sums:], other[sums:])])
    return row


class _Elements:
    """The elementwise quantities of a piece, computed on first use.

    Letters and symbols are those of the catalogue.
    """

    def __init__(self, state: ParamState, **piece: Tensor) -> None:
        self.settings = state.settings
        self.piece = piece
        self.p, self.g, self.m = (piece[name].double() for name in ("parameter", "grad", "exp_avg"))
        step = state.step.double() if isinstance(state.step, Tensor) else state.step
        self.step = step
        self.bias1 = 1 - state.settings.beta1**step
        self.bias2 = 1 - state.settings.beta2**step
        self.is_decoupled = state.settings.decoupled and state.settings.weight_decay > 0
        self.is_coupled = not state.settings.decoupled and state.settings.weight_decay > 0
        self.zero = self.scalar(0.0)

    def scalar(self, value: Tensor | float) -> Tensor:
        """Returns a number as a scalar tensor on the device."""
        if isinstance(value, Tensor):
            value = value.to(self.p.device, non_blocking=True)
        return torch.zeros((), dtype=torch.float64, device=self.p.device) + value

    def setting(self, name: str) -> Tensor:
        """Returns a hyperparameter as a maximum; -inf if there are no elements."""
        value = self.step if name == "step" else getattr(self.settings, name)
        return self.scalar(value if self.p.numel() else -math.inf)

    def rounds_to_itself(self, name: str, exact: Tensor, value: Tensor) -> Tensor:
        """Returns where the exact result rounds to the value in the dtype of the named tensor."""
        return exact.to(self.piece[name].dtype).double() == value

    @cached_property
    def v(self) -> Tensor:
        return self.piece["exp_avg_sq"].double()

    @cached_property
    def v_max(self) -> Tensor | None:
        return self.piece["max_exp_avg_sq"].double() if "max_exp_avg_sq" in self.piece else None

    @cached_property
    def m_hat(self) -> Tensor:
        return self.m / self.bias1

    @cached_property
    def v_own(self) -> Tensor:
        """ṽ."""
        return self.v / self.bias2

    @cached_property
    def has_second_moment(self) -> Tensor:
        """Where ṽ > 0, NaN included."""
        return ~(self.v_own <= 0)

    @cached_property
    def v_hat(self) -> Tensor:
        return self.v_own if self.v_max is None else self.v_max / self.bias2

    @cached_property
    def denominator(self) -> Tensor:
        """√v̂."""
        return self.v_hat.sqrt()

    @cached_property
    def u(self) -> Tensor:
        return self.m_hat / (self.denominator + self.settings.eps)

    @cached_property
    def update(self) -> Tensor:
        """ηu."""
        return self.settings.lr * self.u

    @cached_property
    def p_before(self) -> Tensor:
        """p₀."""
        return self.undecayed / (1 - self.decay_rate) if self.is_decoupled else self.undecayed

    @cached_property
    def undecayed(self) -> Tensor:
        """p+ηu."""
        return self.p + self.update

    @property
    def decay_rate(self) -> Tensor | float:
        """ηλ."""
        return self.settings.lr * self.settings.weight_decay

    @cached_property
    def effective(self) -> Tensor:
        """g̃."""
        signed = -self.g if self.settings.maximize else self.g
        return signed + self.settings.weight_decay * self.p_before if self.is_coupled else signed

    @cached_property
    def active(self) -> Tensor:
        return (self.m != 0) | (self.v != 0) | (self.effective != 0)

    @cached_property
    def has_denominator(self) -> Tensor:
        """Where v̂ > 0, NaN included."""
        return ~(self.v_hat <= 0)

    @cached_property
    def eps_share(self) -> Tensor:
        """ε/√v̂ over v̂ > 0."""
        return torch.where(self.has_denominator, self.settings.eps / self.denominator, 0.0)

    @cached_property
    def is_updated(self) -> Tensor:
        return self.update != 0


def _squares(values: Tensor) -> Tensor:
    return values.dot(values)


def _largest(values: Tensor) -> Tensor:
    return values.amax() if values.numel() else values.new_full((), -math.inf)


def _masked(mask: Tensor, values: Tensor, otherwise: float = 0.0) -> Tensor:
    return torch.where(mask, values, otherwise)


def _nonfinite(e: _Elements) -> Tensor:
    finite = e.p.isfinite() & e.g.isfinite() & e.m.isfinite()
    return (~(finite & e.v.isfinite() if "exp_avg_sq" in e.piece else finite)).sum()


_Compute = Callable[[_Elements], Tensor]

_COLUMNS: dict[str, _Compute] = {
    "elements": lambda e: e.scalar(e.p.numel()),
    "grad_squares": lambda e: _squares(e.g),
    "grad_zero": lambda e: (e.g == 0).sum(),
    "exp_avg_sum": lambda e: e.m.sum(),
    "exp_avg_squares": lambda e: _squares(e.m),
    "weight_squares": lambda e: _squares(e.p),
    "nonfinite": _nonfinite,
    "exp_avg_sq_sum": lambda e: e.v.sum(),
    "exp_avg_sq_subnormal": lambda e: (
        (e.v > 0) & (e.v < torch.finfo(e.piece["exp_avg_sq"].dtype).tiny)
    ).sum(),
    "exp_avg_sq_stalled": lambda e: (
        (e.v > 0) & e.rounds_to_itself("exp_avg_sq", e.settings.beta2 * e.v, e.v)
    ).sum(),
    "max_exp_avg_sq_sum": lambda e: e.zero if e.v_max is None else e.v_max.sum(),
    "active": lambda e: e.active.sum(),
    "effective_grad_squares": lambda e: _squares(e.effective),
    "exp_avg_times_effective_grad": lambda e: e.m.dot(e.effective),
    "exp_avg_sq_roots": lambda e: (e.v if e.v_max is None else e.v_max).sqrt().sum(),
    "grad_over_second_moment": lambda e: _masked(
        e.active, e.effective**2 / e.v_own.clamp(min=e.settings.eps**2)
    ).sum(),
    "second_moment_positive": lambda e: e.has_second_moment.sum(),
    "signal": lambda e: _masked(e.has_second_moment, (e.m_hat**2 / e.v_own).clamp(max=1)).sum(),
    "eps_dominated": lambda e: (e.active & (e.denominator < e.settings.eps)).sum(),
    "denominator_share": lambda e: _masked(
        e.active, e.denominator / (e.denominator + e.settings.eps)
    ).sum(),
    "energy_without_eps": lambda e: _squares(_masked(e.has_denominator, e.m_hat / e.denominator)),
    "energy_lost_to_eps": lambda e: (
        _masked(e.has_denominator, e.u) ** 2 * e.eps_share * (2 + e.eps_share)
    ).sum(),
    "exp_avg_sq_zero": lambda e: ((e.v == 0) & (e.effective != 0)).sum(),
    "normalized_update_squares": lambda e: _squares(e.u),
    "normalized_update_large": lambda e: (e.u.abs() > 0.8).sum(),
    "update_nonzero": lambda e: e.is_updated.sum(),
    "update_lost": lambda e: (
        e.is_updated & e.rounds_to_itself("parameter", e.p - e.update, e.p)
    ).sum(),
    "weight_nonzero": lambda e: (e.p != 0).sum(),
    "decay_lost": lambda e: (
        (e.p != 0) & e.rounds_to_itself("parameter", e.p * (1 - e.decay_rate), e.p)
    ).sum(),
    "undecayed_squares": lambda e: _squares(e.undecayed),
    "undecayed_times_update": lambda e: e.undecayed.dot(e.u),
    "undecayed_over_denominator_squares": lambda e: (
        _squares(e.undecayed / (e.denominator + e.settings.eps)) if e.is_coupled else e.zero
    ),
    "grad_max_abs": lambda e: _largest(e.g.abs()),
    "exp_avg_max_abs": lambda e: _largest(e.m.abs()),
    "exp_avg_sq_largest": lambda e: _largest(e.v),
    "normalized_update_max_abs": lambda e: _largest(_masked(e.active, e.u.abs(), -math.inf)),
    **{name: (lambda e, name=name: e.setting(name)) for name in HYPERPARAMETERS},  # type: ignore[misc]
}
"""Computes each column over a piece."""

_MAGNITUDES: dict[str, _Compute] = {
    "grad": lambda e: e.g.abs(),
    "exp_avg": lambda e: e.m_hat.abs(),
    "denominator": lambda e: e.denominator,
    "normalized_update": lambda e: e.u.abs(),
}
"""The magnitudes of each histogram."""


def _exponents(magnitudes: Tensor) -> Tensor:
    """Returns the exponents in float32: 0 for zero and subnormal, 255 for inf and NaN."""
    # The bits between the 52 of the fraction and the sign; 1023 and 127 are the biases.
    exponents = (magnitudes.view(torch.int64) >> 52) & 0x7FF
    return (exponents - (1023 - 127)).clamp_(0, BINS - 1)


def _elements(state: ParamState) -> Iterator[_Elements]:
    """Yields the elements of a tensor in pieces."""
    tensors = {
        "parameter": state.parameter,
        "grad": state.grad,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "max_exp_avg_sq": state.max_exp_avg_sq,
    }
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for piece in _pieces(list(present.values())):
        yield _Elements(state, **dict(zip(present, piece, strict=True)))


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields flat pieces of tensors with the same shape and any strides, with matching elements."""
    shape = tensors[0].shape
    length = PIECE if tensors[0].is_cpu else PIECE_ON_A_DEVICE
    if shape.numel() <= length:
        yield [tensor.reshape(-1) for tensor in tensors]
    elif all(tensor.is_contiguous() for tensor in tensors):
        for piece in zip(
            *(torch.split(tensor.view(-1), length) for tensor in tensors), strict=True
        ):
            yield list(piece)
    else:
        longest = max(range(len(shape)), key=lambda dimension: shape[dimension])
        for half in zip(*(tensor.tensor_split(2, longest) for tensor in tensors), strict=True):
            yield from _pieces(list(half))
