"""The report in a real browser: axes, references, findings, smoothing, time, layers, search."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_adam.findings import RULES
from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import Event, Run
from lightning_adam.reports.summary import CHECKPOINT
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import Histogram
from tests.reports.run_files import run_of, series_of
from tests.support.browser import CROWDED_TICKS, NARROW, WIDE, ReportPage, Visits
from tests.support.findings import finding
from tests.support.monitored import scoped

pytestmark = pytest.mark.slow

Shown = Callable[..., ReportPage]
Values = dict[int, float]
LAYERS = [f"net.{number}" for number in range(12)]
RATIO, EPS_LOSS = (STATISTICS[name].key for name in ("rms_ratio_max", "eps_energy_loss"))
LOST, STEP_SIZE = (STATISTICS[name].key for name in ("update_lost_fraction", "update_to_weight"))
LR = STATISTICS["lr"].key


@pytest.fixture
def show(visit: Visits, tmp_path: Path) -> Shown:
    """Returns a function that writes and opens the report of some runs."""

    def opened(*runs: Run, refresh: float | None = None, **settings: Any) -> ReportPage:
        write_report(runs, tmp_path / "report.html", refresh)
        return visit(tmp_path / "report.html", **settings)

    return opened


def noise(steps: int = 200, scale: float = 0.1, middle: float = 1.0) -> Values:
    values = middle * np.exp(scale * np.random.default_rng(0).normal(size=steps))
    return dict(enumerate(values.tolist()))


def axis_of(report: ReportPage, chart: str, letter: str = "y") -> list[float]:
    """Returns the ends of an axis: exponents on a logarithmic one."""
    found: list[float] = report.bring(chart).evaluate(
        f"(plot) => [...plot._fullLayout.{letter}axis.range]"
    )
    return found


# ---- Axes


def test_outliers_are_outside_the_axis_until_the_full_range_is_selected(show: Shown) -> None:
    report = show(run_of({RATIO: noise() | {100: 1e9}, LR: noise(middle=1e-3)}))
    button = report.figure("rms_ratio_max").get_by_role("button", name="with outliers")
    assert axis_of(report, "rms_ratio_max")[1] < 20
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert axis_of(report, "rms_ratio_max")[1] > 1e9
    button.click()
    assert axis_of(report, "rms_ratio_max")[1] < 20
    report.bring("lr")
    assert not report.figure("lr").get_by_role("button", name="with outliers").is_visible()


def test_fractions_start_at_zero_and_the_learning_rate_is_linear(show: Shown) -> None:
    ratio = noise(middle=0.5, scale=0.01)
    lr = {step: 1e-3 * 0.9**step for step in range(100)}
    report = show(run_of({LOST: ratio, LR: lr, STEP_SIZE: ratio}))
    for chart, is_log in (
        ("update_lost_fraction", False),
        ("lr", False),
        ("update_to_weight", True),
    ):
        assert report.is_log(chart) is is_log
    low, high = axis_of(report, "update_lost_fraction")
    assert low == 0
    assert max(ratio.values()) < high <= 1.04
    for values in ({0: 0.0, 1: 0.0}, {0: -1.0, 1: -1.0}):
        # Not on a logarithmic axis.
        assert not show(run_of({STEP_SIZE: values})).is_log("update_to_weight")


def test_histograms_and_eps_curve_omit_a_thousandth_of_the_elements(show: Shown) -> None:
    counts = [1, *[0] * 25, 4000, 9000, 4000, *[0] * 10, 1]
    edges = [float(edge) for edge in range(-60, -60 + len(counts) + 1)]
    middle = (-34 + 1.5) * math.log10(2)
    by_step = {step: Histogram(counts, edges) for step in (0, 10)}
    run = run_of({LR: {0: 1.0, 10: 1.0}})
    run.histograms["adam_histogram/denominator"] = by_step
    report = show(run)
    for chart, letter in (("histogram", "y"), ("eps_curve", "x")):
        low, high = axis_of(report, chart, letter)
        assert low < middle - 0.45
        assert high > middle + 0.45
        assert high - low < 3, "36 octaves are 11 decades"
    # An eps far from the elements is also shown.
    adam = {"optimizer": {"class": "Adam", "param_groups": {"all": {"eps": 1e-3}}}}
    report = show(replace(run, config={"lightning_adam": adam}))
    for chart, letter in (("histogram", "y"), ("eps_curve", "x")):
        assert axis_of(report, chart, letter)[1] > -3


# ---- Reference lines


def lines_of(report: ReportPage, chart: str) -> list[float]:
    """Returns the values of the horizontal lines of a chart."""
    marks = report.marks(chart)["lines"]
    return sorted(mark["y0"] for mark in marks if mark["isAcross"] and mark["y0"] == mark["y1"])


def test_reference_values_and_thresholds_are_lines(show: Shown) -> None:
    own = {"findings": {"exp_avg_sq_lags": {"threshold": 1.5}}}
    adam = {"optimizer": {"class": "Adam", "betas": [0.9, 0.5]}}
    default = RULES["exp_avg_sq_lags"].thresholds["threshold"]
    bound = 0.5**-0.5
    for config, expected in (({}, [default]), (adam, [bound, default]), (adam | own, [bound, 1.5])):
        report = show(run_of({RATIO: noise(scale=0.5)}, config={"lightning_adam": config}))
        assert lines_of(report, "rms_ratio_max") == pytest.approx(sorted(expected))
        labels = report.marks("rms_ratio_max")["labels"]
        assert sum(label.startswith("exp_avg_sq_lags") for label in labels) == 1
    # The line is drawn at its value.
    position = report.pixel("rms_ratio_max", "y", 1.5)
    box = report.box("rms_ratio_max", ".shapelayer path >> nth=1")
    boxes = [report.box("rms_ratio_max", f".shapelayer path >> nth={at}")["y"] for at in (0, 1)]
    assert any(y + box["height"] / 2 == pytest.approx(position, abs=2) for y in boxes)


def test_reference_beyond_the_axis_has_a_label_at_its_edge(show: Shown) -> None:
    report = show(run_of({STEP_SIZE: noise(middle=1e-6), RATIO: noise(middle=1e6)}))
    assert lines_of(report, "update_to_weight") == lines_of(report, "rms_ratio_max") == []
    assert {label[0] for label in report.marks("update_to_weight")["labels"]} == {"↑"}
    (label,) = report.marks("rms_ratio_max")["labels"]
    assert label.startswith("↓ exp_avg_sq_lags")


# ---- Findings and failures


def faulty() -> Run:
    series = {key: noise() for key in (RATIO, LOST, EPS_LOSS, "train/loss", LR)}
    series |= {scoped(f"layer/{layer}", EPS_LOSS): noise(middle=0.1) for layer in LAYERS}
    found = [
        finding("eps_dominates", "error", "model", 51, closed=101),
        finding("eps_dominates", "error", "model", 81, closed=121),
        finding("eps_dominates", "warning", f"layer/{LAYERS[7]}", 151),
        finding("eps_dominates", "warning", f"tensor/{LAYERS[7]}.bias", 161),
        finding("warmup_short", "info", step=5),
    ]
    run = replace(run_of(series), findings=found, measurements=200)
    run.events.append(Event(171, "loss_spike", {}))
    return run


def intervals(report: ReportPage, chart: str) -> list[tuple[float, float]]:
    marks = report.marks(chart)["lines"]
    return sorted((mark["x0"], mark["x1"]) for mark in marks if mark["type"] == "rect")


def test_interval_of_a_finding_is_shaded_in_its_charts_and_in_the_overview(show: Shown) -> None:
    report = show(faulty())
    report.unfold()
    expected = [(50, 120), (150, 199)]
    assert intervals(report, "eps_energy_loss") == expected
    assert report.marks("eps_energy_loss")["labels"][0] == "eps_dominates"
    for chart in ("train/loss", "lr"):
        assert intervals(report, chart) == [*expected, (170, 170)]
        assert "⚑ loss_spike" in report.marks(chart)["labels"]
    for chart in ("rms_ratio_max", "update_lost_fraction"):
        assert intervals(report, chart) == []


def test_link_of_a_finding_opens_and_outlines_its_chart(show: Shown) -> None:
    statistics = (STEP_SIZE, EPS_LOSS)
    logged = dict.fromkeys((RATIO, EPS_LOSS, STATISTICS["decay_lost_fraction"].key), noise())
    logged |= {scoped(f"layer/{name}", key): noise() for name in LAYERS for key in statistics}
    bias = f"{LAYERS[7]}.bias"
    logged |= {scoped(f"tensor/{bias}", key): noise() for key in statistics}
    logged |= {scoped(f"optimizer/gan/layer/{LAYERS[7]}", key): noise() for key in statistics}
    logged[scoped("group/decay", EPS_LOSS)] = noise()
    for found, chart, chosen in (
        (finding("decay_lost"), "decay_lost_fraction", ""),
        (finding(scope="group/decay"), "eps_energy_loss", ""),
        (finding(scope=f"layer/{LAYERS[7]}"), "layers", LAYERS[7]),
        (finding(scope=f"tensor/{bias}"), "layers", bias),
        (finding(scope=f"layer/{LAYERS[7]}", optimizer="gan"), "layers", f"gan: {LAYERS[7]}"),
    ):
        report = show(run_of(logged, "other"), replace(run_of(logged), findings=[found]))
        report.page.get_by_role("searchbox").fill("rms_ratio")
        link = report.page.get_by_role("link", name="Show")
        link.focus()
        report.page.keyboard.press("Enter")
        report.settle()
        figure = report.figure(chart)
        assert figure.evaluate("(figure) => figure === document.activeElement")
        assert figure.evaluate("(figure) => getComputedStyle(figure).outlineStyle") == "solid"
        box = figure.bounding_box()
        assert box is not None
        assert 0 < box["y"] + box["height"] / 2 < report.page.evaluate("() => innerHeight")
        if found.scope == "group/decay":
            assert report.scope.input_value() == "decay"
        if chosen:
            assert report.choice("layers", "statistic").input_value() == "eps_energy_loss"
            assert report.choice("layers", "layer").input_value() == chosen
            assert report.choice("layers", "run").locator("option:checked").inner_text() == "run"


def test_findings_and_failures_with_html_in_names_are_escaped(show: Shown) -> None:
    nasty = "<img src=x onerror=window.hasAlerted=true>&amp;</script><script>alert(1)</script>"
    found = finding(nasty, scope=f"layer/{nasty}", optimizer=nasty, evidence={"rms_ratio_max": 1.0})
    run = replace(run_of({RATIO: noise(), f"train/{nasty}loss": noise()}, nasty), findings=[found])
    run.events.append(Event(50, nasty, {}))
    report = show(run)
    labels = report.bring(f"train/{nasty}loss").locator(".annotation").all_text_contents()
    assert {f"{nasty} ({nasty})", f"⚑ {nasty}"} <= {*labels}
    report.page.get_by_role("link", name="Show").click()
    report.page.get_by_role("searchbox").fill(nasty)
    assert visible(report) == [f"train/{nasty}loss"]
    assert report.page.evaluate("() => window.hasAlerted ?? null") is None
    assert report.page.locator("img").count() == 0
    assert not report.is_wider_than(WIDE)


@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (WIDE, True), (NARROW, True)])
def test_findings_are_readable(show: Shown, width: int, dark: bool) -> None:
    report = show(faulty(), width=width, dark=dark)
    report.draw_all()
    assert report.page.locator("article.finding").count() == 2
    assert report.page.locator(".verdict .badge").inner_text() == "1 error"
    assert report.faint_texts() == {}
    assert [each["text"] for each in report.texts() if each["isCut"]] == []
    assert not report.is_wider_than(width)


# ---- Smoothing, wall clock


def test_smoothing_is_a_bias_corrected_moving_average(show: Shown) -> None:
    values = noise(scale=0.5) | {50: math.nan}
    report = show(run_of({"train/loss": values, LR: values}))
    report.bring("train/loss")
    report.page.get_by_label("smoothing").fill("0.9")
    report.settle()
    weights = 0.9 ** np.arange(len(values))
    known = np.array([values[step] for step in values])
    finite = known[np.isfinite(known)]
    averages = [
        (weights[: end + 1][::-1] * finite[: end + 1]).sum() / weights[: end + 1].sum()
        for end in range(len(finite))
    ]
    lines = report.lines("train/loss")
    smooth = np.array([*lines["run"].values()], dtype=float)
    np.testing.assert_allclose(smooth[np.isfinite(smooth)], averages, rtol=1e-5)
    assert np.isfinite(smooth).sum() == len(finite)
    raw = np.array([*lines["run (not smoothed)"].values()], dtype=float)
    np.testing.assert_allclose(raw, known, rtol=1e-6)


def timed(name: str, seconds_a_step: float, start: float = 1.7e9) -> Run:
    run = run_of({"train/loss": noise(), LR: noise()}, name)
    times = series_of({step: start + seconds_a_step * step for step in range(200)})
    return replace(run, times=times)


def test_wall_clock_shows_seconds_since_the_start_of_each_run(show: Shown) -> None:
    report = show(timed("fast", 0.25), timed("slow", 0.5, 1.8e9))
    report.bring("train/loss")
    report.page.get_by_label("axis").select_option("wall clock")
    report.settle()
    for name, seconds in (("fast", 0.25), ("slow", 0.5)):
        steps = np.arange(200)
        np.testing.assert_allclose([*report.lines("train/loss")[name]], seconds * steps)
    first, last = axis_of(report, "train/loss", "x")
    assert (first, last) == pytest.approx((-2, 101.5), abs=1)
    dragged = report.drag("train/loss", 0.25, 0.5)
    report.bring("lr")
    assert report.ranges()["lr"] == pytest.approx(dragged, abs=1)
    without = replace(timed("untimed", 1.0), times=None)
    assert not show(timed("fast", 0.25), without).page.get_by_label("axis").is_visible()


# ---- Layers


def layered() -> Run:
    series = {scoped(f"layer/{layer}", STEP_SIZE): noise() for layer in LAYERS}
    for place, layer in enumerate(LAYERS):
        series[scoped(f"layer/{layer}", EPS_LOSS)] = noise(middle=0.01 * (place + 1), scale=0.01)
    return run_of(series | {LR: noise()})


def side(report: ReportPage) -> dict[str, list[Any]]:
    """Returns the named curves beside the heat map of layers."""
    report.settle()
    found: dict[str, list[Any]] = (
        report.figure("layers")
        .locator(".plot.side")
        .evaluate(
            "(plot) => Object.fromEntries(plot.data.map((each) => [each.name, Array.from(each.y)]))"
        )
    )
    return found


def test_curves_of_layers_are_beside_their_heat_map(show: Shown) -> None:
    run = layered()
    report = show(run)
    report.bring("layers")
    report.choice("layers", "statistic").select_option("eps_energy_loss")
    largest = LAYERS[:-4:-1]
    assert [*side(report)] == ["other layers", *largest]
    series = run.series[scoped(f"layer/{largest[0]}", EPS_LOSS)]
    np.testing.assert_allclose(side(report)[largest[0]], series.values, rtol=1e-6)
    # 9 other layers, each followed by a gap.
    assert side(report)["other layers"].count(None) == 9
    report.choice("layers", "layer").select_option("net.4")
    assert [*side(report)] == ["other layers", "net.4"]
    for row, expected in ((2, ["net.2"]), (2, largest)):
        box = report.box("layers")
        height = box["height"] / len(LAYERS)
        report.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + (row + 0.5) * height)
        assert [*side(report)] == ["other layers", *expected]
        chosen = report.choice("layers", "layer").input_value()
        assert chosen == (expected[0] if len(expected) == 1 else "largest layers")


# ---- A single step


def test_single_step_is_drawn_as_bars(show: Shown) -> None:
    series = {LR: {7: 0.5}, RATIO: {7: 2.0}, STATISTICS["eps"].key: {7: 1e-8}}
    series |= {scoped("group/decay", LR): {7: 0.25}}
    series |= {scoped(f"layer/{name}", STEP_SIZE): {7: at + 1.0} for at, name in enumerate(LAYERS)}
    report = show(replace(run_of(series), source=CHECKPOINT))
    report.draw_all()
    (bars,) = report.traces("lr")
    assert (bars["type"], bars["x"]) == ("bar", [0.5, 0.25])
    (bars,) = report.traces("layers")
    assert (bars["type"], bars["x"]) == ("bar", [at + 1.0 for at in range(12)])
    assert [each for each in report.charts if report.plot(each).evaluate(CROWDED_TICKS)] == []
    assert not report.figure("layers").locator(".plot.side").is_visible()
    assert not report.page.get_by_label("smoothing").is_visible()
    assert report.faint_texts() == {}
    assert [each["text"] for each in report.texts() if each["isCut"]] == []


# ---- Search


def visible(report: ReportPage) -> list[str]:
    return [chart for chart in report.charts if report.figure(chart).is_visible()]


def test_search_shows_the_charts_that_match_every_word(show: Shown) -> None:
    report = show(run_of({each.key: noise(3) for each in STATISTICS.values()}))
    pinned = visible(report)
    report.page.keyboard.press("/")
    report.page.keyboard.type("AMSGRAD gap")
    assert visible(report) == ["amsgrad_gap"]
    report.settle()
    assert report.lines("amsgrad_gap"), "it is drawn"
    assert report.page.get_by_role("heading", name="Schedule").count() == 0
    report.page.keyboard.type(" / nothing")
    assert visible(report) == []
    assert report.page.get_by_text("No chart matches the search.").is_visible()
    report.page.get_by_role("searchbox").fill("")
    assert visible(report) == pinned
    assert report.page.get_by_text("No chart matches the search.").is_hidden()


def test_search_finds_one_of_several_hundred_charts(show: Shown) -> None:
    names = [f"val/metric_{number}" for number in range(400)]
    report = show(run_of({name: noise(5) for name in [*names, LR]}))
    assert len(visible(report)) < 10
    report.page.get_by_role("searchbox").fill("metric_217")
    assert visible(report) == ["val/metric_217"]
    assert len(report.lines("val/metric_217")["run"]) == 5


# ---- While a run trains


def test_reload_keeps_theme_range_lines_and_search(show: Shown) -> None:
    series = {key: noise() for key in (LR, scoped("group/decay", LR), RATIO)}
    report = show(run_of(series), refresh=3)
    before = "() => document.documentElement.dataset.theme"
    assert report.page.evaluate(before) == "light"
    report.theme_button.click()
    report.chips.nth(1).click()
    report.page.get_by_label("smoothing").fill("0.5")
    report.first_step.fill("20")
    report.page.get_by_role("searchbox").fill("lr")
    report.first_step.press("Tab")
    report.page.evaluate("() => { window.isOld = true; }")
    report.page.wait_for_function("() => !window.isOld")
    report.page.locator("html[data-theme=dark]").wait_for(state="attached")
    assert report.first_step.input_value() == "20"
    assert report.chips.nth(1).get_attribute("aria-pressed") == "false"
    assert report.page.get_by_label("smoothing").input_value() == "0.5"
    assert report.page.get_by_role("searchbox").input_value() == "lr"
    assert "rms_ratio_max" not in visible(report)
    assert report.ranges()["lr"][0] == 20


# ---- Several runs


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (NARROW, True)])
def test_runs_are_compared_side_by_side(show: Shown, count: int, width: int, dark: bool) -> None:
    runs = []
    for place in range(count):
        config = {"lightning_adam": {"optimizer": {"class": "Adam", "lr": 0.25 + place}}}
        run = replace(faulty(), name=f"run {place}", config=config)
        runs.append(run if place else replace(run, findings=[], events=[]))
    report = show(*runs, width=width, dark=dark)
    report.draw_all()
    names = report.chips.all_inner_texts()
    assert names == [f"run {place} (lr={0.25 + place})" for place in range(count)]
    assert list(report.lines("train/loss")) == names
    badges = report.page.locator(".summary .badge").all_inner_texts()
    assert badges == ["Healthy", *["1 error"] * (count - 1)]
    assert len(intervals(report, "eps_energy_loss")) == 2 * (count - 1)
    report.chips.nth(1).click()
    report.settle()
    assert len(intervals(report, "eps_energy_loss")) == 2 * (count - 2)
    assert list(report.lines("train/loss")) == [names[0], *names[2:]]
    assert report.faint_texts() == {}
    assert [each["text"] for each in report.texts() if each["isCut"]] == []
    assert not report.is_wider_than(width)
