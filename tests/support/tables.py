"""Tests over a table: every row is checked, and all rows that fail are named."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

Row = Callable[[object], AbstractContextManager[None]]


@contextmanager
def each_row() -> Iterator[Row]:
    """Collects the rows that fail, and fails with all of them at its end.

    Example:
        >>> with each_row() as row:
        ...     for number in (1, 2, 3):
        ...         with row(number):
        ...             assert number != 2, "even"
        Traceback (most recent call last):
        AssertionError: 1 of 3 rows failed
        2: AssertionError: even
    """
    failures = []
    rows = 0

    @contextmanager
    def row(name: object) -> Iterator[None]:
        nonlocal rows
        rows += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")

    yield row
    assert rows, "the table is empty"
    if failures:
        raise AssertionError("\n".join([f"{len(failures)} of {rows} rows failed", *failures]))
