"""Arithmetic of the reference: exact widening, rounding to a dtype, and sums in long double.

A float32 of 1e30 squared, times many, still fits in a long double, and so does one of 1e-30.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Wide = npt.NDArray[np.longdouble]


def to_float64(values: torch.Tensor | npt.ArrayLike) -> Array:
    """Copy values to float64, exactly."""
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16; widening to float64 loses nothing from any narrower float.
        values = values.detach().to("cpu", torch.float64, copy=True).numpy()
        return np.asarray(values, dtype=np.float64)
    return np.array(values, dtype=np.float64)


def flat(values: torch.Tensor) -> Array:
    """Copy a tensor to one flat float64 array, exactly."""
    return to_float64(values).reshape(-1)


def round_to(dtype: torch.dtype, values: Array) -> Array:
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
        torch.bfloat16: round_to_bfloat16,
    }
    if dtype not in roundings:
        raise ValueError(f"no rounding is defined for {dtype}")
    return roundings[dtype](values)


def round_to_bfloat16(values: Array) -> Array:
    """Round to float32, then to its upper 16 bits, both times to nearest, ties to even."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    last_kept_bit = (bits >> np.uint32(16)) & np.uint32(1)
    carried = (bits + np.uint32(0x7FFF) + last_kept_bit) & np.uint32(0xFFFF0000)
    # The carry can turn a NaN into an infinity or a zero, so NaN does not pass through it.
    rounded = np.where(np.isnan(single), single, carried.view(np.float32))
    return rounded.astype(np.float64)


def widen(values: Array) -> Wide:
    """Convert to long double, whose range and precision keep squares and sums faithful."""
    return values.astype(np.longdouble)


def square(values: Array) -> Wide:
    """Square in long double."""
    squares: Wide = np.square(values, dtype=np.longdouble)
    return squares


def sum_of_squares(values: Array) -> np.longdouble:
    """Sum the squares of the values."""
    total: np.longdouble = np.sum(square(values))
    return total


def norm(values: Array) -> float:
    """Compute the Euclidean norm; that of no values is zero."""
    return float(np.sqrt(sum_of_squares(values)))


def mean(values: Array | Wide) -> float | None:
    """Compute the mean; that of no values is undefined."""
    return float(np.mean(values, dtype=np.longdouble)) if values.size else None


def root_mean_square(values: Array) -> float | None:
    """Compute the root mean square; that of no values is undefined."""
    return float(np.sqrt(sum_of_squares(values) / values.size)) if values.size else None


def cosine(left: Array, right: Array) -> float | None:
    """Compute the cosine of the angle between two vectors, undefined where one of them is zero."""
    lengths = np.sqrt(sum_of_squares(left)) * np.sqrt(sum_of_squares(right))
    products: Wide = np.multiply(left, right, dtype=np.longdouble)
    return None if lengths == 0 else float(np.sum(products) / lengths)


def maximum(values: Array) -> float | None:
    """Find the largest value, NaN if there is one; that of no values is undefined."""
    return float(np.max(values)) if values.size else None


def share(chosen: Mask) -> float | None:
    """Compute the share of a set that is chosen; that of an empty set is undefined."""
    return float(np.count_nonzero(chosen) / chosen.size) if chosen.size else None


def ratio(numerator: float, denominator: float) -> float | None:
    """Divide, undefined where the denominator is zero."""
    return None if denominator == 0 else numerator / denominator


def single_value(values: Iterable[float]) -> float | None:
    """Give the value that all share, undefined where there is none or more than one."""
    distinct = set(values)
    return float(distinct.pop()) if len(distinct) == 1 else None
