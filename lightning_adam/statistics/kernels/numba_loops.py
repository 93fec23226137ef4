"""The compiled loops of the CPU kernel over the elements of tensors.

To add a column, add a field to `Moments`, `Effects`, `Counts` or `Maxima`, and compute it in
`_added`.

Within a block, sums are in float32 with one partial sum per SIMD lane. Blocks are added in float64,
so the relative error is that of about a hundred additions. Only these additions may be reordered.
All other arithmetic is strict IEEE, so that rounding is that of the optimizer and NaN propagates.
Integers are explicitly int32, because a single int64 prevents vectorization of the loop.

`add_items_exact` and `count_items_exact` are the same loops in float64, for elements outside the
range of float32. They convert blocks of any dtype first, so that one compiled variant is enough.
Compilation takes seconds.
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
"""Number of elements to add in float32: a multiple of any number of lanes, and below 2^10."""

STORED_TYPES = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16}
"""The numpy types of dtypes in the float32 loops; numpy has no bfloat16."""
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The codes of dtypes in the float64 loops."""
F32, BF16, F16, F64 = DTYPE_CODES.values()

Array = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

# Python numbers would promote operands to float64 and int64.
ZERO, ONE, TWO, LARGE = np.float32(0), np.float32(1), np.float32(2), np.float32(0.8)
NO = np.int32(0)


class Moments(NamedTuple):
    """Sums of p, g, m, v and √v̂."""

    grad_squares: float = ZERO
    effective_grad_squares: float = ZERO
    weight_squares: float = ZERO
    exp_avg_sum: float = ZERO
    exp_avg_squares: float = ZERO
    exp_avg_sq_sum: float = ZERO
    max_exp_avg_sq_sum: float = ZERO
    exp_avg_times_effective_grad: float = ZERO
    exp_avg_sq_roots: float = ZERO
    grad_over_second_moment: float = ZERO
    signal: float = ZERO


class Effects(NamedTuple):
    """Sums of the effects of the step."""

    denominator_share: float = ZERO
    energy_without_eps: float = ZERO
    energy_lost_to_eps: float = ZERO
    normalized_update_squares: float = ZERO
    undecayed_squares: float = ZERO
    undecayed_times_update: float = ZERO
    undecayed_over_denominator_squares: float = ZERO
    nonfinite: float = ZERO
    """Only counted in float64, which measures all tensors with NaN."""


class Counts(NamedTuple):
    """Three counts packed into each number, because there are too few registers."""

    presence: int = NO
    second_moment: int = NO
    update: int = NO
    weight: int = NO


class Maxima(NamedTuple):
    """Bits of the largest magnitudes, which have the same order; NaN is the largest."""

    grad_max_abs: int = NO
    exp_avg_max_abs: int = NO
    exp_avg_sq_largest: int = NO
    normalized_update_max_abs: int = NO


COUNTS = (
    *("grad_zero", "active", "second_moment_positive"),
    *("exp_avg_sq_subnormal", "exp_avg_sq_stalled", "exp_avg_sq_zero"),
    *("eps_dominated", "normalized_update_large", "update_nonzero"),
    *("update_lost", "weight_nonzero", "decay_lost"),
)
"""The counts, in the order of `Counts`."""
ROW = (*Moments._fields, *Effects._fields, *COUNTS, *Maxima._fields)
"""The columns that the compiled functions return for an item."""
_LONG = np.int64(0)
_DOUBLE = np.float64(0)
EMPTY = (Moments(), Effects(), Counts(), Maxima())
EMPTY_EXACT = (
    Moments(*[_DOUBLE] * len(Moments._fields)),
    Effects(*[_DOUBLE] * len(Effects._fields)),
    Counts(),
    Maxima(*[_LONG] * len(Maxima._fields)),
)


class Factors(NamedTuple):
    """The factors and limits of a tensor."""

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
    one_minus_beta2: Any
    """1-β2."""
    normal: Any
    """The smallest normal number of v's dtype."""


def _inlined(function: Function) -> Function:
    """Compiles a function that is inlined into others."""
    return njit(forceinline=True, error_model="numpy")(function)


def _compiled(function: Function) -> Any:
    """Compiles a function without the GIL, and caches it on disk if possible."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):
        dispatcher.enable_caching()
    return dispatcher


@intrinsic
def _read(context: Any, address: Any, index: Any, stored: Any) -> Any:
    """Reads an element as float32, or as float64 from a float64 tensor; None without a tensor."""
    if isinstance(stored, types.NoneType):
        return types.none(address, index, stored), lambda context, *_: context.get_dummy_value()

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        element = wide.get(stored.dtype, ir.IntType(16))
        pointer = builder.inttoptr(arguments[0], element.as_pointer())
        value = builder.load(builder.gep(pointer, [arguments[1]]))
        if stored.dtype is types.float16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if stored.dtype is types.uint16:
            return _widened(builder, value)
        return value

    read = types.float64 if stored.dtype is types.float64 else types.float32
    return read(types.int64, types.int64, stored), code


@intrinsic
def _rounded(context: Any, value: Any, stored: Any) -> Any:
    """Rounds a number to a dtype, given by its numpy type (float32) or its code (float64)."""
    if isinstance(stored, types.Integer):
        return types.float64(types.float64, stored), _round_to_kind

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if stored.dtype is types.float16:
            return _through_half(builder, arguments[0])
        if stored.dtype is types.uint16:
            return _through_bfloat(builder, arguments[0])
        return arguments[0]

    return types.float32(types.float32, stored), code


def _round_to_kind(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    value, kind = arguments
    # Like torch, round float64 to float32 before 16 bits.
    single = builder.fptrunc(value, ir.FloatType())
    rounded = value
    for code, narrow in (
        (F32, single),
        (BF16, _through_bfloat(builder, single)),
        (F16, _through_half(builder, single)),
    ):
        is_kind = builder.icmp_signed("==", kind, kind.type(code))
        rounded = builder.select(is_kind, builder.fpext(narrow, ir.DoubleType()), rounded)
    return rounded


def _through_half(builder: Any, value: Any) -> Any:
    return builder.fpext(builder.fptrunc(value, ir.HalfType()), ir.FloatType())


def _through_bfloat(builder: Any, value: Any) -> Any:
    """Rounds to nearest, ties to even; NaN remains NaN."""
    bits = builder.bitcast(value, ir.IntType(32))
    odd = builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
    bits = builder.add(builder.add(bits, odd), bits.type(0x7FFF))
    return _widened(builder, builder.trunc(builder.lshr(bits, bits.type(16)), ir.IntType(16)))


def _widened(builder: Any, bits: Any) -> Any:
    """Returns the float32 with these upper 16 bits."""
    wide = builder.zext(bits, ir.IntType(32))
    return builder.bitcast(builder.shl(wide, wide.type(16)), ir.FloatType())


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """Returns the bits of a number as an integer of the same width."""
    bits = types.int64 if value is types.float64 else types.int32

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(bits.bitwidth))

    return bits(value), code


@intrinsic
def _number(context: Any, bits: Any) -> Any:
    """Returns the number with these bits as float64."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if bits is types.int64:
            return builder.bitcast(arguments[0], ir.DoubleType())
        return builder.fpext(builder.bitcast(arguments[0], ir.FloatType()), ir.DoubleType())

    return types.float64(bits), code


@intrinsic
def _int32_sum(context: Any, left: Any, right: Any) -> Any:
    """Adds in int32. `+` would return an int64, which makes the loop four times slower."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(*arguments)

    return types.int32(types.int32, types.int32), code


def _reordered(function: Function, *also: str) -> Function:
    """Compiles an addition that may be reordered, so that it is vectorized."""
    flags = {"reassoc", *also}
    return njit(forceinline=True, error_model="numpy", fastmath=flags)(function)


plus = _reordered(lambda total, term: total + term)
plus_product = _reordered(lambda total, left, right: total + left * right, "contract")
_FIRST, _SECOND, _THIRD = np.int32(1), np.int32(1 << 10), np.int32(1 << 20)


@_inlined
def plus_counts(total: int, first: bool, second: bool, third: bool) -> int:
    """Adds three conditions to packed counts."""
    total = _int32_sum(total, _FIRST if first else NO)
    total = _int32_sum(total, _SECOND if second else NO)
    return _int32_sum(total, _THIRD if third else NO)


@_inlined
def larger(largest: int, value: float) -> int:
    """Returns the bits of the larger magnitude."""
    bits = _bits(abs(value))
    return bits if bits > largest else largest


class Element(NamedTuple):
    """The quantities that several columns need. Symbols are those of `catalogue.py`."""

    root: float
    """√v, with amsgrad √max_exp_avg_sq."""
    m_hat: float
    own_denominator: float
    """√ṽ."""
    denominator: float
    """√v̂."""
    over_denominator: float
    """1/(√v̂+ε)."""
    u: float
    update: float
    """ηu."""
    undecayed: float
    """p+ηu."""
    effective_grad: float
    """g̃."""
    is_active: bool


@_inlined
def _element(p: float, g: float, m: float, v: float, v_max: Any, by: Any, coupled: Any) -> Element:
    """Computes an element; `v_max` is None without amsgrad, `coupled` without coupled decay."""
    own_root = np.sqrt(v)
    root = own_root if v_max is None else np.sqrt(v_max)
    denominator = root * by.root
    m_hat = m * by.first
    over_denominator = ONE / (denominator + by.eps)
    u = m_hat * over_denominator
    update = by.lr * u
    undecayed = p + update
    effective_grad = by.sign * g
    if coupled is not None and by.coupled != ZERO:
        effective_grad += by.coupled * undecayed
    is_active = (m != ZERO) | (v != ZERO) | (effective_grad != ZERO)
    return Element(
        root,
        m_hat,
        own_root * by.root,
        denominator,
        over_denominator,
        u,
        update,
        undecayed,
        effective_grad,
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
    exact: Any,
) -> Any:
    """Adds an element to the totals; `exact` is None in float32."""
    moments, effects, counts, maxima = so_far
    e = _element(p, g, m, v, v_max, by, coupled)
    # Not `> 0`, so that NaN counts.
    has_second_moment = not (e.own_denominator <= ZERO)
    own_inverse = ONE / e.own_denominator
    over_second_moment = e.effective_grad * min(own_inverse, by.inverse_eps)
    largest_update = e.u
    v_decayed, p_decayed = v - by.one_minus_beta2 * v, p - by.decay_rate * p
    if exact is not None:
        # With eps = 0, the terms of an idle element would be NaN.
        over_second_moment = over_second_moment if e.is_active else ZERO
        largest_update = e.u if e.is_active else ZERO
        v_decayed, p_decayed = v * (ONE - by.one_minus_beta2), p * (ONE - by.decay_rate)
    own_without_eps = e.m_hat * (own_inverse if has_second_moment else ZERO)
    has_denominator = not (e.denominator <= ZERO)
    inverse = (ONE / e.denominator) if has_denominator else ZERO
    without_eps = e.m_hat * inverse
    if exact is not None:
        # Without a second moment, a NaN first moment does not count.
        own_without_eps = own_without_eps if has_second_moment else ZERO
        without_eps = without_eps if has_denominator else ZERO
    signal = own_without_eps * own_without_eps
    eps_share = by.eps * inverse
    lost = e.u * e.u
    undecayed_over_denominator = ZERO
    if coupled is not None and by.coupled != ZERO:
        undecayed_over_denominator = e.undecayed * e.over_denominator
    share = e.denominator * e.over_denominator
    if exact is not None:
        lost = lost if has_denominator else ZERO
        share = share if e.is_active else ZERO
    has_v, moved, has_weight = v > ZERO, e.update != ZERO, p != ZERO
    return (
        Moments(
            plus_product(moments.grad_squares, g, g),
            # Without coupled decay, it equals grad_squares.
            moments.effective_grad_squares
            if coupled is None
            else plus_product(moments.effective_grad_squares, e.effective_grad, e.effective_grad),
            plus_product(moments.weight_squares, p, p),
            plus(moments.exp_avg_sum, m),
            plus_product(moments.exp_avg_squares, m, m),
            plus(moments.exp_avg_sq_sum, v),
            moments.max_exp_avg_sq_sum
            if v_max is None
            else plus(moments.max_exp_avg_sq_sum, v_max),
            plus_product(moments.exp_avg_times_effective_grad, m, e.effective_grad),
            plus(moments.exp_avg_sq_roots, e.root),
            plus_product(moments.grad_over_second_moment, over_second_moment, over_second_moment),
            plus(moments.signal, min(signal, ONE)),
        ),
        Effects(
            plus(effects.denominator_share, share),
            plus(effects.energy_without_eps, without_eps * without_eps),
            plus_product(effects.energy_lost_to_eps, lost, eps_share * (eps_share + TWO)),
            plus(effects.normalized_update_squares, e.u * e.u),
            plus_product(effects.undecayed_squares, e.undecayed, e.undecayed),
            plus_product(effects.undecayed_times_update, e.undecayed, e.u),
            effects.undecayed_over_denominator_squares
            if coupled is None
            else plus_product(
                effects.undecayed_over_denominator_squares,
                undecayed_over_denominator,
                undecayed_over_denominator,
            ),
            effects.nonfinite
            if exact is None
            else plus(effects.nonfinite, ZERO if _are_finite(p, g, m, v) else ONE),
        ),
        Counts(
            plus_counts(counts.presence, g == ZERO, e.is_active, has_second_moment),
            plus_counts(
                counts.second_moment,
                has_v & (v < by.normal),
                has_v & (_rounded(v_decayed, v_stored) == v),
                (v == ZERO) & (e.effective_grad != ZERO),
            ),
            plus_counts(
                counts.update,
                e.is_active & (e.denominator < by.eps),
                abs(e.u) > LARGE,
                moved,
            ),
            plus_counts(
                counts.weight,
                moved & (_rounded(p - e.update, p_stored) == p),
                has_weight,
                has_weight & (_rounded(p_decayed, p_stored) == p),
            ),
        ),
        Maxima(
            larger(maxima.grad_max_abs, g),
            larger(maxima.exp_avg_max_abs, m),
            larger(maxima.exp_avg_sq_largest, v),
            larger(maxima.normalized_update_max_abs, largest_update),
        ),
    )


@_inlined
def _are_finite(p: float, g: float, m: float, v: float) -> bool:
    limit = np.inf
    return (abs(p) < limit) & (abs(g) < limit) & (abs(m) < limit) & (abs(v) < limit)


@_inlined
def _flush(totals: Any, row: Any) -> None:
    """Adds the totals of a block to the row of its item."""
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
        value = _number(bits)
        # NaN remains.
        if not (value <= row[column]) and row[column] == row[column]:
            row[column] = value
        column += 1


@_inlined
def _factors(by: Any) -> Factors:
    return Factors(by[0], by[1], by[2], by[3], by[4], by[5], by[6], by[7], by[8], by[9])


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
    """Sums over the elements of some items in float32.

    Args:
        first: Index of the first item.
        last: Index after the last item.
        items: Tensor, start and end of each item.
        addresses: Addresses of p, g, m, v and max_exp_avg_sq of each tensor.
        factors: `Factors` of each tensor, in float32.
        p_stored: Type of p, a value of `STORED_TYPES`.
        g_stored: Type of g.
        m_stored: Type of m.
        v_stored: Type of v.
        v_max_stored: Type of max_exp_avg_sq; None without amsgrad.
        coupled: None without coupled decay.
        rows: Output, initially 0: a row of `ROW` for each item.
    """
    for item in range(first, last):
        tensor, start, end = items[item]
        p, g, m, v, v_max = addresses[tensor]
        by = _factors(factors[tensor])
        while start < end:
            stop = min(start + BLOCK, end)
            totals = EMPTY
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
                    None,
                )
            _flush(totals, rows[item])
            start = stop


@_inlined
def _fill(kind: int, address: int, start: int, stop: int, buffer: Array) -> None:
    """Converts a block of a tensor to float64."""
    size = stop - start
    if kind == F32:
        for index in range(size):
            buffer[index] = _read(address, start + index, np.float32)
    elif kind == BF16:
        for index in range(size):
            buffer[index] = _read(address, start + index, np.uint16)
    elif kind == F16:
        for index in range(size):
            buffer[index] = _read(address, start + index, np.float16)
    else:
        for index in range(size):
            buffer[index] = _read(address, start + index, np.float64)


@_compiled
def add_items_exact(
    first: int,
    last: int,
    items: Array,
    addresses: Array,
    kinds: Array,
    factors: Array,
    rows: Array,
) -> None:
    """Sums over the elements of some items in float64.

    Args:
        first: Index of the first item.
        last: Index after the last item.
        items: As for `add_items`.
        addresses: As for `add_items`.
        kinds: Codes of the dtypes of p, g, m, v and max_exp_avg_sq (v without amsgrad).
        factors: `Factors` of each tensor, in float64.
        rows: Output, initially 0: a row of `ROW` for each item.
    """
    buffers = np.empty((5, BLOCK))
    for item in range(first, last):
        tensor, start, end = items[item]
        by = _factors(factors[tensor])
        p_kind, v_kind = kinds[tensor, 0], kinds[tensor, 3]
        while start < end:
            stop = min(start + BLOCK, end)
            for operand in range(5):
                address = addresses[tensor, operand]
                _fill(kinds[tensor, operand], address, start, stop, buffers[operand])
            totals = EMPTY_EXACT
            for index in range(stop - start):
                totals = _added(
                    totals,
                    buffers[0, index],
                    buffers[1, index],
                    buffers[2, index],
                    buffers[3, index],
                    buffers[4, index],
                    by,
                    True,
                    p_kind,
                    v_kind,
                    True,
                )
            _flush(totals, rows[item])
            start = stop


@intrinsic
def _exponent(context: Any, value: Any) -> Any:
    """Returns the exponent bits of a number in float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value is types.float64:
            bits = builder.bitcast(arguments[0], ir.IntType(64))
            shifted = builder.and_(builder.lshr(bits, bits.type(52)), bits.type(0x7FF))
            # 1023 and 127 are the biases.
            exponent = builder.sub(shifted, bits.type(1023 - 127))
            for limit, sign in ((0, "<"), (255, ">")):
                is_beyond = builder.icmp_signed(sign, exponent, bits.type(limit))
                exponent = builder.select(is_beyond, bits.type(limit), exponent)
            return builder.trunc(exponent, ir.IntType(8))
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.trunc(builder.lshr(bits, bits.type(23)), ir.IntType(8))

    return types.uint8(value), code


@_inlined
def _exponents(element: Any, grad: float) -> Any:
    """Returns the exponents of the magnitudes of an element; 0 for an idle one."""
    return (
        _exponent(abs(grad if element.is_active else element.m_hat)),
        _exponent(abs(element.m_hat)),
        _exponent(element.denominator),
        _exponent(abs(element.u if element.is_active else element.m_hat)),
    )


@_inlined
def _count(exponents: Array, size: int, idle: int, counts: Array) -> None:
    """Adds the exponents of a block to the counts of its group."""
    for index in range(size):
        counts[0, exponents[0, index]] += 1
        counts[1, exponents[1, index]] += 1
        counts[2, exponents[2, index]] += 1
        counts[3, exponents[3, index]] += 1
    counts[:, 0] -= idle


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
    """Counts the exponents of the active elements of some items in float32.

    Takes the arguments of `add_items`, but adds to `counts`, `[groups, quantities, bins]`.
    `groups` has the index of the group of each tensor.
    """
    exponents = np.empty((4, BLOCK), np.uint8)
    for item in range(first, last):
        tensor, start, end = items[item]
        p, g, m, v, v_max = addresses[tensor]
        by = _factors(factors[tensor])
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
                of_grad, of_m, of_denominator, of_u = _exponents(element, grad)
                exponents[0, index - start] = of_grad
                exponents[1, index - start] = of_m
                exponents[2, index - start] = of_denominator
                exponents[3, index - start] = of_u
                idle = _int32_sum(idle, NO if element.is_active else _FIRST)
            _count(exponents, stop - start, idle, counts[groups[tensor]])
            start = stop


@_compiled
def count_items_exact(
    first: int,
    last: int,
    items: Array,
    addresses: Array,
    kinds: Array,
    factors: Array,
    groups: Array,
    counts: Array,
) -> None:
    """Counts the exponents of the active elements of some items in float64.

    Takes the arguments of `add_items_exact`, but adds to `counts`, `[groups, quantities, bins]`.
    `groups` has the index of the group of each tensor.
    """
    exponents = np.empty((4, BLOCK), np.uint8)
    buffers = np.empty((5, BLOCK))
    for item in range(first, last):
        tensor, start, end = items[item]
        by = _factors(factors[tensor])
        while start < end:
            stop = min(start + BLOCK, end)
            for operand in range(5):
                address = addresses[tensor, operand]
                _fill(kinds[tensor, operand], address, start, stop, buffers[operand])
            idle = NO
            for index in range(stop - start):
                grad = buffers[1, index]
                element = _element(
                    buffers[0, index],
                    grad,
                    buffers[2, index],
                    buffers[3, index],
                    buffers[4, index],
                    by,
                    True,
                )
                of_grad, of_m, of_denominator, of_u = _exponents(element, grad)
                exponents[0, index] = of_grad
                exponents[1, index] = of_m
                exponents[2, index] = of_denominator
                exponents[3, index] = of_u
                idle = _int32_sum(idle, NO if element.is_active else _FIRST)
            _count(exponents, stop - start, idle, counts[groups[tensor]])
            start = stop


@_compiled
def add_grad_squares(
    first: int, last: int, items: Array, addresses: Array, kinds: Array, squares: Array
) -> None:
    """Sums over the squared gradients of some items in float64.

    Args:
        first: Index of the first item.
        last: Index after the last item.
        items: As for `add_items`.
        addresses: Address of each gradient.
        kinds: Code of the dtype of each gradient.
        squares: Output, initially 0: the sum of each item.
    """
    buffer = np.empty(BLOCK)
    for item in range(first, last):
        tensor, start, end = items[item]
        while start < end:
            stop = min(start + BLOCK, end)
            _fill(kinds[tensor], addresses[tensor], start, stop, buffer)
            total = _DOUBLE
            for index in range(stop - start):
                total = plus_product(total, buffer[index], buffer[index])
            squares[item] += total
            start = stop


@_compiled
def read_steps(addresses: Array, kinds: Array, steps: Array) -> None:
    """Reads a number at each address.

    Args:
        addresses: Addresses of the numbers.
        kinds: Codes of the dtypes, float32 or float64.
        steps: Output: the numbers.
    """
    for index in range(len(addresses)):
        if kinds[index] == F64:
            steps[index] = _read(addresses[index], 0, np.float64)
        else:
            steps[index] = _read(addresses[index], 0, np.float32)
