"""Covering arrays: few cases of a large product that contain every pair of values."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Chooses rows of a product so that each pair of values of two axes is in one of them.

    Use it for products of more than 20 cases. Smaller ones are worth running whole: a fault that
    needs three values together is not found by pairs.

    Args:
        *axes: The values of each parameter. A `pytest.param` counts as one value.

    Returns:
        The rows in the order of the product, the same at every call.

    Example:
        >>> pairwise("ab", (1, 2), (True, False))
        [('a', 1, True), ('a', 2, False), ('b', 1, False), ('b', 2, True)]
    """
    columns = [list(axis) for axis in axes]
    places = list(itertools.product(*(range(len(column)) for column in columns)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in places}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(places, key=lambda row: len(pairs[row] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return [
        tuple(column[place] for column, place in zip(columns, row, strict=True))
        for row in sorted(chosen)
    ]


def pairwise_params(*axes: dict[str, Any]) -> list[Any]:
    """Returns `pytest.param`s of pairwise rows of named values; the ids are the joined names."""
    return [
        pytest.param(*(axis[name] for axis, name in zip(axes, row, strict=True)), id=", ".join(row))
        for row in pairwise(*axes)
    ]
