"""The ranks that all tests of this folder use."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two ranks."""
    two = Ranks(2)
    yield two
    two.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    four = Ranks(4)
    yield four
    four.close()
