"""The report of a search in a real browser."""

from pathlib import Path

import pytest

from lightning_adam.config.tune import SpaceConfig
from lightning_adam.tune.report import write_report
from lightning_adam.tune.strategy import Strategy
from tests.support.browser import Visits
from tests.tune.simulation import START, report_of, search

pytestmark = pytest.mark.slow

HOSTILE = "</script><b>x"


def test_page_shows_its_figures_the_overrides_and_the_tables(visit: Visits, tmp_path: Path) -> None:
    """`visit` checks that there are no console errors or requests."""
    strategy = Strategy(START, 7, SpaceConfig())
    runs, _ = search(strategy, lambda request: abs(request.configuration.lr - 0.01))
    report = report_of(strategy, runs, HOSTILE)
    write_report(report, tmp_path)
    page = visit(tmp_path / "tune.html", ready=".figure .main-svg").page
    assert page.locator(".figure").count() == page.locator(".figure .gtitle").count() == 2
    # One point for each complete run.
    full = [each for each in runs if each.request.length == 1]
    assert page.locator("#figure-0 .scatterlayer .trace").first.locator(".point").count() == len(
        full
    )
    assert page.locator("h1").inner_text() == f"Adam tuning report: {HOSTILE}"
    assert page.locator("b").count() == 0
    assert page.locator("#line").inner_text() == report.line
    for table in report.tables():
        shown = page.get_by_role("region", name=table.title).locator("tbody tr")
        assert shown.count() == len(table.rows)


def test_page_of_a_search_without_runs_opens(visit: Visits, tmp_path: Path) -> None:
    write_report(report_of(Strategy(START, 7, SpaceConfig()), []), tmp_path)
    page = visit(tmp_path / "tune.html", ready="#line").page
    assert page.locator(".figure, table").count() == 0
