"""The report of a search as text and as a page: its numbers, its last line, its charts."""

import itertools
import logging
import math
import os
import re
import shlex
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from lightning_adam.tune import html, markdown, report
from lightning_adam.tune.charts import Chart, path_chart, response_charts
from lightning_adam.tune.report import write_story
from lightning_adam.tune.scale import scale_of
from lightning_adam.tune.story import Outcome, Story, Trial
from lightning_adam.tune.wording import AS_CONFIGURED, in_a_line, summary
from tests.support.html_page import HtmlPage
from tests.support.tables import each_row
from tests.tune.stories import NASTY, START, made_up, score, shapes, stage, start, story, tuned

SHAPES = shapes()


def parsed(made: Story) -> HtmlPage:
    """Returns the page of a story, of which every element is closed."""
    page = HtmlPage(html.page(made))
    assert page.misplaced == []
    return page


def rows(text: str, title: str) -> list[list[str]]:
    (part,) = re.findall(rf"^## {title}\n\n(?:[^|\n].*\n\n)?((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines()]
    return [[cell.strip() for cell in row] for row in cells[2:]]


# ---- Reports of every shape


def assert_text(made: Story) -> None:
    """Checks the last line, and that a table is as wide everywhere as its head."""
    line = shlex.join([*made.fixed, *made.overrides]) or AS_CONFIGURED
    text = markdown.page(made)
    assert text.endswith(f"\n\n{line}\n")
    lines = text.splitlines()
    assert lines[-1] == line
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", above)) == len(re.findall(r"(?<!\\)\|", below))


def assert_charts(made: Story) -> None:
    path, responses = path_chart(made), response_charts(made)
    for chart in (path, *responses):
        assert_inside(chart)
    assert [mark.trial for mark in path.marks] == list(made.trials)
    searched = [(step, name) for step in made.steps for name in step.dimensions]
    for chart, (step, _) in zip(responses, searched, strict=True):
        drawn = [mark.trial for mark in chart.marks]
        assert drawn == [*made.of_incumbent(step), *made.of_stage(step.stage)]


def assert_inside(chart: Chart) -> None:
    """Checks that everything has finite coordinates inside the chart."""
    places = [(mark.x, mark.y) for mark in chart.marks]
    places += [(label.x, label.y) for label in chart.labels]
    places += [*chart.rings, *(end for line in chart.lines for end in line)]
    places += [(level.first, level.y) for level in chart.levels]
    places += [(level.last, level.low or level.y) for level in chart.levels]
    places += [(level.last, level.high or level.y) for level in chart.levels]
    places += [(tick.place, 0.0) for tick in [*chart.x_ticks, *chart.slots]]
    places += [(chart.left, tick.place) for tick in chart.y_ticks]
    for x, y in places:
        assert 0 <= x <= chart.width
        assert 0 <= y <= chart.height


def assert_page(made: Story) -> None:
    """Checks that the page loads nothing and shows every trial and stage."""
    page = parsed(made)
    for element in page.elements:
        assert not {"src", "srcset", "action"} & element.attributes.keys()
        assert element.attributes.get("href", "data:,") == "data:,"
        assert element.tag not in {"iframe", "img", "base"}
        assert not any(name.startswith("on") for name in element.attributes)
    assert len(page.all("script")) == 1
    (style, *_) = page.all("style")
    assert "@import" not in style.source
    assert "url(" not in style.source
    listed = page.cells("trials")[1:]
    for cells, trial in zip(listed, made.trials, strict=True):
        assert cells[0] == in_a_line(f"{trial.stage}/{trial.number}")
        assert cells[2] == ("" if trial.seed is None else str(trial.seed))
        assert cells[3] == ("" if trial.value is None else f"{trial.value:.5g}")
        assert in_a_line(trial.error) in cells[4]
    marks = [each for each in page.elements if "mark " in each.attributes.get("class", "")]
    drawn = {each.attributes.get("data-trial") for each in marks} - {None}
    assert drawn == {cells[0] for cells in listed}
    for cells, step in zip(page.cells("stages")[1:], made.steps, strict=True):
        assert cells[0] == in_a_line(step.stage)
        assert cells[7] == in_a_line(step.words)
        assert f"{step.after.mean:.5g}" in cells[6] or not math.isfinite(step.after.mean)
    searched = [step for step in made.steps for _ in step.dimensions]
    assert len(page.all("h3")) == len(searched) + bool(made.trials)


def test_report_of_every_shape_is_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with each_row() as row:
        for shape, made in SHAPES.items():
            with row(shape):
                assert_text(made)
                assert_charts(made)
                assert_page(made)
                write_story(made, tmp_path)
                assert names(tmp_path) == ["tune.html", "tune.md"]
                assert (tmp_path / "tune.md").read_text() == markdown.page(made)
                assert (tmp_path / "tune.html").read_text() == html.page(made)
                assert caplog.records == []


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(made_up())
def test_report_is_complete_whatever_the_numbers_and_words(made: Story) -> None:
    assert_text(made)
    assert_charts(made)
    assert_page(made)


# ---- The text


def test_stages_are_listed_with_their_numbers() -> None:
    start, lr, beta2 = rows(markdown.page(tuned()), "Stage by stage")
    assert start[:4] == ["start", "nothing", "2", "0.51 ± 0.014"]
    assert lr[:5] == ["lr", "lr", "4", "0.51 ± 0.014", "lr=0.005: 0.32 ± 0.028"]
    assert lr[5:] == ["+0.19 ± 0.022", "0.32 ± 0.028", "Better: taken."]
    assert beta2[4] == "betas=[0.9,0.99]: 0.31"
    assert beta2[5].startswith("+0.01 ± 0.035, with the first seed alone")
    assert beta2[6] == "0.32 ± 0.028"
    assert "- **amsgrad**: it takes part from n_trials=40 on" in markdown.page(tuned())


def test_trials_of_a_stage_are_sorted_by_the_searched_value() -> None:
    made = rows(markdown.page(tuned()), "lr")
    assert [row[:4] for row in made] == [
        ["0.0001", "0", "0.9", "stopped early"],
        ["0.001", "0", "0.5", "complete"],
        ["0.001", "1", "0.52", "complete"],
        ["0.005", "0", "0.3", "complete"],
        ["0.005", "1", "0.34", "complete"],
        ["0.1", "0", "", "failed"],
    ]
    assert [row[5] for row in made] == ["", "began here", "began here", "taken", "taken", ""]


def test_equal_failures_are_grouped() -> None:
    made = tuned()
    failed = [replace(each, number=9) for each in made.failures["diverged"]]
    made = replace(made, trials=[*made.trials, *failed])
    assert rows(markdown.page(made), "Failures") == [["2", "diverged", "lr=0.1"]]


def test_findings_and_cost_are_listed() -> None:
    text = markdown.page(tuned())
    assert rows(text, "Findings") == [["update_lost", "1", "lr=0.0001"]]
    cost = rows(text, "Cost")
    assert cost[0] == ["start", "2", "2 complete", "2 min 3 s"]
    assert cost[-1][:3] == ["together", "7", "5 complete, 1 stopped early, 1 failed"]


def test_summary_of_a_running_search_says_so() -> None:
    made = tuned()
    assert "is over: 7 of at most 40 trials" in summary(made)
    assert "a gain of +0.19 ± 0.022" in summary(made)
    under_way = summary(replace(made, is_over=False))
    assert "is under way, and this is what it has come to so far" in under_way


SUMMARIES = {
    "empty": "No training has ended with a finite metric.",
    "all failed": "No training has ended with a finite metric.",
    "start alone": "The best are still the app's own settings, with a metric of 0.51 ± 0.014.",
    "failed, then found": "no finite metric; the best found has 0.32 ± 0.028.",
    "one seed": "a gain of +0.2, spread unknown.",
}


def test_summary_is_a_sentence() -> None:
    with each_row() as row:
        for shape, sentence in SUMMARIES.items():
            with row(shape):
                assert sentence in summary(SHAPES[shape])


def test_gain_is_positive_where_the_metric_is_maximized() -> None:
    first = start(0.5, 0.52)
    better = score(replace(START, lr=0.005), 0.7, 0.72)
    made = story([first, stage("lr", first.after, better, "lr")], [], direction="maximize")
    assert "a gain of +0.2 ± 0.014" in summary(made)
    assert "for the largest metric" in summary(made)


# ---- The charts


def test_better_trials_are_lower_or_higher_by_the_direction() -> None:
    for direction, is_lower in (("minimize", True), ("maximize", False)):
        chart = path_chart(replace(tuned(), direction=direction))
        by_value = {mark.trial.value: mark.y for mark in chart.marks if mark.shape == "complete"}
        assert by_value[0.5] < by_value[0.3]
        failed = next(mark for mark in chart.marks if mark.shape == "failed")
        worst, best = (min, max) if is_lower else (max, min)
        assert failed.y == worst(mark.y for mark in chart.marks)
        assert best(by_value.values()) == by_value[0.3 if is_lower else 0.52]


def test_value_stands_at_its_tick() -> None:
    (chart,) = response_charts(SHAPES["tied"])
    at = {mark.trial.point.betas: mark.x for mark in chart.marks if mark.trial.point.betas}
    ticks = {tick.text: tick.place for tick in chart.x_ticks}
    assert at[0.9, 0.9] == ticks["0.9"] < ticks["0.99"] < ticks["0.999"] == at[0.9, 0.999]


def test_value_without_a_logarithm_stands_beside_the_axis() -> None:
    for shape, text in (("no decay", "0"), ("warm-up in steps", "as configured")):
        (chart,) = response_charts(SHAPES[shape])
        assert [tick.text for tick in chart.slots] == [text]
        beside = [mark.x for mark in chart.marks if mark.trial.point == START]
        assert set(beside) == {chart.slots[0].place}
        assert all(mark.x >= max(beside) for mark in chart.marks)
    (chart,) = response_charts(SHAPES["categories"])
    assert [tick.text for tick in chart.slots] == ["false", "true"]
    assert chart.x_ticks == []


def test_outlier_does_not_compress_the_other_trials() -> None:
    values = [0.5, 0.52, 0.48, 0.47, 0.45, 0.46]
    made = [
        Trial("lr", number, START, 0, Outcome.complete, value)
        for number, value in enumerate([*values, 3e7])
    ]
    marks = path_chart(story([], made)).marks
    assert [mark.shape for mark in marks] == ["complete"] * 6 + ["beyond"]
    assert max(each.y for each in marks[:6]) - min(each.y for each in marks[:6]) > 100


def test_metric_axis_is_logarithmic_where_metrics_span_decades() -> None:
    for values, is_log in (([0.1, 0.2, 0.9], False), ([1e-3, 0.02, 1], True)):
        made = [Trial("lr", n, START, 0, Outcome.complete, value) for n, value in enumerate(values)]
        places = [mark.y for mark in path_chart(story([], made)).marks]
        scale = scale_of(values, places[0], places[-1], is_log=is_log, room=0.0)
        assert places[1] == pytest.approx(scale.place(values[1]), abs=0.2)


def test_start_and_result_of_a_stage_are_labeled() -> None:
    lr, beta2 = response_charts(tuned())
    assert {label.text for label in lr.labels} == {"began here", "taken"}
    assert {label.text for label in beta2.labels} == {"stays"}
    assert sorted(lr.rings) == sorted(
        (mark.x, mark.y) for mark in lr.marks if mark.trial.point.lr == 0.005
    )
    (under_way,) = response_charts(SHAPES["stage under way"])
    assert {label.text for label in under_way.labels} == {"began here", "best so far"}
    assert under_way.rings == []


# ---- The page


def test_page_shows_the_overrides() -> None:
    made = tuned()
    assert "data=small optimizer.lr=0.005" in parsed(made).texts("code")
    as_it_is = replace(made, overrides=[], fixed=[])
    assert AS_CONFIGURED in parsed(as_it_is).texts("strong")


def test_names_are_never_read_as_html_or_markdown() -> None:
    page = parsed(SHAPES["nasty"])
    (heading,) = page.all("h1")
    assert heading.text == f"Adam tuned: {in_a_line(NASTY)}"
    assert "alert(1)</script>" not in html.page(SHAPES["nasty"])
    assert "{{ 7 * 7 }}" in heading.text
    assert r"\udc80" in heading.text
    first = markdown.page(SHAPES["nasty"]).splitlines()[0]
    assert r"\| a b [x]\(y) \`\*" in first
    assert "<" not in re.sub(r"\\<", "", first)


# ---- The files


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_report_is_complete_for_a_reader_while_it_is_written(tmp_path: Path) -> None:
    made = tuned()
    write_story(made, tmp_path)
    is_over = threading.Event()

    def write() -> None:
        for each in range(5):
            write_story(replace(made, n_trials=40 + each), tmp_path)
        is_over.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not is_over.is_set():
        assert (tmp_path / "tune.md").read_text().endswith("\ndata=small optimizer.lr=0.005\n")
        assert (tmp_path / "tune.html").read_text().endswith("</html>")
    for writer in writers:
        writer.join()
    assert names(tmp_path) == ["tune.html", "tune.md"]


def test_report_that_cannot_be_written_warns_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_story(tuned(), tmp_path)
    before = (tmp_path / "tune.md").read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "_said", set())
    with monkeypatch.context() as full:
        full.setattr(os, "replace", fail)
        for _ in range(3):
            write_story(replace(tuned(), name="another"), tmp_path)
    assert names(tmp_path) == ["tune.html", "tune.md"]
    assert (tmp_path / "tune.md").read_text() == before
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "tune.md was not written (OSError: " in caplog.text
    write_story(tuned(), tmp_path / "gone")
