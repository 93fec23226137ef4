"""The report of a search in a real browser: what it draws, explains and copies."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lightning_adam.tune.report import write_story
from lightning_adam.tune.story import Story
from tests.support.browser import NARROW, WIDE, ReportPage, Visits, contrast
from tests.support.tables import each_row
from tests.tune.stories import shapes, tuned

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.slow

SHAPES = shapes()


def written(story: Story, folder: Path) -> Path:
    write_story(story, folder)
    return folder / "tune.html"


def chart(report: ReportPage, title: str) -> "Locator":
    return report.page.locator(f'figure[data-chart="{title}"] svg.chart')


def test_page_of_an_unusual_search_opens_without_errors(visit: Visits, tmp_path: Path) -> None:
    for shape in ("empty", "huge", "categories", "nasty"):
        report = visit(written(SHAPES[shape], tmp_path))
        assert report.page.locator("h1").is_visible()
        assert not report.page.evaluate("() => Boolean(window.hasAlerted)")


def test_every_trial_is_a_visible_mark_that_leads_to_its_row(visit: Visits, tmp_path: Path) -> None:
    report = visit(written(tuned(), tmp_path))
    for title, count in (("The path", 7), ("lr", 6), ("beta2", 3)):
        marks = chart(report, title).locator(".mark")
        assert marks.count() == count
        for mark in marks.all():
            box = mark.bounding_box()
            assert box is not None
            assert box["width"] > 4
            assert box["height"] > 4
        assert len(chart(report, title).get_attribute("aria-label") or "") > 40
    assert chart(report, "lr").get_by_text("taken", exact=True).is_visible()
    assert chart(report, "lr").get_by_text("learning rate", exact=True).is_visible()
    mark = chart(report, "lr").locator('.mark[data-trial="lr/1"]')
    # To scroll hides the tooltip.
    mark.scroll_into_view_if_needed()
    report.settle()
    mark.hover()
    tooltip = report.page.get_by_role("tooltip")
    assert tooltip.inner_text().split("\n") == [
        "lr/1: stopped early",
        "lr=0.0001",
        "metric 0.9",
        "seed 0",
        "20.0 s",
        "AdamMonitor: update_lost",
    ]
    report.page.keyboard.press("Escape")
    assert tooltip.is_hidden()
    mark.click()
    (row,) = report.page.locator("tr.is-found").all()
    assert row.get_by_role("rowheader").inner_text() == "lr/1"
    box = row.bounding_box()
    assert box is not None
    assert 0 < box["y"] < report.page.evaluate("() => innerHeight")


def test_copy_button_copies_the_overrides_also_without_a_clipboard(
    visit: Visits, tmp_path: Path
) -> None:
    report = visit(written(replace(tuned(), fixed=["data=small  one", "x=<b>"]), tmp_path))
    report.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    report.page.get_by_role("button", name="copy").click()
    report.page.get_by_role("status").get_by_text("copied").wait_for()
    copied = report.page.evaluate("() => navigator.clipboard.readText()")
    text = (tmp_path / "tune.md").read_text()
    assert copied == text.splitlines()[-1] == "'data=small  one' 'x=<b>' optimizer.lr=0.005"
    report.page.reload()
    report.page.evaluate(
        """() => {
          Object.defineProperty(navigator, "clipboard", { value: undefined });
          document.addEventListener("copy", () => { window.copied = String(getSelection()); });
        }"""
    )
    report.page.get_by_role("button", name="copy").click()
    report.page.get_by_role("status").get_by_text("copied").wait_for()
    assert report.page.evaluate("() => window.copied") == copied


def test_every_text_is_readable_in_both_themes_and_widths(visit: Visits, tmp_path: Path) -> None:
    shown = itertools.product(("tuned", "stage under way", "all at once"), (False, True))
    with each_row() as row:
        for shape, dark in shown:
            with row((shape, dark)):
                width = NARROW if dark else WIDE
                report = visit(written(SHAPES[shape], tmp_path), width, dark)
                assert not report.is_wider_than(width)
                assert [each["name"] for each in report.controls() if each["isCut"]] == []
                assert report.faint_texts() == {}
                texts = report.texts()
                assert len(texts) > 40
                assert [each["text"] for each in texts if each["isCut"]] == []


def test_theme_follows_the_system_and_a_button_changes_it(visit: Visits, tmp_path: Path) -> None:
    report = visit(written(tuned(), tmp_path), dark=True)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    dark = report.page.evaluate(ground)
    report.theme_button.click()
    light = report.page.evaluate(ground)
    assert contrast(dark, "rgb(255, 255, 255)") > 10 > 2 > contrast(light, "rgb(255, 255, 255)")
