"""Triton device functions for loads, rounding, and the elementwise quantities of Adam's step."""

# As usual in Triton, capitals are compile-time constants, and types are inferred.
# ruff: noqa: N803, N806, SIM102, SIM300
# mypy: disable-error-code="no-untyped-def"

from collections import namedtuple

import triton
import triton.language as tl

from lightning_adam.statistics.kernels.triton_rows import (
    DTYPES,
    FLOAT64,
    KINDS,
    MIXED,
    SMALLEST_NORMAL,
)

INFINITY = tl.constexpr(float("inf"))
_SHIFT, _ROOT_OF_SHIFT = tl.constexpr(2.0**32), tl.constexpr(2.0**-16)
"""A factor that makes subnormal numbers normal, and the root of its inverse."""

Factors = namedtuple(
    "Factors",
    "lr eps inverse_eps sign scale1 scale2 one_minus_beta2 decay_rate coupled_decay is_coupled"
    " is_moving",
)
"""The factors and limits of a tensor, in the dtype of the kernel."""


@triton.jit
def factors_of(exact, NUMBER: tl.constexpr):
    """Returns the factors for a row of settings."""
    is_coupled = (exact.weight_decay > 0) & (exact.is_decoupled == 0)
    return Factors(
        lr=exact.lr.to(NUMBER),
        eps=exact.eps.to(NUMBER),
        inverse_eps=(1 / exact.eps).to(NUMBER),
        sign=exact.sign.to(NUMBER),
        scale1=exact.scale1.to(NUMBER),
        scale2=exact.scale2.to(NUMBER),
        one_minus_beta2=(1 - exact.beta2).to(NUMBER),
        decay_rate=(exact.lr * exact.weight_decay).to(NUMBER),
        coupled_decay=tl.where(is_coupled, exact.weight_decay, 0.0).to(NUMBER),
        is_coupled=is_coupled,
        is_moving=exact.lr != 0,
    )


Elements = namedtuple(
    "Elements",
    "p g m v v_max has_second_moment has_denominator root denominator inverse inverse_own"
    " inverse_with_eps m_hat u update undecayed effective active",
)
"""The elementwise quantities; letters are those of the catalogue.

`v_max` is zero without amsgrad. `has_second_moment` is ṽ > 0 and `has_denominator` v̂ > 0, NaN
included. `root` is √v̂ without bias correction, `denominator` √v̂, `inverse` 1/√v̂, `inverse_own`
1/√ṽ, `inverse_with_eps` 1/(√v̂+ε), `update` ηu, `undecayed` p+ηu, and `effective` g̃.
"""


@triton.jit
def elements_of(
    tensor,
    s,
    start,
    places,
    inside,
    CODES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    NUMBER: tl.constexpr,
    IS_FAST: tl.constexpr,
):
    """Reads elements, and computes the quantities that several columns need.

    Fast operations are wrong for magnitudes that `is_accurate` rejects.
    """
    p = _load(tensor.p, tensor.p_code, CODES[0], start, places, inside, NUMBER)
    g = _load(tensor.g, tensor.g_code, CODES[1], start, places, inside, NUMBER)
    m = _load(tensor.m, tensor.m_code, CODES[2], start, places, inside, NUMBER)
    v = _load(tensor.v, tensor.v_code, CODES[3], start, places, inside, NUMBER)
    root, denominator, inverse_own = _roots(v, s.scale2, IS_FAST)
    v_max = tl.zeros_like(v)
    v_hat = v
    inverse = inverse_own
    if AMSGRAD:
        has_max = inside & (tensor.v_max != 0)
        v_max = _load(tensor.v_max, tensor.v_code, CODES[3], start, places, has_max, NUMBER)
        v_hat = tl.where(tensor.v_max != 0, v_max, v)
        root, denominator, inverse = _roots(v_hat, s.scale2, IS_FAST)
    if IS_FAST:
        inverse_with_eps = tl.rsqrt((denominator + s.eps) * (denominator + s.eps))
    else:
        inverse_with_eps = 1 / (denominator + s.eps)
    # In masked elements, v and eps may both be 0.
    u = tl.where(inside, m * inverse_with_eps * s.scale1, 0.0)
    update = s.lr * u
    undecayed = p + update
    signed = s.sign * g
    effective = signed + s.coupled_decay * undecayed
    if not IS_FAST:
        # 0 times a non-finite parameter would be NaN.
        effective = tl.where(s.is_coupled, effective, signed)
    active = (m != 0) | (v != 0) | (effective != 0)
    if not IS_FAST:
        # λp₀ may underflow in float32.
        active |= s.is_coupled & (signed == 0) & (undecayed != 0)
    has_second_moment, has_denominator = inside & ~(v <= 0), inside & ~(v_hat <= 0)
    return Elements(
        *(p, g, m, v, v_max, has_second_moment, has_denominator),
        *(root, denominator, inverse, inverse_own, inverse_with_eps),
        *(m * s.scale1, u, update, undecayed, effective, active),
    )


@triton.jit
def _roots(v, scale2, IS_FAST: tl.constexpr):
    """Returns √v, √v̂ and 1/√v̂. The root is scaled, because a subnormal v has few digits."""
    if IS_FAST:
        # The fast root flushes subnormal numbers to 0.
        normal = v * _SHIFT
        root = tl.sqrt(normal) * _ROOT_OF_SHIFT
        denominator = root * scale2
        inverse = tl.rsqrt(normal) * (1 / (scale2 * _ROOT_OF_SHIFT))
    else:
        root = tl.sqrt(v) if v.dtype == tl.float64 else tl.sqrt_rn(v)
        denominator = root * scale2
        inverse = 1 / denominator
    return root, denominator, inverse


@triton.jit
def _load(address, code, CODE: tl.constexpr, start, places, inside, NUMBER: tl.constexpr):
    """Loads elements of the common dtype of all tensors, or of the tensor if they differ."""
    values = tl.zeros(places.shape, NUMBER)
    for KIND in tl.static_range(KINDS):
        # Offsets in a chunk are int32, but its start may need int64.
        first = address.to(tl.pointer_type(DTYPES[KIND])) + start
        if CODE == KIND:
            values = _converted(tl.load(first + places, mask=inside, other=0.0), NUMBER)
        elif CODE == MIXED:
            if code == KIND:
                values = _converted(tl.load(first + places, mask=inside, other=0.0), NUMBER)
    return values


@triton.jit
def rounded(values, code, CODE: tl.constexpr, NUMBER: tl.constexpr):
    """Rounds values to the dtype."""
    result = values
    for KIND in tl.static_range(KINDS):
        if CODE == KIND:
            result = _converted(_converted(values, DTYPES[KIND]), NUMBER)
        elif CODE == MIXED:
            if code == KIND:
                result = _converted(_converted(values, DTYPES[KIND]), NUMBER)
    return result


@triton.jit
def smallest_normal(code, CODE: tl.constexpr, NUMBER: tl.constexpr):
    """Returns the smallest normal number of the dtype."""
    smallest = tl.full([], SMALLEST_NORMAL[0], NUMBER)
    for KIND in tl.static_range(KINDS):
        if CODE == KIND:
            smallest = tl.full([], SMALLEST_NORMAL[KIND], NUMBER)
        elif CODE == MIXED:
            smallest = tl.where(code == KIND, SMALLEST_NORMAL[KIND], smallest)
    return smallest


@triton.jit
def _converted(values, DTYPE: tl.constexpr):
    """Converts to another dtype through float32, as torch does for 16 bits."""
    if values.dtype == tl.float64 and DTYPE == tl.float64:
        return values
    return values.to(tl.float32).to(DTYPE)


@triton.jit
def reduced(values, share, NUMBER: tl.constexpr):
    """Returns values·(1-share), without losing a share that is too small to change 1 in float32."""
    return values * (1 - share) if NUMBER == tl.float64 else tl.fma(values, -share, values)


@triton.jit
def has_float64(tensor):
    """Whether any of the tensors is float64."""
    return (
        (tensor.p_code == FLOAT64)
        | (tensor.g_code == FLOAT64)
        | (tensor.m_code == FLOAT64)
        | (tensor.v_code == FLOAT64)
    )


@triton.jit
def is_finite(values):
    """Where values are neither infinite nor NaN."""
    return tl.abs(values) < INFINITY
