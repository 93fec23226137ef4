"""The CPU kernel's loops, compiled by numba: over the elements of some tensors.

To add a column, add a field to `Moments`, `Effects`, `Counts` or `Maxima` and its line to `_added`;
what the settings alone tell stands in `numba.py`.

Within a block sums run in float32, in as many lanes as the processor has, and are added up in
float64 from block to block: their relative error is that of a hundred additions. Only these
additions may be reordered. Everything else is strict IEEE arithmetic, so that a rounding is the
optimizer's own and NaN survives. What numba would type as int64 is kept to int32 by hand: one such
number leaves the whole loop without vector instructions.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 1008
"""Elements that are added up in float32: a multiple of all numbers of lanes, and below 2^10."""

STORED = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16}
"""How a dtype is named to the compiled functions; numpy has no bfloat16."""

Array = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

# Python's own numbers would make float64 and int64 of all that they meet.
ZERO, ONE, TWO, LARGE = np.float32(0), np.float32(1), np.float32(2), np.float32(0.8)
NO = np.int32(0)


class Moments(NamedTuple):
    """Sums of p, g, m, v and √v̂ alone."""

    grad_squares: float = ZERO
    entered_squares: float = ZERO
    weight_squares: float = ZERO
    exp_avg_sum: float = ZERO
    exp_avg_squares: float = ZERO
    exp_avg_sq_sum: float = ZERO
    max_exp_avg_sq_sum: float = ZERO
    exp_avg_times_entered: float = ZERO
    denominator_sum: float = ZERO
    entered_over_second_moment: float = ZERO
    signal: float = ZERO


class Effects(NamedTuple):
    """Sums of what the step did."""

    denominator_share: float = ZERO
    energy_without_eps: float = ZERO
    energy_lost_to_eps: float = ZERO
    direction_squares: float = ZERO
    undecayed_squares: float = ZERO
    """Σ(p+ηu)²."""
    undecayed_times_direction: float = ZERO
    """Σ(p+ηu)u."""


class Counts(NamedTuple):
    """Three counts in one number: the processor has not registers enough for each of them."""

    presence: int = NO
    second_moment: int = NO
    direction: int = NO
    weight: int = NO


class Maxima(NamedTuple):
    """Bits of the largest magnitudes, which order as the magnitudes do, NaN above all."""

    grad_max_abs: int = NO
    exp_avg_max_abs: int = NO
    exp_avg_sq_largest: int = NO
    direction_max_abs: int = NO


COUNTS = (
    *("grad_zero", "active", "second_moment_positive"),
    *("exp_avg_sq_subnormal", "exp_avg_sq_stalled", "exp_avg_sq_zero"),
    *("eps_dominated", "direction_large", "update_nonzero"),
    *("update_lost", "weight_nonzero", "decay_lost"),
)
"""What is counted, in the order of `Counts`."""
ROW = (*Moments._fields, *Effects._fields, *COUNTS, *Maxima._fields)
"""What the compiled function returns for an item."""
NOTHING = (Moments(), Effects(), Counts(), Maxima())


class Factors(NamedTuple):
    """What a tensor's elements are multiplied by or compared with, in float32."""

    first: Any
    """1/(1-β1^t)."""
    root: Any
    """1/√(1-β2^t)."""
    eps: Any
    inverse_eps: Any
    lr: Any
    sign: Any
    """-1 with maximize."""
    coupled: Any
    """λ if decay is coupled."""
    decay_rate: Any
    """ηλ."""
    forgotten: Any
    """1-β2."""
    normal: Any
    """The smallest normal number of v's dtype."""


def _inlined(function: Function) -> Function:
    """A part of a compiled function."""
    return njit(forceinline=True, error_model="numpy")(function)


def _compiled(function: Function) -> Any:
    """A compiled function, kept on disk where there is a place for it; it needs no GIL."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):
        dispatcher.enable_caching()
    return dispatcher


@intrinsic
def _read(context: Any, address: Any, index: Any, stored: Any) -> Any:
    """An element of a tensor as float32; None if there is no tensor."""
    if isinstance(stored, types.NoneType):
        return types.none(address, index, stored), lambda context, *_: context.get_dummy_value()

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = ir.FloatType() if stored.dtype is types.float32 else ir.IntType(16)
        pointer = builder.inttoptr(arguments[0], element.as_pointer())
        value = builder.load(builder.gep(pointer, [arguments[1]]))
        if stored.dtype is types.float16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if stored.dtype is types.uint16:
            return _widened(builder, value)
        return value

    return types.float32(types.int64, types.int64, stored), code


@intrinsic
def _rounded(context: Any, value: Any, stored: Any) -> Any:
    """A float32 as it would be stored."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if stored.dtype is types.float16:
            return builder.fpext(builder.fptrunc(value, ir.HalfType()), ir.FloatType())
        if stored.dtype is types.uint16:
            # To the nearest, ties to even; NaN stays NaN but for its last bits.
            bits = builder.bitcast(value, ir.IntType(32))
            odd = builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
            bits = builder.add(builder.add(bits, odd), bits.type(0x7FFF))
            return _widened(
                builder, builder.trunc(builder.lshr(bits, bits.type(16)), ir.IntType(16))
            )
        return value

    return types.float32(types.float32, stored), code


def _widened(builder: Any, bits: Any) -> Any:
    """The float32 whose upper half these bits are."""
    wide = builder.zext(bits, ir.IntType(32))
    return builder.bitcast(builder.shl(wide, wide.type(16)), ir.FloatType())


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), code


@intrinsic
def _int32_sum(context: Any, left: Any, right: Any) -> Any:
    """What `+` would give as an int64, which makes the loop four times as long."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(*arguments)

    return types.int32(types.int32, types.int32), code


def _reordered(function: Function, *also: str) -> Function:
    """An addition to a sum, which may be done in any order: that is what lanes are."""
    flags = {"reassoc", *also}
    return njit(forceinline=True, error_model="numpy", fastmath=flags)(function)


plus = _reordered(lambda total, term: total + term)
plus_product = _reordered(lambda total, left, right: total + left * right, "contract")
_FIRST, _SECOND, _THIRD = np.int32(1), np.int32(1 << 10), np.int32(1 << 20)


@_inlined
def plus_counts(total: int, first: bool, second: bool, third: bool) -> int:
    """Counts of three conditions."""
    total = _int32_sum(total, _FIRST if first else NO)
    total = _int32_sum(total, _SECOND if second else NO)
    return _int32_sum(total, _THIRD if third else NO)


@_inlined
def larger(largest: int, value: float) -> int:
    """The bits of the larger magnitude."""
    bits = _bits(abs(value))
    return bits if bits > largest else largest


class Element(NamedTuple):
    """What is of use to more than one column; the symbols are those of `catalogue.py`."""

    m_hat: float
    own_denominator: float
    """√ṽ."""
    denominator: float
    """√v̂."""
    to_direction: float
    """1/(√v̂+ε)."""
    u: float
    update: float
    """ηu."""
    undecayed: float
    """p+ηu."""
    entered: float
    """g̃."""
    is_active: bool


@_inlined
def _element(p: float, g: float, m: float, v: float, v_max: Any, by: Any, coupled: Any) -> Element:
    """One element; `v_max` is None without amsgrad, `coupled` without coupled decay."""
    own_denominator = np.sqrt(v) * by.root
    denominator = own_denominator if v_max is None else np.sqrt(v_max) * by.root
    m_hat = m * by.first
    to_direction = ONE / (denominator + by.eps)
    u = m_hat * to_direction
    update = by.lr * u
    undecayed = p + update
    entered = g if coupled is None else by.sign * g + by.coupled * undecayed
    is_active = (m != ZERO) | (v != ZERO) | (entered != ZERO)
    return Element(
        m_hat,
        own_denominator,
        denominator,
        to_direction,
        u,
        update,
        undecayed,
        entered,
        is_active,
    )


@_inlined
def _added(
    so_far: Any,
    p: float,
    g: float,
    m: float,
    v: float,
    v_max: Any,
    by: Any,
    coupled: Any,
    p_stored: Any,
    v_stored: Any,
) -> Any:
    """The totals with one element more."""
    moments, effects, counts, maxima = so_far
    e = _element(p, g, m, v, v_max, by, coupled)
    # Not `> 0`: NaN counts.
    has_second_moment = not (e.own_denominator <= ZERO)
    own_inverse = ONE / e.own_denominator
    over_second_moment = e.entered * min(own_inverse, by.inverse_eps)
    own_without_eps = e.m_hat * (own_inverse if has_second_moment else ZERO)
    signal = own_without_eps * own_without_eps
    inverse = (ONE / e.denominator) if not (e.denominator <= ZERO) else ZERO
    without_eps = e.m_hat * inverse
    eps_share = by.eps * inverse
    has_v, moved, has_weight = v > ZERO, e.update != ZERO, p != ZERO
    return (
        Moments(
            plus_product(moments.grad_squares, g, g),
            # Without coupled decay it is the first.
            moments.entered_squares
            if coupled is None
            else plus_product(moments.entered_squares, e.entered, e.entered),
            plus_product(moments.weight_squares, p, p),
            plus(moments.exp_avg_sum, m),
            plus_product(moments.exp_avg_squares, m, m),
            plus(moments.exp_avg_sq_sum, v),
            moments.max_exp_avg_sq_sum
            if v_max is None
            else plus(moments.max_exp_avg_sq_sum, v_max),
            plus_product(moments.exp_avg_times_entered, m, e.entered),
            plus(moments.denominator_sum, e.denominator),
            plus_product(
                moments.entered_over_second_moment, over_second_moment, over_second_moment
            ),
            plus(moments.signal, min(signal, ONE)),
        ),
        Effects(
            plus_product(effects.denominator_share, e.denominator, e.to_direction),
            plus(effects.energy_without_eps, without_eps * without_eps),
            plus_product(effects.energy_lost_to_eps, e.u * e.u, eps_share * (eps_share + TWO)),
            plus(effects.direction_squares, e.u * e.u),
            plus_product(effects.undecayed_squares, e.undecayed, e.undecayed),
            plus_product(effects.undecayed_times_direction, e.undecayed, e.u),
        ),
        Counts(
            plus_counts(counts.presence, g == ZERO, e.is_active, has_second_moment),
            plus_counts(
                counts.second_moment,
                has_v & (v < by.normal),
                has_v & (_rounded(v - by.forgotten * v, v_stored) == v),
                (v == ZERO) & (e.entered != ZERO),
            ),
            plus_counts(
                counts.direction,
                e.is_active & (e.denominator < by.eps),
                abs(e.u) > LARGE,
                moved,
            ),
            plus_counts(
                counts.weight,
                moved & (_rounded(p - e.update, p_stored) == p),
                has_weight,
                has_weight & (_rounded(p - by.decay_rate * p, p_stored) == p),
            ),
        ),
        Maxima(
            larger(maxima.grad_max_abs, g),
            larger(maxima.exp_avg_max_abs, m),
            larger(maxima.exp_avg_sq_largest, v),
            larger(maxima.direction_max_abs, e.u),
        ),
    )


@_inlined
def _add_block(
    addresses: Any, start: int, stop: int, by: Factors, stored: Any, coupled: Any, row: Any
) -> None:
    p_stored, g_stored, m_stored, v_stored, v_max_stored = stored
    p, g, m, v, v_max = addresses
    totals = NOTHING
    for index in range(start, stop):
        totals = _added(
            totals,
            _read(p, index, p_stored),
            _read(g, index, g_stored),
            _read(m, index, m_stored),
            _read(v, index, v_stored),
            _read(v_max, index, v_max_stored),
            by,
            coupled,
            p_stored,
            v_stored,
        )
    moments, effects, counts, maxima = totals
    column = 0
    for value in moments:
        row[column] += value
        column += 1
    for value in effects:
        row[column] += value
        column += 1
    for three in counts:
        row[column] += three & 0x3FF
        row[column + 1] += (three >> 10) & 0x3FF
        row[column + 2] += three >> 20
        column += 3
    for bits in maxima:
        row[column] = max(row[column], np.float64(bits))
        column += 1


@_compiled
def add_items(
    first: int,
    last: int,
    items: Array,
    addresses: Array,
    factors: Array,
    p_stored: Any,
    g_stored: Any,
    m_stored: Any,
    v_stored: Any,
    v_max_stored: Any,
    coupled: Any,
    rows: Array,
) -> None:
    """Adds up the elements of some of the items.

    Args:
        first: Position of the first of them.
        last: Position after the last.
        items: For each item its tensor's position, its first element and the one after its last.
        addresses: Of p, g, m, v and max_exp_avg_sq of each tensor.
        factors: `Factors` of each tensor.
        p_stored: How p is stored: a value of `STORED`; so for the others.
        g_stored: How g is stored.
        m_stored: How m is stored.
        v_stored: How v is stored.
        v_max_stored: How max_exp_avg_sq is stored; None without amsgrad.
        coupled: None if no tensor is under coupled decay.
        rows: Where a row of `ROW` is left for each item; zeros before.
    """
    stored = (p_stored, g_stored, m_stored, v_stored, v_max_stored)
    for item in range(first, last):
        tensor, start, end = items[item]
        at = addresses[tensor]
        by = factors[tensor]
        each = Factors(by[0], by[1], by[2], by[3], by[4], by[5], by[6], by[7], by[8], by[9])
        while start < end:
            stop = min(start + BLOCK, end)
            _add_block(
                (at[0], at[1], at[2], at[3], at[4]), start, stop, each, stored, coupled, rows[item]
            )
            start = stop


@intrinsic
def _exponent(context: Any, value: Any) -> Any:
    """The exponent bits of a number."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.trunc(builder.lshr(bits, bits.type(23)), ir.IntType(8))

    return types.uint8(types.float32), code


@_compiled
def count_items(
    first: int,
    last: int,
    items: Array,
    addresses: Array,
    factors: Array,
    p_stored: Any,
    g_stored: Any,
    m_stored: Any,
    v_stored: Any,
    v_max_stored: Any,
    coupled: Any,
    groups: Array,
    counts: Array,
) -> None:
    """Counts the exponents of the active elements of some of the items.

    Args:
        first: As for `add_items`; so are the others.
        last: Position after the last item.
        items: The items.
        addresses: Of the tensors.
        factors: Of the tensors.
        p_stored: How p is stored.
        g_stored: How g is stored.
        m_stored: How m is stored.
        v_stored: How v is stored.
        v_max_stored: How max_exp_avg_sq is stored.
        coupled: Whether decay is coupled.
        groups: The position of each tensor's group.
        counts: Where the counts are added, `[groups, quantities, bins]`.
    """
    exponents = np.empty((4, BLOCK), np.uint8)
    for item in range(first, last):
        tensor, start, end = items[item]
        p, g, m, v, v_max = addresses[tensor]
        of = factors[tensor]
        by = Factors(of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], of[8], of[9])
        ours = counts[groups[tensor]]
        while start < end:
            stop = min(start + BLOCK, end)
            idle = NO
            for index in range(start, stop):
                grad = _read(g, index, g_stored)
                element = _element(
                    _read(p, index, p_stored),
                    grad,
                    _read(m, index, m_stored),
                    _read(v, index, v_stored),
                    _read(v_max, index, v_max_stored),
                    by,
                    coupled,
                )
                # All magnitudes of an idle element are 0, as long as its gradient is.
                exponents[0, index - start] = _exponent(abs(grad) if element.is_active else ZERO)
                exponents[1, index - start] = _exponent(abs(element.m_hat))
                exponents[2, index - start] = _exponent(element.denominator)
                exponents[3, index - start] = _exponent(abs(element.u))
                idle = _int32_sum(idle, NO if element.is_active else _FIRST)
            for index in range(stop - start):
                ours[0, exponents[0, index]] += 1
                ours[1, exponents[1, index]] += 1
                ours[2, exponents[2, index]] += 1
                ours[3, exponents[3, index]] += 1
            ours[:, 0] -= idle
            start = stop
