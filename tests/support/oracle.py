"""The catalogue's statistics, evaluated directly in float64 numpy.

Everything here is written from the definitions and the papers alone, so that it can serve as an
outside oracle: it shares no code, no accumulators and no order of evaluation with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Wide = npt.NDArray[np.longdouble]


@dataclass
class Tensor:
    """One parameter and its state after an optimizer step, and the gradient that the step used.

    Decoupled weight decay acts on the parameter (AdamW), coupled decay on the gradient (Adam).
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


def reference_statistics(tensors: Sequence[Tensor]) -> dict[str, float]:
    """Evaluate the statistics of the catalogue over one scope that its tensors define."""
    present = _nonempty(tensors)
    if not present:
        return {}
    # Overflow, division by zero and NaN are legitimate outcomes here, not accidents to warn about.
    with np.errstate(all="ignore"):
        scope = _scope_of(present)
        values = (
            _moment_statistics(scope)
            | {"amsgrad_gap": _amsgrad_gap(present)}
            | _largest_of_tensors(present)
            | _underflow_statistics(scope)
            | _update_statistics(scope)
            | _decay_statistics(present, scope)
            | _schedule_statistics(present)
        )
    return _defined(values)


def reference_magnitudes(tensors: Sequence[Tensor]) -> dict[str, Array]:
    """Collect the magnitudes that the histograms count, over the active elements of one scope."""
    columns = {
        "grad": "grad",
        "exp_avg": "corrected_exp_avg",
        "denominator": "denominator",
        "normalized_update": "direction",
    }
    present = _nonempty(tensors)
    if not present:
        return dict.fromkeys(columns, np.empty(0))
    with np.errstate(all="ignore"):
        scope = _scope_of(present)
        return {
            name: np.abs(getattr(scope, column)[scope.active]) for name, column in columns.items()
        }


def signed_sum_scale(tensors: Sequence[Tensor]) -> dict[str, float]:
    """Evaluate the statistics that are signed sums with every term replaced by its absolute value.

    Terms of either sign cancel, so the error of such a sum is small beside this scale, not beside
    the sum itself.
    """
    present = _nonempty(tensors)
    if not present:
        return {}
    with np.errstate(all="ignore"):
        scope = _scope_of(present)
        decay, update = _decoupled_pulls(present, scope)
        return _defined(
            {
                "exp_avg_mean": mean(np.abs(scope.exp_avg)),
                **_scale_of_previous(scope),
                "decay_alignment": cosine(np.abs(decay), np.abs(update)),
            }
        )


def _scale_of_previous(scope: SimpleNamespace) -> dict[str, float | None]:
    """Evaluate how an error of the sums m², m·g̃ and g̃² grows in what is derived of β1·m₋₁."""
    rate, m, g = scope.one_minus_beta1, np.abs(scope.exp_avg), np.abs(scope.effective_grad)
    squares = np.sum(square(m) + 2 * rate * widen(m) * g + square(rate * g))
    products = np.sum(widen(m) * g + rate * square(g))
    previous, effective = norm(scope.previous), norm(scope.effective_grad)
    value = cosine(scope.previous, scope.effective_grad) or 0.0
    slope = products / (previous * effective) + abs(value) * squares / np.square(previous)
    return {
        "grad_momentum_cosine": float(slope),
        "exp_avg_carryover": float(squares / sum_of_squares(m)),
    }


def _largest_of_tensors(tensors: Sequence[Tensor]) -> dict[str, float | None]:
    """Evaluate the statistics that are the largest value of a tensor."""
    scopes = [_scope_of([tensor]) for tensor in tensors]
    ratios = [_rms_ratio(scope) for scope in scopes]
    sizes = [ratio(norm(scope.update), norm(scope.parameter)) for scope in scopes]
    return {
        "rms_ratio_max": maximum(np.array([each for each in ratios if each is not None])),
        "update_to_weight_max": maximum(np.array([each for each in sizes if each is not None])),
    }


def _momentum_cosine(scope: SimpleNamespace) -> float | None:
    """Evaluate cos(m₋₁, g̃), where m₋₁ is more than the rounding of m."""
    if sum_of_squares(scope.previous) < 1e-3 * sum_of_squares(scope.exp_avg):
        return None
    return cosine(scope.previous, scope.effective_grad)


def _carryover(scope: SimpleNamespace) -> float | None:
    """Evaluate ‖β1·m₋₁‖/‖m‖, where that is more than the rounding of m."""
    if 0 < sum_of_squares(scope.exp_avg) * 1e-3 > sum_of_squares(scope.previous):
        return 0.0
    return ratio(norm(scope.previous), norm(scope.exp_avg))


def _moment_statistics(scope: SimpleNamespace) -> dict[str, float | None]:
    return {
        "grad_norm": norm(scope.grad),
        "grad_rms": root_mean_square(scope.grad),
        "grad_max": maximum(np.abs(scope.grad)),
        "exp_avg_rms": root_mean_square(scope.exp_avg),
        "exp_avg_mean": mean(scope.exp_avg),
        "exp_avg_max": maximum(np.abs(scope.exp_avg)),
        "exp_avg_sq_mean": mean(scope.exp_avg_sq),
        "exp_avg_sq_max": maximum(scope.exp_avg_sq),
        "denominator_mean": mean(scope.denominator),
        "grad_momentum_cosine": _momentum_cosine(scope),
        "exp_avg_carryover": _carryover(scope),
        "signal_fraction": _signal_fraction(scope),
        "rms_ratio": _rms_ratio(scope),
    }


def _underflow_statistics(scope: SimpleNamespace) -> dict[str, float | None]:
    active = scope.active
    held = (scope.grad, scope.exp_avg, scope.exp_avg_sq, scope.parameter)
    is_finite = np.logical_and.reduce([np.isfinite(each) for each in held])
    damping = scope.denominator[active] / (scope.denominator[active] + scope.eps[active])
    return {
        "idle_fraction": share(~active),
        "eps_dominated_fraction": share((scope.denominator < scope.eps)[active]),
        "eps_damping": mean(damping),
        "eps_energy_loss": _eps_energy_loss(scope),
        "exp_avg_sq_zero_fraction": share((scope.exp_avg_sq == 0) & (scope.effective_grad != 0)),
        "exp_avg_sq_subnormal_fraction": share(scope.exp_avg_sq_subnormal),
        "exp_avg_sq_stalled_fraction": share(scope.exp_avg_sq_stalled),
        "update_lost_fraction": share(scope.update_lost[scope.update != 0]),
        "grad_zero_fraction": share(scope.grad == 0),
        "nonfinite_count": float(np.count_nonzero(~is_finite)),
    }


def _update_statistics(scope: SimpleNamespace) -> dict[str, float | None]:
    direction = np.abs(scope.direction[scope.active])
    update_norm = norm(scope.update)
    return {
        "update_norm": update_norm,
        "normalized_update_rms": root_mean_square(direction),
        "normalized_update_max": maximum(direction),
        "normalized_update_large_fraction": share(direction > 0.8),
        "update_to_weight": ratio(update_norm, norm(scope.parameter)),
    }


def _decay_statistics(tensors: Sequence[Tensor], scope: SimpleNamespace) -> dict[str, float | None]:
    coupled, decoupled = scope.coupled_decay, scope.decoupled_decay
    decays = bool(coupled.any()) or bool(decoupled.any())
    decay, update = _decoupled_pulls(tensors, scope)
    return {
        "weight_norm": norm(scope.parameter),
        "weight_rms": root_mean_square(scope.parameter),
        "decay_norm": norm(scope.decay_step) if decays and _recoverable(tensors) else None,
        "decay_to_update": ratio(norm(decay), norm(update)),
        "decay_alignment": cosine(decay, update),
        "decay_to_grad": ratio(norm(scope.decay[coupled]), norm(scope.grad[coupled])),
        "decay_lost_fraction": share(scope.decay_lost[decoupled & (scope.parameter != 0)]),
        "decay_timescale": _decay_timescale(tensors),
        "equilibrium_ratio": _equilibrium_ratio(tensors, scope),
    }


def _schedule_statistics(tensors: Sequence[Tensor]) -> dict[str, float | None]:
    names = ("beta1", "beta2", "eps", "weight_decay", "step")
    shared = {name: single_value(getattr(tensor, name) for tensor in tensors) for name in names}
    return {"lr": max(tensor.lr for tensor in tensors), **shared}


def _signal_fraction(scope: SimpleNamespace) -> float | None:
    """Evaluate the mean share of the second moment that the first one explains."""
    # Written as "not known to be zero" because NaN > 0 is false and would hide the NaN.
    chosen = ~(scope.corrected_exp_avg_sq <= 0)
    explained = square(scope.corrected_exp_avg[chosen]) / scope.corrected_exp_avg_sq[chosen]
    return mean(np.minimum(explained, 1))


def _amsgrad_gap(tensors: Sequence[Tensor]) -> float | None:
    chosen = [tensor for tensor in tensors if tensor.amsgrad]
    current = sum(np.sum(widen(flat(tensor.exp_avg_sq))) for tensor in chosen)
    largest = sum(np.sum(widen(_raw_denominator_sq(tensor))) for tensor in chosen)
    return None if current == 0 else float(np.sqrt(largest / current))


def _decay_timescale(tensors: Sequence[Tensor]) -> float | None:
    rate = single_value(_decay_rate(tensor) for tensor in tensors if _decays_decoupled(tensor))
    return None if rate is None else ratio(1.0, rate)


def _equilibrium_ratio(tensors: Sequence[Tensor], scope: SimpleNamespace) -> float | None:
    """Evaluate the size of the weights relative to that at rotational equilibrium."""
    balance = sum(
        tensor.parameter.numel() * tensor.lr / (2 * tensor.weight_decay)
        for tensor in tensors
        if _decays_decoupled(tensor)
    )
    squares = sum_of_squares(scope.parameter[scope.decoupled_decay])
    return None if balance == 0 else float(np.sqrt(squares / balance))


def _decoupled_pulls(tensors: Sequence[Tensor], scope: SimpleNamespace) -> tuple[Array, Array]:
    """Give decay and update where decoupled decay acts; nothing if that decay is unknown."""
    chosen = scope.decoupled_decay if _recoverable(tensors) else slice(0)
    return scope.decay[chosen], scope.update[chosen]


def _rms_ratio(scope: SimpleNamespace) -> float | None:
    active = scope.active
    floor = np.maximum(scope.corrected_exp_avg_sq[active], square(scope.eps[active]))
    squared = mean(square(scope.effective_grad[active]) / floor)
    return None if squared is None else float(np.sqrt(squared))


def _eps_energy_loss(scope: SimpleNamespace) -> float | None:
    """Evaluate the share of the update's energy that eps takes."""
    # Written as "not known to be zero" because NaN > 0 is false and would hide the NaN.
    chosen = ~(scope.denominator_sq <= 0)
    denominator_sq = widen(scope.denominator_sq[chosen])
    relative_eps = scope.eps[chosen] / np.sqrt(denominator_sq)
    lost = np.sum(square(scope.direction[chosen]) * relative_eps * (2 + relative_eps))
    whole = np.sum(square(scope.corrected_exp_avg[chosen]) / denominator_sq)
    return None if whole == 0 else float(lost / whole)


def _nonempty(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leave out the tensors that have no elements, and with them their hyperparameters."""
    return [tensor for tensor in tensors if tensor.parameter.numel() > 0]


def _defined(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _scope_of(tensors: Sequence[Tensor]) -> SimpleNamespace:
    """Join the elements of several tensors into one population."""
    parts = [vars(_elements_of(tensor)) for tensor in tensors]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return SimpleNamespace(**joined)


def _elements_of(tensor: Tensor) -> SimpleNamespace:
    """Apply a tensor's own hyperparameters to each of its elements."""
    parameter, grad = flat(tensor.parameter), flat(tensor.grad)
    exp_avg, exp_avg_sq = flat(tensor.exp_avg), flat(tensor.exp_avg_sq)
    corrected_exp_avg = exp_avg / (1 - tensor.beta1**tensor.step)
    bias_correction2 = 1 - tensor.beta2**tensor.step
    corrected_exp_avg_sq = exp_avg_sq / bias_correction2
    denominator_sq = (
        _raw_denominator_sq(tensor) / bias_correction2 if tensor.amsgrad else corrected_exp_avg_sq
    )
    denominator = np.sqrt(denominator_sq)
    direction = corrected_exp_avg / (denominator + tensor.eps)
    update = tensor.lr * direction
    decay = _decay(tensor, parameter, update)
    effective_grad = _effective_grad(tensor, grad, decay)
    parameter_dtype, exp_avg_sq_dtype = tensor.parameter.dtype, tensor.exp_avg_sq.dtype
    smallest_normal = torch.finfo(exp_avg_sq_dtype).smallest_normal
    return SimpleNamespace(
        parameter=parameter,
        grad=grad,
        effective_grad=effective_grad,
        # β1·m₋₁.
        previous=exp_avg - (1 - tensor.beta1) * effective_grad,
        one_minus_beta1=np.full_like(grad, 1 - tensor.beta1),
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        corrected_exp_avg=corrected_exp_avg,
        corrected_exp_avg_sq=corrected_exp_avg_sq,
        denominator_sq=denominator_sq,
        denominator=denominator,
        # A NaN counts as active.
        active=(exp_avg != 0) | (exp_avg_sq != 0) | (effective_grad != 0),
        eps=np.broadcast_to(np.float64(tensor.eps), parameter.shape),
        direction=direction,
        update=update,
        decay=decay,
        decay_step=decay
        if tensor.decoupled or tensor.weight_decay == 0
        else tensor.lr * decay / (denominator + tensor.eps),
        exp_avg_sq_subnormal=(exp_avg_sq > 0) & (exp_avg_sq < smallest_normal),
        exp_avg_sq_stalled=(exp_avg_sq > 0)
        & (round_to(exp_avg_sq_dtype, tensor.beta2 * exp_avg_sq) == exp_avg_sq),
        update_lost=round_to(parameter_dtype, parameter - update) == parameter,
        decay_lost=round_to(parameter_dtype, parameter * _decay_factor(tensor)) == parameter,
        coupled_decay=np.full(parameter.shape, tensor.weight_decay > 0 and not tensor.decoupled),
        decoupled_decay=np.full(parameter.shape, _decays_decoupled(tensor)),
    )


def _raw_denominator_sq(tensor: Tensor) -> Array:
    """Pick the second moment that the denominator uses, before bias correction."""
    if not tensor.amsgrad:
        return flat(tensor.exp_avg_sq)
    if tensor.max_exp_avg_sq is None:
        raise ValueError("max_exp_avg_sq is needed with amsgrad")
    return flat(tensor.max_exp_avg_sq)


def _decay(tensor: Tensor, parameter: Array, update: Array) -> Array:
    """Compute what weight decay took from the parameter or added to the gradient."""
    # Zero times a non-finite parameter would be NaN, but no decay is no operation at all.
    if tensor.weight_decay == 0:
        return np.zeros_like(parameter)
    if tensor.decoupled:
        return _decay_rate(tensor) * ((parameter + update) / _decay_factor(tensor))
    return tensor.weight_decay * (parameter + update)


def _decays_decoupled(tensor: Tensor) -> bool:
    return tensor.decoupled and tensor.weight_decay > 0


def _decay_rate(tensor: Tensor) -> float:
    return tensor.lr * tensor.weight_decay


def _decay_factor(tensor: Tensor) -> float:
    return 1 - _decay_rate(tensor)


def _recoverable(tensors: Sequence[Tensor]) -> bool:
    """Tell whether the parameters before the step follow from those after it."""
    # A decay that takes the whole parameter leaves nothing to recover its former value from.
    return all(_decay_factor(tensor) != 0 for tensor in tensors if _decays_decoupled(tensor))


def _effective_grad(tensor: Tensor, grad: Array, decay: Array) -> Array:
    signed = -grad if tensor.maximize else grad
    return signed if tensor.decoupled else signed + decay


# Exact widening, rounding to a dtype, and sums in long double: a float32 of 1e30 squared, times
# many, still fits in one, and so does one of 1e-30. What is not defined is None.


def flat(values: torch.Tensor) -> Array:
    """Copy a tensor to one flat float64 array, exactly."""
    # numpy has no bfloat16; widening to float64 loses nothing from any narrower float.
    return values.detach().to("cpu", torch.float64, copy=True).numpy().reshape(-1)


def round_to(dtype: torch.dtype, values: Array) -> Array:
    """Round to the nearest value of a dtype, ties to even, and widen again.

    The dtypes of 16 bits round to float32 first.
    """
    rounded = torch.from_numpy(values)
    if dtype.itemsize == 2:
        rounded = rounded.float()
    return flat(rounded.to(dtype))


def widen(values: Array) -> Wide:
    return values.astype(np.longdouble)


def square(values: Array) -> Wide:
    squares: Wide = np.square(values, dtype=np.longdouble)
    return squares


def sum_of_squares(values: Array) -> np.longdouble:
    total: np.longdouble = np.sum(square(values))
    return total


def norm(values: Array) -> float:
    return float(np.sqrt(sum_of_squares(values)))


def mean(values: Array | Wide) -> float | None:
    return float(np.mean(values, dtype=np.longdouble)) if values.size else None


def root_mean_square(values: Array) -> float | None:
    return float(np.sqrt(sum_of_squares(values) / values.size)) if values.size else None


def cosine(left: Array, right: Array) -> float | None:
    lengths = np.sqrt(sum_of_squares(left)) * np.sqrt(sum_of_squares(right))
    products: Wide = np.multiply(left, right, dtype=np.longdouble)
    return None if lengths == 0 else float(np.sum(products) / lengths)


def maximum(values: Array) -> float | None:
    return float(np.max(values)) if values.size else None


def share(chosen: Mask) -> float | None:
    return float(np.count_nonzero(chosen) / chosen.size) if chosen.size else None


def ratio(numerator: float, denominator: float) -> float | None:
    return None if denominator == 0 else numerator / denominator


def single_value(values: Iterable[float]) -> float | None:
    """Give the value that all share, undefined where there is none or more than one."""
    distinct = set(values)
    return float(distinct.pop()) if len(distinct) == 1 else None
