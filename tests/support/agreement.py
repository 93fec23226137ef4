"""Compares measured statistics with the reference, within the tolerance of a kernel.

A kernel that computes in float32 may count elements within 4 ulp of a boundary on its other side.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.oracle import (
    Array,
    Mask,
    Tensor,
    _elements_of,
    reference_statistics,
    round_to,
    signed_sum_scale,
)

ULPS = 4 * 2.0**-23
"""Four units in the last place of a float32, as a relative error."""
SMALLEST_FLOAT32 = 2.0**-149
"""The smallest float32."""
SIGNED_SUMS = ("exp_avg_mean", "grad_momentum_cosine", "exp_avg_carryover", "decay_alignment")
"""Sums of terms with both signs: the error is relative to the terms, not to the sum."""


def bare(values: Mapping[str, float], scope: str = "") -> dict[str, float]:
    """Selects the values of a scope, given as a key prefix (`group/decay/`), by their names."""
    keys = {name: statistic.key_of(scope) for name, statistic in STATISTICS.items()}
    return {name: values[key] for name, key in keys.items() if key in values}


def assert_agree(
    actual: Mapping[str, float], tensors: Sequence[Tensor], kernel: str = "eager"
) -> None:
    """Asserts that the statistics of a scope are the reference's, and that none is missing."""
    relative = 1e-9 if kernel == "eager" else 1e-5
    undecided = {} if kernel == "eager" else tolerances(tensors)
    expected = reference_statistics(tensors)
    scale = signed_sum_scale(tensors)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        tolerance = {"rel": relative, "abs": 0.0}
        if name.endswith(("_fraction", "_count")) and name != "signal_fraction":
            tolerance = {"rel": 1e-15, "abs": undecided.get(name, 0.0)}
        if name in SIGNED_SUMS:
            tolerance = {"rel": 0.0, "abs": relative * scale[name]}
        found = actual[name]
        if name in ("exp_avg_carryover", "grad_momentum_cosine") and not math.isfinite(value):
            # Of differences of infinite sums.
            assert not math.isfinite(found), name
            continue
        if name == "exp_avg_carryover":
            # The root of a difference of sums.
            found, value = found**2, value**2
        assert found == pytest.approx(value, nan_ok=True, **tolerance), name


def tolerances(tensors: Sequence[Tensor]) -> dict[str, float]:
    """Returns the tolerance of each fraction."""
    with np.errstate(all="ignore"):
        parts = [_tolerance(tensor) for tensor in tensors if tensor.parameter.numel()]
    allowed = {}
    for name in parts[0] if parts else ():
        undecided = sum(part[name][0] for part in parts)
        certain = sum(part[name][1] for part in parts) - undecided
        allowed[name] = 2 * undecided / max(certain, 1)
    return allowed


def count_maybe_idle(tensors: Sequence[Tensor]) -> int:
    """Counts the active elements whose effective gradient is 0 in float32, which has no such
    small number or in which its terms cancel."""
    count = 0
    with np.errstate(all="ignore"):
        for tensor in tensors:
            e = _elements_of(tensor)
            terms = abs(e.grad) + (0 if tensor.decoupled else abs(e.decay))
            vanishes = abs(e.effective_grad) <= np.maximum(ULPS * terms, SMALLEST_FLOAT32 / 2)
            count += int((e.active & vanishes & (e.exp_avg == 0) & (e.exp_avg_sq == 0)).sum())
    return count


def _tolerance(tensor: Tensor) -> dict[str, tuple[int, int]]:
    """Counts the undecided elements of each fraction, and all elements that it is a share of."""
    e = _elements_of(tensor)
    signed = abs(e.grad) + (0 if tensor.decoupled else abs(e.decay))
    may_be_zero = (abs(e.effective_grad) <= ULPS * signed) & (e.effective_grad != 0)
    may_be_idle = may_be_zero & (e.exp_avg == 0) & (e.exp_avg_sq == 0)
    may_be_still = (abs(e.update) <= 4 * SMALLEST_FLOAT32) & (e.update != 0)
    rate = 1 - tensor.beta2
    p_dtype, v_dtype = tensor.parameter.dtype, tensor.exp_avg_sq.dtype
    decay = e.parameter * tensor.lr * tensor.weight_decay
    undecided = {
        "idle_fraction": may_be_idle,
        "eps_dominated_fraction": may_be_idle | _near(e.denominator, tensor.eps),
        "exp_avg_sq_zero_fraction": may_be_zero,
        "exp_avg_sq_subnormal_fraction": np.zeros_like(e.active),
        "exp_avg_sq_stalled_fraction": _undecided(v_dtype, e.exp_avg_sq, rate * e.exp_avg_sq),
        "update_lost_fraction": may_be_still | _undecided(p_dtype, e.parameter, e.update),
        "grad_zero_fraction": np.zeros_like(e.active),
        "normalized_update_large_fraction": may_be_idle | _near(abs(e.direction), 0.8),
        "decay_lost_fraction": _undecided(p_dtype, e.parameter, decay),
    }
    everything = np.ones_like(e.active)
    of = {
        "eps_dominated_fraction": e.active,
        "normalized_update_large_fraction": e.active,
        "update_lost_fraction": e.update != 0,
        "decay_lost_fraction": e.decoupled_decay & (e.parameter != 0),
    }
    return {
        name: (int(mask.sum()), int(of.get(name, everything).sum()))
        for name, mask in undecided.items()
    }


def _near(values: Array, boundary: float) -> Mask:
    return np.asarray(abs(values - boundary) <= ULPS * boundary)


def _undecided(dtype: torch.dtype, values: Array, change: Array) -> Mask:
    """Marks elements where the last bits of the change decide whether it is lost in rounding."""
    # A value of a narrower dtype was rounded from float32.
    spread = ULPS * abs(change) + (0 if dtype is torch.float32 else ULPS * abs(values))
    sides = [round_to(dtype, values - change + side * spread) == values for side in (-1, 1)]
    return np.asarray(sides[0] != sides[1])
