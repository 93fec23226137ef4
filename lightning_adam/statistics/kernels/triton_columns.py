"""Triton device functions that compute and reduce the columns of elements.

To add a column over elements, add a line to `terms_of`.
"""

# ruff: noqa: N803, SIM300
# mypy: disable-error-code="no-untyped-def,assignment"

import triton
import triton.language as tl

from lightning_adam.statistics.kernels.triton_elements import (
    INFINITY,
    is_finite,
    reduced,
    rounded,
    smallest_normal,
)
from lightning_adam.statistics.kernels.triton_rows import SUMS, ElementColumns

_LOW, _HIGH = tl.constexpr(1e-15), tl.constexpr(1e15)
"""Range of the largest magnitude of a chunk in which float32 represents its squares, their sum, and
the squares of much smaller elements."""
_LOW_EPS, _HIGH_EPS = tl.constexpr(1e-30), tl.constexpr(1e30)
"""Range of eps, which is inverted but never squared."""
_LOW_SQUARES = tl.constexpr(1e-28)
"""Sums over a chunk above it are accurate without the squares that float32 cannot represent."""
_NORMALIZED_UPDATE = tl.constexpr(ElementColumns._fields.index("normalized_update_squares"))
_COUPLED_DECAY = tl.constexpr(ElementColumns._fields.index("undecayed_over_denominator_squares"))


@triton.jit
def terms_of(e, s, tensor, inside, CODES: tl.constexpr, NUMBER: tl.constexpr):
    """Returns the terms of each element. Masked elements are read as 0."""
    ratio = tl.where(e.has_denominator, e.m_hat * e.inverse, 0.0)
    ratio_own = tl.where(e.has_second_moment, e.m_hat * e.inverse_own, 0.0)
    lost = e.u * (s.eps * e.inverse)
    grad_ratio = e.effective * _smaller(e.inverse_own, s.inverse_eps)
    grad_ratio = tl.where(e.active, grad_ratio, 0.0)
    decay_ratio = tl.where(inside & s.is_coupled, e.undecayed * e.inverse_with_eps, 0.0)
    if NUMBER == tl.float64:
        moved = e.update != 0
        nonfinite = ~(is_finite(e.p) & is_finite(e.g) & is_finite(e.m) & is_finite(e.v))
    else:
        # u may underflow in float32. Chunks that are not finite are measured again.
        moved = (e.m != 0) & s.is_moving
        nonfinite = e.p != e.p
    v_code: tl.constexpr = CODES[3]
    is_subnormal = (e.v > 0) & (e.v < smallest_normal(tensor.v_code, v_code, NUMBER))
    v_decayed = rounded(reduced(e.v, s.one_minus_beta2, NUMBER), tensor.v_code, v_code, NUMBER)
    p_updated = rounded(e.p - e.update, tensor.p_code, CODES[0], NUMBER)
    p_decayed = rounded(reduced(e.p, s.decay_rate, NUMBER), tensor.p_code, CODES[0], NUMBER)
    return ElementColumns(
        grad_squares=e.g * e.g,
        grad_zero=(inside & (e.g == 0)).to(NUMBER),
        exp_avg_sum=e.m,
        exp_avg_squares=e.m * e.m,
        weight_squares=e.p * e.p,
        nonfinite=nonfinite.to(NUMBER),
        exp_avg_sq_sum=e.v,
        exp_avg_sq_subnormal=is_subnormal.to(NUMBER),
        exp_avg_sq_stalled=((e.v > 0) & (v_decayed == e.v)).to(NUMBER),
        max_exp_avg_sq_sum=e.v_max,
        active=e.active.to(NUMBER),
        effective_grad_squares=e.effective * e.effective,
        exp_avg_times_effective_grad=e.m * e.effective,
        exp_avg_sq_roots=e.root,
        grad_over_second_moment=grad_ratio * grad_ratio,
        second_moment_positive=e.has_second_moment.to(NUMBER),
        signal=_smaller(ratio_own * ratio_own, 1.0),
        eps_dominated=(e.active & (e.denominator < s.eps)).to(NUMBER),
        denominator_share=tl.where(e.active, e.denominator * e.inverse_with_eps, 0.0),
        energy_without_eps=ratio * ratio,
        energy_lost_to_eps=tl.where(e.has_denominator, lost * (2 * e.u + lost), 0.0),
        exp_avg_sq_zero=((e.v == 0) & (e.effective != 0)).to(NUMBER),
        normalized_update_squares=e.u * e.u,
        normalized_update_large=(tl.abs(e.u) > 0.8).to(NUMBER),
        update_nonzero=moved.to(NUMBER),
        update_lost=(moved & (p_updated == e.p)).to(NUMBER),
        weight_nonzero=(e.p != 0).to(NUMBER),
        decay_lost=((e.p != 0) & (p_decayed == e.p)).to(NUMBER),
        undecayed_squares=e.undecayed * e.undecayed,
        undecayed_times_update=e.undecayed * e.u,
        undecayed_over_denominator_squares=decay_ratio * decay_ratio,
        grad_max_abs=tl.abs(e.g),
        exp_avg_max_abs=tl.abs(e.m),
        exp_avg_sq_largest=tl.where(inside, e.v, -INFINITY),
        normalized_update_max_abs=tl.where(e.active, tl.abs(e.u), -INFINITY),
        weight_max_abs=tl.abs(e.p),
    )


@triton.jit
def is_accurate(exact, chunk, NEEDED: tl.constexpr):
    """Whether float32 is accurate for the chunk: all finite, no square too large or too small."""
    total = tl.zeros([], tl.float64)
    for index in tl.static_range(SUMS):
        total += chunk[index].to(tl.float64)
    accurate = is_finite(total) & _is_within(exact.eps, _LOW_EPS, _HIGH_EPS)
    accurate &= _is_within(chunk.grad_max_abs, _LOW, _HIGH)
    accurate &= _is_within(chunk.exp_avg_max_abs, _LOW, _HIGH)
    accurate &= _is_within(chunk.exp_avg_sq_largest, _LOW * _LOW, _HIGH * _HIGH)
    accurate &= _is_within(chunk.weight_max_abs, _LOW, _HIGH)
    if NEEDED[_NORMALIZED_UPDATE]:
        accurate &= _is_within(chunk.normalized_update_max_abs, _LOW, _HIGH)
    if NEEDED[_COUPLED_DECAY]:
        is_coupled = (exact.weight_decay > 0) & (exact.is_decoupled == 0)
        is_precise = chunk.undecayed_over_denominator_squares >= _LOW_SQUARES
        accurate &= is_precise | (chunk.weight_max_abs <= 0) | (is_coupled == 0)
    return accurate


@triton.jit
def empty_columns(LANES: tl.constexpr, NEEDED: tl.constexpr, NUMBER: tl.constexpr):
    """Returns the initial columns of each lane."""
    columns = ()
    for index in tl.static_range(len(NEEDED)):
        columns += (tl.full([LANES], 0.0 if index < SUMS else -INFINITY, NUMBER),)
    return columns


@triton.jit
def add_terms(columns, terms, NEEDED: tl.constexpr):
    """Adds the needed terms to the columns."""
    result = ()
    for index in tl.static_range(len(NEEDED)):
        if not NEEDED[index]:
            result += (columns[index],)
        elif index < SUMS:
            result += (columns[index] + tl.sum(terms[index], axis=0),)
        else:
            result += (larger(columns[index], largest_of(terms[index])),)
    return result


@triton.jit
def reduce_lanes(columns):
    """Reduces the columns over lanes."""
    result = ()
    for index in tl.static_range(len(columns)):
        if index < SUMS:
            result += (tl.sum(columns[index], axis=0),)
        else:
            result += (largest_of(columns[index]),)
    return ElementColumns(*result)


@triton.jit
def largest_of(values):
    """Returns the maximum along the first axis. In float32 it ignores NaN, which the sums show."""
    largest = tl.max(values, axis=0)
    if values.dtype == tl.float64:
        number_of_nan = tl.sum((values != values).to(tl.int32), axis=0)
        largest = tl.where(number_of_nan > 0, float("nan"), largest)
    return largest


@triton.jit
def larger(one, other):
    """Returns the larger of two values; NaN if either is NaN."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(one, other):
    return tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _is_within(largest, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Whether a maximum is in range, 0 or empty."""
    return (largest <= 0) | ((largest >= LOW) & (largest <= HIGH))
