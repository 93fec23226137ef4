"""The catalogue's headline statistics and Adam itself, evaluated directly in float64 numpy.

Everything here is written from the definitions and the papers alone, so that it can serve as an
outside oracle: it shares no code, no accumulators and no order of evaluation with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Wide = npt.NDArray[np.longdouble]


@dataclass
class Tensor:
    """One parameter as it stands after an optimizer step.

    Attributes:
        parameter: The parameter after the step.
        grad: The gradient that the step used.
        exp_avg: The first moment after the step.
        exp_avg_sq: The second moment after the step.
        max_exp_avg_sq: The running maximum of the raw second moment; needed with amsgrad only.
        step: The number of steps that the state has seen, this one included.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Term added to the denominator.
        weight_decay: Weight decay.
        amsgrad: Whether the denominator uses `max_exp_avg_sq`.
        maximize: Whether the step ascends.
        decoupled: Whether weight decay acts on the parameter (AdamW) or on the gradient (Adam).
    """

    parameter: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None
    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled: bool


@dataclass
class _Elements:
    """Elementwise quantities, flat and in float64, of one tensor or of a whole scope."""

    parameter: Array
    grad: Array
    entered: Array
    exp_avg: Array
    exp_avg_sq: Array
    corrected_exp_avg: Array
    corrected_exp_avg_sq: Array
    denominator_sq: Array
    eps: Array
    direction: Array
    update: Array
    subtracted: Array
    decay: Array

    @property
    def denominator(self) -> Array:
        """The square root in the denominator, before eps is added."""
        return np.sqrt(self.denominator_sq)

    @property
    def active(self) -> Mask:
        """Elements that have a moment or a gradient; a NaN counts as one."""
        active: Mask = (self.exp_avg != 0) | (self.exp_avg_sq != 0) | (self.entered != 0)
        return active


def reference_statistics(tensors: Sequence[Tensor]) -> dict[str, float]:
    """Evaluate the headline statistics over one scope.

    Args:
        tensors: The tensors of the scope; those without elements contribute nothing.

    Returns:
        Every statistic that is defined for the scope, by name.
    """
    present = [tensor for tensor in tensors if tensor.parameter.numel() > 0]
    # Overflow, division by zero and NaN are legitimate outcomes here, not accidents to warn about.
    with np.errstate(all="ignore"):
        each = [_elements_of(tensor) for tensor in present]
        scope = _concatenate(each)
        values = (
            _moment_statistics(scope)
            | _underflow_statistics(scope)
            | _update_statistics(scope)
            | _decay_statistics(present, each)
        )
    values["lr"] = _single_value(tensor.lr for tensor in present)
    return {name: value for name, value in values.items() if value is not None}


def replay_adam(
    parameter: torch.Tensor | npt.ArrayLike,
    grads: Sequence[torch.Tensor | npt.ArrayLike],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
) -> dict[str, npt.NDArray[np.float64]]:
    """Run Adam or AdamW in float64 over a sequence of gradients.

    Algorithm 1 of Kingma & Ba (2015), with the L2 penalty or the decoupled decay of Loshchilov &
    Hutter (2019), the decay scaled by the learning rate as torch does. With amsgrad (Reddi et al.
    2018) the maximum is taken over the raw second moment and bias-corrected afterwards.

    Args:
        parameter: The parameter before the first step.
        grads: One gradient a step.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Term added to the denominator.
        weight_decay: Weight decay.
        amsgrad: Whether the denominator uses the running maximum of the second moment.
        maximize: Whether to ascend.
        decoupled: Whether weight decay acts on the parameter (AdamW) or on the gradient (Adam).

    Returns:
        `parameter`, `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq` after the last gradient; the
        maximum is kept without amsgrad as well, where nothing uses it.
    """
    beta1, beta2 = betas
    theta = _to_float64(parameter)
    first, second, largest = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    for step, raw in enumerate(grads, start=1):
        grad = -_to_float64(raw) if maximize else _to_float64(raw)
        if not decoupled:
            grad = grad + weight_decay * theta
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad**2
        largest = np.maximum(largest, second)
        corrected_first = first / (1 - beta1**step)
        corrected_second = (largest if amsgrad else second) / (1 - beta2**step)
        decay = lr * weight_decay * theta if decoupled else 0.0
        theta = theta - decay - lr * corrected_first / (np.sqrt(corrected_second) + eps)
    return {
        "parameter": theta,
        "exp_avg": first,
        "exp_avg_sq": second,
        "max_exp_avg_sq": largest,
    }


def _moment_statistics(scope: _Elements) -> dict[str, float | None]:
    """Evaluate the headline statistics of the family `moments`."""
    return {
        "grad_norm": _norm(scope.grad),
        "exp_avg_rms": _root_mean_square(scope.exp_avg),
        "exp_avg_sq_mean": _mean(scope.exp_avg_sq),
        "denominator_mean": _mean(scope.denominator),
        "momentum_alignment": _cosine(scope.exp_avg, scope.entered),
        "exp_avg_sq_lag": _exp_avg_sq_lag(scope),
    }


def _underflow_statistics(scope: _Elements) -> dict[str, float | None]:
    """Evaluate the headline statistics of the family `underflow`."""
    everything = np.ones(scope.parameter.shape, dtype=np.bool_)
    zero_although_fed = (scope.exp_avg_sq == 0) & (scope.entered != 0)
    return {
        "eps_dominated_fraction": _fraction(scope.denominator < scope.eps, scope.active),
        "eps_energy_loss": _eps_energy_loss(scope),
        "exp_avg_sq_zero_fraction": _fraction(zero_although_fed, everything),
        "update_lost_fraction": _fraction(scope.subtracted == scope.parameter, scope.update != 0),
        "nonfinite_count": _nonfinite_count(scope),
    }


def _update_statistics(scope: _Elements) -> dict[str, float | None]:
    """Evaluate the headline statistics of the family `update`, and the norm of the weights."""
    update_norm, weight_norm = _norm(scope.update), _norm(scope.parameter)
    return {
        "update_norm": update_norm,
        "direction_rms": _root_mean_square(scope.direction[scope.active]),
        "update_to_weight": _ratio(update_norm, weight_norm),
        "weight_norm": weight_norm,
    }


def _decay_statistics(
    tensors: Sequence[Tensor], each: Sequence[_Elements]
) -> dict[str, float | None]:
    """Evaluate the headline statistics that speak of decayed tensors only."""
    decayed = [
        (tensor, elements)
        for tensor, elements in zip(tensors, each, strict=True)
        if tensor.weight_decay > 0
    ]
    kinds = {tensor.decoupled for tensor, _ in decayed}
    # A decay that takes the whole parameter leaves nothing to recover its former value from.
    recoverable = all(_survival(tensor) != 0 for tensor, _ in decayed if tensor.decoupled)
    everything = _concatenate([elements for _, elements in decayed])
    decoupled = _concatenate([elements for tensor, elements in decayed if tensor.decoupled])
    to_update = _ratio(_norm(decoupled.decay), _norm(decoupled.update))
    return {
        "decay_norm": _norm(everything.decay) if len(kinds) == 1 and recoverable else None,
        "decay_to_update": to_update if True in kinds and recoverable else None,
    }


def _exp_avg_sq_lag(scope: _Elements) -> float | None:
    """Evaluate StableAdamW's RMS over the active elements."""
    entered = _widen(scope.entered[scope.active])
    floor = _widen(scope.eps[scope.active]) ** 2
    mean = _mean(entered**2 / np.maximum(_widen(scope.corrected_exp_avg_sq[scope.active]), floor))
    return None if mean is None else float(np.sqrt(mean))


def _eps_energy_loss(scope: _Elements) -> float | None:
    """Evaluate the share of the update's energy that eps takes."""
    # Written as "not known to be zero" because NaN > 0 is false and would hide the NaN.
    chosen = ~(scope.denominator_sq <= 0)
    denominator_sq = _widen(scope.denominator_sq[chosen])
    direction = _widen(scope.direction[chosen])
    ratio = _widen(scope.eps[chosen]) / np.sqrt(denominator_sq)
    lost = np.sum(direction**2 * ratio * (2 + ratio))
    whole = np.sum(_widen(scope.corrected_exp_avg[chosen]) ** 2 / denominator_sq)
    return None if whole == 0 else float(lost / whole)


def _nonfinite_count(scope: _Elements) -> float:
    """Count the elements with a non-finite gradient, moment or parameter."""
    finite = (
        np.isfinite(scope.grad)
        & np.isfinite(scope.exp_avg)
        & np.isfinite(scope.exp_avg_sq)
        & np.isfinite(scope.parameter)
    )
    return float(np.count_nonzero(~finite))


def _elements_of(tensor: Tensor) -> _Elements:
    """Apply a tensor's own hyperparameters to each of its elements."""
    parameter, grad = _flat(tensor.parameter), _flat(tensor.grad)
    exp_avg, exp_avg_sq = _flat(tensor.exp_avg), _flat(tensor.exp_avg_sq)
    corrected_exp_avg = exp_avg / (1 - tensor.beta1**tensor.step)
    bias_correction2 = 1 - tensor.beta2**tensor.step
    denominator_sq = _raw_denominator_sq(tensor) / bias_correction2
    direction = corrected_exp_avg / (np.sqrt(denominator_sq) + tensor.eps)
    update = tensor.lr * direction
    decay = _decay(tensor, parameter, update)
    return _Elements(
        parameter=parameter,
        grad=grad,
        entered=_entered(tensor, grad, decay),
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        corrected_exp_avg=corrected_exp_avg,
        corrected_exp_avg_sq=exp_avg_sq / bias_correction2,
        denominator_sq=denominator_sq,
        eps=np.full_like(parameter, tensor.eps),
        direction=direction,
        update=update,
        subtracted=_round_to(tensor.parameter.dtype, parameter - update),
        decay=decay,
    )


def _raw_denominator_sq(tensor: Tensor) -> Array:
    """Pick the second moment that the denominator uses, before bias correction."""
    if not tensor.amsgrad:
        return _flat(tensor.exp_avg_sq)
    if tensor.max_exp_avg_sq is None:
        raise ValueError("max_exp_avg_sq is needed with amsgrad")
    return _flat(tensor.max_exp_avg_sq)


def _decay(tensor: Tensor, parameter: Array, update: Array) -> Array:
    """Compute what weight decay took from the parameter or added to the gradient."""
    # Zero times a non-finite parameter would be NaN, but no decay is no operation at all.
    if tensor.weight_decay == 0:
        return np.zeros_like(parameter)
    if tensor.decoupled:
        return tensor.lr * tensor.weight_decay * ((parameter + update) / _survival(tensor))
    return tensor.weight_decay * (parameter + update)


def _survival(tensor: Tensor) -> float:
    """Give the share of the parameter that one decoupled decay leaves."""
    return 1 - tensor.lr * tensor.weight_decay


def _entered(tensor: Tensor, grad: Array, decay: Array) -> Array:
    """Compute the gradient that entered the moments."""
    signed = -grad if tensor.maximize else grad
    return signed if tensor.decoupled else signed + decay


def _concatenate(each: Sequence[_Elements]) -> _Elements:
    """Join the elements of several tensors, or of none, into one population."""
    nothing: Array = np.empty(0, dtype=np.float64)
    columns: dict[str, Array] = {
        field.name: np.concatenate([nothing, *(getattr(part, field.name) for part in each)])
        for field in fields(_Elements)
    }
    return _Elements(**columns)


def _to_float64(values: torch.Tensor | npt.ArrayLike) -> Array:
    """Copy values to float64, exactly."""
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16; widening to float64 loses nothing from any narrower float.
        values = values.detach().cpu().to(torch.float64).numpy()
    return np.array(values, dtype=np.float64)


def _flat(values: torch.Tensor) -> Array:
    """Copy a tensor to one flat float64 array, exactly."""
    return _to_float64(values).reshape(-1)


def _round_to(dtype: torch.dtype, values: Array) -> Array:
    """Round to the nearest value of a dtype, ties to even, and widen again.

    Args:
        dtype: The dtype to round to.
        values: The values; the 16-bit dtypes round them to float32 first.

    Returns:
        The rounded values, which float64 holds exactly.

    Raises:
        ValueError: If the dtype is none of float64, float32, float16 and bfloat16.
    """
    roundings: dict[torch.dtype, Callable[[Array], Array]] = {
        torch.float64: lambda exact: exact,
        torch.float32: lambda exact: exact.astype(np.float32).astype(np.float64),
        torch.float16: lambda exact: exact.astype(np.float32).astype(np.float16).astype(np.float64),
        torch.bfloat16: _round_to_bfloat16,
    }
    if dtype not in roundings:
        raise ValueError(f"no rounding is defined for {dtype}")
    return roundings[dtype](values)


def _round_to_bfloat16(values: Array) -> Array:
    """Round to float32, then to its upper 16 bits, both times to nearest, ties to even."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    last_kept_bit = (bits >> np.uint32(16)) & np.uint32(1)
    carried = (bits + np.uint32(0x7FFF) + last_kept_bit) & np.uint32(0xFFFF0000)
    # The carry can turn a NaN into an infinity or a zero, so NaN does not pass through it.
    rounded = np.where(np.isnan(single), single, carried.view(np.float32))
    return rounded.astype(np.float64)


def _widen(values: Array) -> Wide:
    """Convert to long double, whose range and precision keep squares and sums faithful."""
    return values.astype(np.longdouble)


def _sum_of_squares(values: Array) -> np.longdouble:
    """Sum the squares of the values."""
    total: np.longdouble = np.sum(_widen(values) ** 2)
    return total


def _norm(values: Array) -> float:
    """Compute the Euclidean norm; that of no values is zero."""
    return float(np.sqrt(_sum_of_squares(values)))


def _mean(values: Array | Wide) -> float | None:
    """Compute the mean; that of no values is undefined."""
    return float(np.mean(values, dtype=np.longdouble)) if values.size else None


def _root_mean_square(values: Array) -> float | None:
    """Compute the root mean square; that of no values is undefined."""
    return float(np.sqrt(_sum_of_squares(values) / values.size)) if values.size else None


def _cosine(left: Array, right: Array) -> float | None:
    """Compute the cosine of the angle between two vectors, undefined where one of them is zero."""
    lengths = np.sqrt(_sum_of_squares(left)) * np.sqrt(_sum_of_squares(right))
    return None if lengths == 0 else float(np.sum(_widen(left) * _widen(right)) / lengths)


def _fraction(chosen: Mask, among: Mask) -> float | None:
    """Compute the share of a set that is chosen; that of an empty set is undefined."""
    total = np.count_nonzero(among)
    return float(np.count_nonzero(chosen & among) / total) if total else None


def _ratio(numerator: float, denominator: float) -> float | None:
    """Divide, undefined where the denominator is zero."""
    return None if denominator == 0 else numerator / denominator


def _single_value(values: Iterable[float]) -> float | None:
    """Give the value that all share, undefined where there is none or more than one."""
    distinct = set(values)
    return float(distinct.pop()) if len(distinct) == 1 else None
