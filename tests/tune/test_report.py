"""The story as text and as a page: its numbers, its last line, and what it survives."""

import builtins
import itertools
import logging
import math
import os
import re
import shlex
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lightning_adam.tune import html, markdown, report
from lightning_adam.tune.charts import Chart, path_chart, response_charts
from lightning_adam.tune.report import write_story
from lightning_adam.tune.scale import scale_of
from lightning_adam.tune.story import Outcome, Story, Trial
from lightning_adam.tune.wording import AS_CONFIGURED, in_a_line, summary
from tests.tune.stories import NASTY, START, made_up, score, shapes, stage, start, story, tuned

SHAPES = shapes()
VOID = {"meta", "link", "br"}
SVG = {"circle", "path", "line", "rect", "polyline"}


class Page(HTMLParser):
    """A page taken apart, as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.said: dict[str, list[str]] = {}
        """By tag the texts of all elements."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self.table = self.tables.setdefault(found["id"] or "", [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
        self.said.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.said[tag][-1] += data
        if self.open and {"td", "th"} & set(self.open):
            self.table[-1][-1] += data

    @property
    def marks(self) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if "mark " in (attrs.get("class") or "")]


@pytest.fixture(params=SHAPES)
def told(request: pytest.FixtureRequest) -> Story:
    return SHAPES[request.param]


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a title."""
    (part,) = re.findall(rf"^## {title}\n\n(?:[^|\n].*\n\n)?((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines()]
    return [[cell.strip() for cell in row] for row in cells[2:]]


# ---- The text


def test_the_last_line_is_the_one_to_type(told: Story) -> None:
    line = shlex.join([*told.fixed, *told.overrides])
    text = markdown.page(told)
    assert text.endswith(f"\n\n{line or AS_CONFIGURED}\n")
    assert text.splitlines()[-1] == line or not line


@given(made_up())
def test_the_last_line_is_the_one_to_type_whatever_stands_above(told: Story) -> None:
    line = shlex.join([*told.fixed, *told.overrides]) or AS_CONFIGURED
    lines = markdown.page(told).splitlines()
    assert lines[-1] == line
    # A table is as wide everywhere as its head, whatever was typed into it.
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", above)) == len(re.findall(r"(?<!\\)\|", below))


def test_the_stages_are_told_with_their_numbers() -> None:
    start, lr, beta2 = rows(markdown.page(tuned()), "Stage by stage")
    assert start[:4] == ["start", "nothing", "2", "0.51 ± 0.014"]
    assert lr[:5] == ["lr", "lr", "4", "0.51 ± 0.014", "lr=0.005: 0.32 ± 0.028"]
    assert lr[5:] == ["+0.19 ± 0.022", "0.32 ± 0.028", "Better: taken."]
    assert beta2[4] == "betas=[0.9,0.99]: 0.31"
    assert beta2[5].startswith("+0.01 ± 0.035, with the first seed alone")
    assert beta2[6] == "0.32 ± 0.028"
    assert "- **amsgrad**: it takes part from n_trials=40 on" in markdown.page(tuned())


def test_a_stage_is_told_in_the_order_of_what_was_searched() -> None:
    told = rows(markdown.page(tuned()), "lr")
    assert [row[:4] for row in told] == [
        ["0.0001", "0", "0.9", "stopped early"],
        ["0.001", "0", "0.5", "complete"],
        ["0.001", "1", "0.52", "complete"],
        ["0.005", "0", "0.3", "complete"],
        ["0.005", "1", "0.34", "complete"],
        ["0.1", "0", "", "failed"],
    ]
    assert [row[5] for row in told] == ["", "began here", "began here", "taken", "taken", ""]


def test_failures_that_are_alike_are_one() -> None:
    made = tuned()
    failed = [replace(each, number=9) for each in made.failures["diverged"]]
    told = replace(made, trials=[*made.trials, *failed])
    assert rows(markdown.page(told), "Failures") == [["2", "diverged", "lr=0.1"]]


def test_findings_and_cost_are_told() -> None:
    text = markdown.page(tuned())
    assert rows(text, "Findings") == [["update_lost", "1", "lr=0.0001"]]
    cost = rows(text, "Cost")
    assert cost[0] == ["start", "2", "2 complete", "2 min 3 s"]
    assert cost[-1][:3] == ["together", "7", "5 complete, 1 stopped early, 1 failed"]


def test_one_that_is_under_way_says_so() -> None:
    made = tuned()
    assert "is over: 7 of at most 40 trials" in summary(made)
    assert "a gain of +0.19 ± 0.022" in summary(made)
    under_way = summary(replace(made, is_over=False))
    assert "is under way, and this is what it has come to so far" in under_way


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("empty", "No training has ended with a finite metric."),
        ("all failed", "No training has ended with a finite metric."),
        (
            "start alone",
            "The best are still the app's own settings, with a metric of 0.51 ± 0.014.",
        ),
        ("failed, then found", "no finite metric; the best found has 0.32 ± 0.028."),
        ("one seed", "a gain of +0.2, spread unknown."),
    ],
)
def test_what_it_came_to_is_said_in_a_sentence(shape: str, said: str) -> None:
    assert said in summary(SHAPES[shape])


def test_more_is_better_where_it_is() -> None:
    first = start(0.5, 0.52)
    better = score(replace(START, lr=0.005), 0.7, 0.72)
    told = story([first, stage("lr", first.after, better, "lr")], [], direction="maximize")
    assert "a gain of +0.2 ± 0.014" in summary(told)
    assert "for the largest metric" in summary(told)


# ---- The pictures


def charts(told: Story) -> list[Chart]:
    return [path_chart(told), *response_charts(told)]


def assert_inside(chart: Chart) -> None:
    """That whatever is drawn is a number within the picture."""
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


def test_all_that_is_drawn_is_within_its_picture(told: Story) -> None:
    for chart in charts(told):
        assert_inside(chart)


@given(made_up())
def test_all_that_is_drawn_is_within_its_picture_whatever_it_is(told: Story) -> None:
    path, *responses = charts(told)
    for chart in (path, *responses):
        assert_inside(chart)
    assert [mark.trial for mark in path.marks] == list(told.trials)
    searched = [(step, name) for step in told.steps for name in step.dimensions]
    for chart, (step, _) in zip(responses, searched, strict=True):
        drawn = [mark.trial for mark in chart.marks]
        assert drawn == [*told.of_incumbent(step), *told.of_stage(step.stage)]


def test_better_stands_lower_or_higher_as_the_direction_is() -> None:
    for direction, is_lower in (("minimize", True), ("maximize", False)):
        chart = path_chart(replace(tuned(), direction=direction))
        by_value = {mark.trial.value: mark.y for mark in chart.marks if mark.shape == "complete"}
        assert by_value[0.5] < by_value[0.3]
        failed = next(mark for mark in chart.marks if mark.shape == "failed")
        worst, best = (min, max) if is_lower else (max, min)
        assert failed.y == worst(mark.y for mark in chart.marks)
        assert best(by_value.values()) == by_value[0.3 if is_lower else 0.52]


def test_a_value_stands_where_its_axis_says() -> None:
    (chart,) = response_charts(SHAPES["tied"])
    at = {mark.trial.point.betas: mark.x for mark in chart.marks if mark.trial.point.betas}
    ticks = {tick.text: tick.place for tick in chart.x_ticks}
    assert at[0.9, 0.9] == ticks["0.9"] < ticks["0.99"] < ticks["0.999"] == at[0.9, 0.999]


def test_what_has_no_place_on_a_logarithmic_axis_stands_beside_it() -> None:
    for shape, text in (("no decay", "0"), ("warm-up in steps", "as configured")):
        (chart,) = response_charts(SHAPES[shape])
        assert [tick.text for tick in chart.slots] == [text]
        beside = [mark.x for mark in chart.marks if mark.trial.point == START]
        assert set(beside) == {chart.slots[0].place}
        assert all(mark.x >= max(beside) for mark in chart.marks)
    (chart,) = response_charts(SHAPES["categories"])
    assert [tick.text for tick in chart.slots] == ["false", "true"]
    assert chart.x_ticks == []


def test_one_that_is_far_worse_leaves_room_for_the_others() -> None:
    values = [0.5, 0.52, 0.48, 0.47, 0.45, 0.46]
    told = [
        Trial("lr", number, START, 0, Outcome.complete, value)
        for number, value in enumerate([*values, 3e7])
    ]
    marks = path_chart(story([], told)).marks
    assert [mark.shape for mark in marks] == ["complete"] * 6 + ["beyond"]
    assert max(each.y for each in marks[:6]) - min(each.y for each in marks[:6]) > 100


@pytest.mark.parametrize(("values", "is_log"), [([0.1, 0.2, 0.9], False), ([1e-3, 0.02, 1], True)])
def test_the_metric_is_logarithmic_where_it_spans_decades(
    values: list[float], is_log: bool
) -> None:
    told = [Trial("lr", n, START, 0, Outcome.complete, value) for n, value in enumerate(values)]
    places = [mark.y for mark in path_chart(story([], told)).marks]
    scale = scale_of(values, places[0], places[-1], is_log=is_log, room=0.0)
    assert places[1] == pytest.approx(scale.place(values[1]), abs=0.2)


def test_what_was_taken_and_what_it_began_with_are_named() -> None:
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


def test_the_page_is_whole_and_asks_nothing_of_a_network(told: Story) -> None:
    page = Page(html.page(told))
    for tag, attrs in page.elements:
        assert not {"src", "srcset", "action"} & attrs.keys()
        assert attrs.get("href", "data:,") == "data:,"
        assert tag not in {"iframe", "img", "base"}
        assert not any(name.startswith("on") for name in attrs)
    assert len(page.said["script"]) == 1
    assert "@import" not in page.said["style"][0]
    assert "url(" not in page.said["style"][0]


def test_the_page_has_every_trial_of_the_story(told: Story) -> None:
    page = Page(html.page(told))
    listed = page.tables.get("trials", [[]])[1:]
    assert len(listed) == len(told.trials)
    for row, trial in zip(listed, told.trials, strict=True):
        assert row[0] == in_a_line(f"{trial.stage}/{trial.number}")
        assert row[2] == ("" if trial.seed is None else str(trial.seed))
        assert row[3] == ("" if trial.value is None else f"{trial.value:.5g}")
        assert in_a_line(trial.error) in row[4]
    drawn = {mark["data-trial"] for mark in page.marks if "data-trial" in mark}
    assert drawn == {row[0] for row in listed}


def test_the_page_has_the_story_s_stages(told: Story) -> None:
    page = Page(html.page(told))
    listed = page.tables.get("stages", [[]])[1:]
    for row, step in zip(listed, told.steps, strict=True):
        assert row[0] == in_a_line(step.stage)
        assert row[7] == in_a_line(step.words)
        assert f"{step.after.mean:.5g}" in row[6] or not math.isfinite(step.after.mean)
    titles = page.said.get("h3", [])
    searched = [step for step in told.steps for _ in step.dimensions]
    assert len(titles) == len(searched) + bool(told.trials)


def test_the_page_has_the_line_to_type() -> None:
    made = tuned()
    assert "data=small optimizer.lr=0.005" in Page(html.page(made)).said["code"]
    as_it_is = replace(made, overrides=[], fixed=[])
    assert AS_CONFIGURED in Page(html.page(as_it_is)).said["strong"]


def test_what_was_typed_is_text_and_nothing_else() -> None:
    text = html.page(SHAPES["nasty"])
    page = Page(text)
    assert page.said["h1"] == [f"Adam tuned: {in_a_line(NASTY)}"]
    assert "alert(1)</script>" not in text
    assert "{{ 7 * 7 }}" in page.said["h1"][0]
    assert r"\udc80" in page.said["h1"][0]
    first = markdown.page(SHAPES["nasty"]).splitlines()[0]
    assert r"\| a b [x]\(y) \`\*" in first
    assert "<" not in re.sub(r"\\<", "", first)


@given(made_up())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_a_page_is_made_of_whatever_it_is(told: Story) -> None:
    page = Page(html.page(told))
    assert len(page.tables.get("trials", [[]])) == len(told.trials) + 1


# ---- The files


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_story_is_two_files_of_any_shape(
    told: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_story(told, tmp_path)
    assert names(tmp_path) == ["tune.html", "tune.md"]
    assert (tmp_path / "tune.md").read_text() == markdown.page(told)
    assert (tmp_path / "tune.html").read_text() == html.page(told)
    assert caplog.records == []


def test_who_reads_a_story_while_it_is_written_finds_a_whole_one(tmp_path: Path) -> None:
    made = tuned()
    write_story(made, tmp_path)
    is_over = threading.Event()

    def write() -> None:
        for each in range(20):
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


def test_a_story_that_cannot_be_written_stops_nothing_and_is_said_once(
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


def test_without_the_template_engine_there_is_the_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def lacking(name: str, *others: Any) -> Any:
        if name == "lightning_adam.tune" and "html" in (others[2] or ()):
            raise ModuleNotFoundError(
                "the page is made with jinja2: pip install 'lightning-adam[dashboard]'"
            )
        return real(name, *others)

    monkeypatch.setattr(report, "_said", set())
    monkeypatch.setattr(builtins, "__import__", lacking)
    for _ in range(3):
        write_story(tuned(), tmp_path)
    assert names(tmp_path) == ["tune.md"]
    assert caplog.text.count("pip install 'lightning-adam[dashboard]'") == 1
