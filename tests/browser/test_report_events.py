"""Events of the flight recorder in the report, in a real browser."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import Event
from tests.reports.run_files import run_of
from tests.support.browser import ReportPage, Visits
from tests.support.monitored import scoped

pytestmark = pytest.mark.slow

EVENTS = "events"
LAYERS = ("net.0", "net.1", "net.2")
GRAD_RMS, NONFINITE = "adam_gradient/grad_rms", "adam_underflow/nonfinite_count"


def event(step: int, reason: str) -> Event:
    """Returns an event with ten steps, the last of which is not finite."""
    last = step - 1
    logged = {}
    for layer in LAYERS:
        before = {at: 10.0 ** (at - step) for at in range(step - 10, last)}
        logged[scoped(f"layer/{layer}", GRAD_RMS)] = before | {last: math.nan}
        logged[scoped(f"layer/{layer}", NONFINITE)] = dict.fromkeys(before, 0.0) | {last: 1.0}
    return Event(step, reason, run_of(logged).series)


@pytest.fixture
def opened(visit: Visits, tmp_path: Path) -> ReportPage:
    logged = {GRAD_RMS: dict.fromkeys(range(0, 5001, 50), 1.0)}
    logged |= {scoped(f"layer/{layer}", GRAD_RMS): {0: 1.0, 5000: 2.0} for layer in LAYERS}
    events = [event(1000, "loss_spike"), event(5000, "not_finite")]
    write_report([replace(run_of(logged), events=events)], tmp_path / "report.html")
    return visit(tmp_path / "report.html")


def test_map_of_an_event_shows_the_steps_of_the_event(opened: ReportPage) -> None:
    choice = opened.choice(EVENTS, "event")
    assert choice.locator("option").all_inner_texts() == [
        "loss_spike at step 1,000",
        "not_finite at step 5,000",
    ]
    assert opened.choice(EVENTS, "statistic").input_value() == "grad_rms"
    for step in (1000, 5000):
        (drawn,) = opened.traces(EVENTS)
        assert drawn["rows"] == list(LAYERS)
        assert drawn["x"] == list(range(step - 10, step))
        first, last = opened.ranges()[EVENTS]
        assert first == pytest.approx(step - 10, abs=1)
        assert last == pytest.approx(step - 1, abs=1)
        assert math.isnan(drawn["raw"][0][-1])
        choice.select_option(index=1)
        opened.settle()
    opened.choice(EVENTS, "statistic").select_option("nonfinite_count")
    (drawn,) = opened.traces(EVENTS)
    assert [row[-2:] for row in drawn["raw"]] == [[0, 1]] * 3


def test_zoom_of_an_event_is_separate_from_that_of_the_run(opened: ReportPage) -> None:
    of_others = opened.bring("layers") and opened.ranges()["layers"]
    before = opened.bring(EVENTS) and opened.ranges()[EVENTS]
    dragged = opened.drag(EVENTS, 0.3, 0.7)
    assert opened.ranges()[EVENTS] == pytest.approx(dragged, abs=0.2)
    opened.bring("layers")
    assert opened.ranges()["layers"] == of_others
    opened.page.mouse.dblclick(*opened.middle(EVENTS))
    opened.settle()
    assert opened.ranges()[EVENTS] == before
    opened.drag("layers", 0.1, 0.2)
    opened.bring(EVENTS)
    assert opened.ranges()[EVENTS] == before
