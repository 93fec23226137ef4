from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.e2e.report_page import Visits, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Visits]:
    """Opens pages, none of which may write to the console, fail or ask a network for anything."""
    visits = Visits(browser)
    yield visits
    visits.leave()
