"""The report in a real browser: what it draws of a run, and what a reader can do with it."""

import itertools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_adam.reports.report import write_report
from lightning_adam.reports.runs import Run, Series, read_runs
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import PERCENTILE_FAMILIES, QUANTITIES
from tests.browser.logged_runs import (
    BATCHES,
    EPS,
    LoggedRuns,
    curves_of,
    layers_of,
    line,
    logged_runs,
    shares_of,
)
from tests.reports.run_files import histogram, write_csv, write_wandb
from tests.support.browser import (
    CROWDED_TICKS,
    NARROW,
    OVERLAPPING,
    VISIBLE_LINES,
    WIDE,
    Curves,
    ReportPage,
    Visits,
    contrast,
    luminance,
)
from tests.support.commands import GLOBAL_STEP

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.slow

ORDER = ("model", "no_decay", "decay")
"""The scopes as bars, the first at the top."""
ALL_STEPS = ("0", str(BATCHES - 1))
HISTOGRAM = "histogram"
EPS_CURVE = "eps_curve"
LAYERS = "layers"


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> LoggedRuns:
    return logged_runs(tmp_path_factory)


def positive(values: Mapping[int, float], is_log: bool) -> dict[float, float]:
    """Returns the drawn points of a line: only positive ones on a logarithmic axis."""
    return {step: value if value > 0 or not is_log else np.nan for step, value in values.items()}


def assert_same(
    drawn: Mapping[str, Mapping[float, float]], logged: Mapping[str, Mapping[float, float]]
) -> None:
    assert drawn.keys() == logged.keys()
    for name, values in logged.items():
        assert list(drawn[name]) == list(values)
        # The page has float32 values.
        np.testing.assert_allclose(list(drawn[name].values()), list(values.values()), rtol=1e-7)


# ---- Numbers


def test_every_curve_shows_the_numbers_of_the_run(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.draw_all()
    run = logs.runs[0]
    drawn = report.curves()
    measured = {name for name, each in STATISTICS.items() if curves_of(run, each.key)}
    foreign = ("loss", "val/accuracy", "val/loss")
    percentiles = {f"{quantity}_percentiles" for quantity in PERCENTILE_FAMILIES}
    assert drawn.keys() == {*measured, *foreign, *percentiles}
    assert {*report.charts} == drawn.keys() | {LAYERS, HISTOGRAM, EPS_CURVE}
    logged = {name: curves_of(run, STATISTICS[name].key) for name in measured}
    logged |= {key: {run.name: line(run.series[key])} for key in foreign}
    # Constant settings, and a single validation.
    single = {
        name for name, lines in logged.items() if all(len(values) == 1 for values in lines.values())
    }
    for name, lines in logged.items():
        if name in single:
            (bars,) = report.traces(name)
            order = [*filter(lines.__contains__, ORDER)] or [*lines]
            expected = [value for each in order for value in lines[each].values()]
            np.testing.assert_allclose(bars["x"], expected, rtol=1e-7)
        else:
            assert_drawn(drawn[name], lines)
    # A zoom applies to every chart of steps.
    report.drag("loss", 0.25, 0.75)
    ranges = report.ranges()
    assert len(ranges) == len(report.charts)
    others = {*single, EPS_CURVE}
    assert all(ranges[chart] != ranges["loss"] for chart in others)
    assert {tuple(ranges[chart]) for chart in ranges.keys() - others} == {tuple(ranges["loss"])}


def assert_drawn(drawn: Curves, logged: Mapping[str, Mapping[int, float]]) -> None:
    lines = {name: positive(values, drawn.is_log) for name, values in logged.items()}
    assert_same(drawn.lines, lines)
    assert drawn.visible == sum(np.isfinite([*values.values()]).any() for values in lines.values())


def test_lines_and_maps_of_two_runs_show_the_selected_scope_run_and_statistic(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.both_page)
    assert report.chips.all_inner_texts() == logs.labels
    for scope in ("model", "no_decay", "decay"):
        report.scope.select_option(scope)
        for chart in ("lr", "rms_ratio", "update_to_weight"):
            lines = [curves_of(run, STATISTICS[chart].key)[scope] for run in logs.runs]
            assert_compared(report, chart, logs.labels, lines)
    assert_compared(report, "loss", logs.labels, [line(run.series["loss"]) for run in logs.runs])
    choice = report.choice(LAYERS, "statistic")
    assert choice.locator("option").all_inner_texts() == [
        name for name, each in STATISTICS.items() if layers_of(logs.runs[0], each.key)
    ]
    assert choice.input_value() == "update_to_weight"
    names = ("update_to_weight", "grad_norm", "exp_avg_mean", "signal_fraction")
    pictures = set()
    for run, label in zip(logs.runs, logs.labels, strict=True):
        report.choice(LAYERS, "run").select_option(label)
        for name in names:
            choice.select_option(name)
            assert_map(report, layers_of(run, STATISTICS[name].key))
            pictures.add(picture(report.plot(LAYERS)))
    assert len(pictures) == 2 * len(names)


def assert_compared(
    report: ReportPage, chart: str, labels: list[str], lines: list[dict[int, float]]
) -> None:
    shown = [positive(values, report.is_log(chart)) for values in lines]
    assert_same(report.lines(chart), dict(zip(labels, shown, strict=True)))


def assert_map(report: ReportPage, logged: Mapping[str, Mapping[int, float]]) -> None:
    """Checks the values and colors of a heat map of layers."""
    (drawn,) = report.traces(LAYERS)
    assert drawn["rows"] == sorted(logged)
    assert drawn["x"] == sorted({step for values in logged.values() for step in values})
    expected = [[logged[layer].get(step, np.nan) for step in drawn["x"]] for layer in drawn["rows"]]
    # JSON has null instead of NaN.
    shown, colored = (np.array(drawn[part], dtype=np.float64) for part in ("raw", "z"))
    np.testing.assert_array_equal(shown, np.array(expected, dtype=np.float32))
    if report.is_log(LAYERS):
        with np.errstate(invalid="ignore", divide="ignore"):
            shown = np.where(shown > 0, np.log10(shown), np.nan)
    np.testing.assert_allclose(colored, shown)


def picture(plot: "Locator") -> str:
    """Returns the rendered picture of a heat map."""
    plot.page.evaluate("() => new Promise((done) => setTimeout(done, 50))")
    return plot.locator(".heatmaplayer image").first.get_attribute("href") or ""


def test_histogram_shows_the_selected_quantity_scope_and_run(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.both_page)
    quantities, scopes = (report.choice(HISTOGRAM, field) for field in ("quantity", "scope"))
    assert {*quantities.locator("option").all_inner_texts()} == QUANTITIES.keys()
    assert (quantities.input_value(), scopes.input_value()) == ("denominator", "model")
    for chart, letter in ((HISTOGRAM, "y"), (EPS_CURVE, "x")):
        assert_eps_line(report, chart, letter, EPS[0])
    report.choice(HISTOGRAM, "run").select_option(logs.labels[1])
    assert_eps_line(report, HISTOGRAM, "y", EPS[1])
    for quantity, scope in itertools.product(QUANTITIES, ("model", "decay", "no_decay")):
        quantities.select_option(quantity)
        scopes.select_option(scope)
        (drawn,) = report.traces(HISTOGRAM)
        octaves = np.round(np.array(drawn["y"]) / np.log10(2) - 0.5).astype(int).tolist()
        shares = {
            (step, octave): share
            for octave, row in zip(octaves, drawn["z"], strict=True)
            for step, share in zip(drawn["x"], row, strict=True)
            if share
        }
        assert shares == pytest.approx(shares_of(logs.runs[1], quantity, scope), rel=1e-6)
        assert picture(report.plot(HISTOGRAM))
        # Only the histogram of denominators shows eps.
        has_line = report.plot(HISTOGRAM).locator(".shapelayer path").count() > 0
        assert has_line is (quantity == "denominator")


def assert_eps_line(report: ReportPage, chart: str, letter: str, eps: str) -> None:
    expected = report.pixel(chart, letter, np.log10(float(eps)))
    box = report.box(chart, ".shapelayer path")
    side = {"x": "width", "y": "height"}[letter]
    assert box[letter] + box[side] / 2 == pytest.approx(expected, abs=3)


def test_eps_curve_is_the_share_below_each_power_of_two(visit: Visits, logs: LoggedRuns) -> None:
    curves = visit(logs.first_page).lines(EPS_CURVE)
    assert {*curves} == {"model", "decay", "no_decay"}
    for scope, curve in curves.items():
        part = "" if scope == "model" else f"group/{scope}/"
        by_step = logs.runs[0].histograms[f"adam_histogram/{part}denominator"]
        last = by_step[max(by_step)]
        powers = [2.0**edge for edge in last.log2_edges[1:]]
        shares = last.fractions_below(powers)
        assert curve == pytest.approx(dict(zip(powers, shares, strict=True)))


# ---- Choices of the reader


def test_axis_is_switched_between_linear_and_logarithmic(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.unfold()
    # Curves change their axis, heat maps their colors.
    shown = "(plot) => plot.layout.yaxis.type + JSON.stringify(plot.data[0].z ?? null)"
    for chart in ("grad_norm", LAYERS):
        plot = report.bring(chart)
        before, was_log = plot.evaluate(shown), report.is_log(chart)
        report.log(chart).click()
        report.settle()
        assert report.is_log(chart) != was_log
        assert plot.evaluate(shown) != before
        report.log(chart).click()
        report.settle()
        assert report.is_log(chart) == was_log
        assert plot.evaluate(shown) == before


def colors_of(report: ReportPage) -> list[str]:
    """Returns the colors of the page, of a plot and of its first line."""
    report.settle()
    colors: list[str] = report.plot("loss").evaluate(
        """(plot) => [
          getComputedStyle(document.body).backgroundColor,
          getComputedStyle(plot.querySelector(".main-svg")).backgroundColor,
          getComputedStyle(plot.querySelector(".js-line")).stroke,
        ]"""
    )
    return colors


def test_theme_follows_the_system_and_a_button_changes_it(visit: Visits, logs: LoggedRuns) -> None:
    for dark in (False, True):
        report = visit(logs.first_page, dark=dark)
        report.bring("loss")
        seen = []
        for is_dark in (dark, not dark, dark):
            colors = colors_of(report)
            assert [luminance(color) < 0.2 for color in colors[:2]] == [is_dark, is_dark]
            seen.append(colors)
            report.theme_button.click()
        assert seen[0] == seen[2]
        assert all(one != other for one, other in zip(seen[0], seen[1], strict=True))


def test_legend_button_hides_and_shows_its_lines_in_all_charts(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.first_page)
    names = ["decay", "no_decay", "model"]
    assert sorted(report.chips.all_inner_texts()) == sorted(names)
    report.bring("lr")
    chip = report.chips.nth(1)
    # The line of the model is drawn above the others.
    for pressed, shown in (("true", names), ("false", names[1:]), ("true", names)):
        assert chip.get_attribute("aria-pressed") == pressed
        for chart in ("lr", "eps_energy_loss", EPS_CURVE):
            assert list(report.lines(chart)) == shown
            assert report.plot(chart).evaluate(VISIBLE_LINES) == len(shown)
        chip.focus()
        report.page.keyboard.press("Space")
        report.settle()


def test_zoom_applies_to_charts_that_are_drawn_later(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.bring("loss")
    dragged = report.drag("loss", 0.25, 0.75)
    chosen = report.ranges()["loss"]
    assert chosen == pytest.approx(dragged, abs=0.3)
    assert LAYERS not in report.ranges()
    for chart in ("rms_ratio", LAYERS, HISTOGRAM):
        report.bring(chart)
        assert report.ranges()[chart] == chosen
    first, last = (int(step) for step in report.steps())
    assert first - 1 < chosen[0] <= first
    assert last <= chosen[1] < last + 1
    # Lines extend beyond the plot on both sides.
    assert list(report.lines("lr")["model"]) == list(range(first - 1, last + 2))


def test_range_of_steps_is_entered_and_reset(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.bring("loss")
    before = report.ranges()
    for back in ("button", "double click"):
        report.drag("loss", 0.4, 0.8)
        assert report.ranges()["lr"] != before["lr"]
        if back == "button":
            report.page.get_by_role("button", name="all", exact=True).click()
        else:
            report.plot("lr").locator(".nsewdrag").first.dblclick()
        report.settle()
        after = report.ranges()
        assert after.keys() == before.keys()
        np.testing.assert_allclose([*after.values()], [*before.values()])
        assert report.steps() == ALL_STEPS
    report.first_step.focus()
    for typed, following in (("5", "Tab"), ("15", "Enter")):
        report.page.keyboard.press("Control+a")
        report.page.keyboard.type(typed)
        report.page.keyboard.press(following)
    report.settle()
    assert report.ranges()["lr"] == report.ranges()["loss"] == [5, 15]
    report.page.keyboard.press("Tab")
    report.page.keyboard.press("Enter")
    report.settle()
    assert report.steps() == ALL_STEPS


# ---- Explanations


def test_explanation_of_a_chart_is_shown_on_hover_and_on_focus(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.first_page)
    heading, meaning = report.figure("loss").get_by_role("heading"), report.meaning("loss")
    assert not meaning.is_visible()
    # Escape hides it until the pointer returns.
    for end in ("Escape", ""):
        heading.hover()
        assert meaning.is_visible()
        if end:
            report.page.keyboard.press(end)
            assert not meaning.is_visible()
        report.plot("loss").hover()
        assert not meaning.is_visible()
    button = report.figure("lr").get_by_role("button", name="Explain lr")
    meaning = report.meaning("lr")
    assert button.get_attribute("aria-describedby") == meaning.get_attribute("id")
    report.figure("val/loss").get_by_role("button", name="PNG").focus()
    for _ in range(10):
        report.page.keyboard.press("Tab")
        if button.evaluate("(button) => button === document.activeElement"):
            break
    assert meaning.is_visible()
    report.page.keyboard.press("Escape")
    assert not meaning.is_visible()
    report.page.keyboard.press("Tab")
    report.page.keyboard.press("Shift+Tab")
    assert meaning.is_visible()


# ---- Pictures


def test_chart_is_saved_as_a_picture_with_the_light_theme(
    visit: Visits, logs: LoggedRuns, tmp_path: Path
) -> None:
    for dark, charts in ((False, ["rms_ratio", HISTOGRAM]), (True, [EPS_CURVE, LAYERS])):
        report = visit(logs.first_page, dark=dark)
        for chart in charts:
            colors = [trace["color"] for trace in report.traces(chart) if trace["color"]]
            file = tmp_path / f"{chart}.png"
            report.page.mouse.move(0, 0)
            with report.page.expect_download() as download:
                report.figure(chart).get_by_role("button", name="PNG").click()
            assert download.value.suggested_filename.endswith(".png")
            download.value.save_as(file)
            content = file.read_bytes()
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert min(struct.unpack(">II", content[16:24])) > 1000
            pixels = np.round(255 * imread(file)[::7, :, :3]).astype(int)
            assert pixels[0, 0].tolist() == [255, 255, 255]
            found = {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
            assert len(found) > 10
            if not dark:
                # The picture contains the colors of the lines.
                assert {tuple(bytes.fromhex(color[1:])) for color in colors} <= found
        # The page is unchanged.
        assert (luminance(colors_of(report)[1]) < 0.2) is dark


def test_map_of_a_run_without_the_selected_statistic_shows_another(
    visit: Visits, tmp_path: Path
) -> None:
    names = ("update_to_weight", "update_norm")
    runs = [
        write_csv(
            tmp_path / str(place),
            [(step, {STATISTICS[name].key_of("layer/net/"): place + 1.0}) for step in range(3)],
        )
        for place, name in enumerate(names)
    ]
    write_report(read_runs(runs), tmp_path / "page.html")
    report = visit(tmp_path / "page.html")
    report.choice(LAYERS, "run").select_option(index=1)
    assert report.choice(LAYERS, "statistic").input_value() == "update_norm"
    assert report.traces(LAYERS)[0]["raw"] == [[2.0, 2.0, 2.0]]


# ---- Layout and access

EXPLANATION = """(figure) => {
  const box = figure.querySelector("[role=tooltip]").getBoundingClientRect();
  const over = [...figure.querySelectorAll(".controls > *")].filter((control) => {
    const other = control.getBoundingClientRect();
    return box.left < other.right && other.left < box.right
      && box.top < other.bottom && other.top < box.bottom;
  });
  return {
    inWindow: box.left >= 0 && box.right <= innerWidth,
    over: over.map((control) => control.ariaLabel),
  };
}"""
"""Returns the position of a chart's explanation, and the controls that it covers."""


@pytest.mark.parametrize(
    ("runs", "width", "dark"),
    [
        ("first", WIDE, False),
        ("first", NARROW, True),
        ("both", WIDE, True),
        ("both", NARROW, False),
    ],
)
def test_page_is_readable_and_nothing_is_cut_off_or_covered(
    runs: str, width: int, dark: bool, visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.first_page if runs == "first" else logs.both_page, width, dark)
    report.draw_all()
    assert report.page.locator("article.finding").count() > 0
    assert not report.is_wider_than(width)
    controls = report.controls()
    assert [control["name"] for control in controls if control["isCut"]] == []
    assert report.page.evaluate(OVERLAPPING, controls) == []
    texts = report.texts()
    assert len(texts) > 500
    assert {text["text"] for text in texts if text["isCut"]} == set()
    assert {text["text"]: text["size"] for text in texts if text["size"] < 11} == {}
    crowded = {chart: report.plot(chart).evaluate(CROWDED_TICKS) for chart in report.charts}
    assert {chart: ticks for chart, ticks in crowded.items() if ticks} == {}
    assert_lines_have_contrast(report)
    report.chips.first.click()
    report.page.add_style_tag(content="[role=tooltip] { display: block !important; }")
    assert report.faint_texts() == {}
    placed = {chart: report.figure(chart).evaluate(EXPLANATION) for chart in report.charts}
    assert {chart: at for chart, at in placed.items() if at != {"inWindow": True, "over": []}} == {}
    assert not report.is_wider_than(width)


def assert_lines_have_contrast(report: ReportPage) -> None:
    """Checks the contrast of lines and of their marks in the legend."""
    ground = report.figure("lr").evaluate("(figure) => getComputedStyle(figure).backgroundColor")
    colors = {trace["color"] for trace in report.traces("lr")}
    marks = report.chips.evaluate_all(
        "(chips) => chips.map((chip) => getComputedStyle(chip, '::before').backgroundColor)"
    )
    assert len(colors) == len(marks) == report.chips.count() > 1
    assert {color for color in [*colors, *marks] if contrast(color, ground) < 3} == set()


FOCUSED = """() => {
  const at = document.activeElement;
  if (at === document.body) return null;
  const style = getComputedStyle(at), box = at.getBoundingClientRect();
  const x = box.x + Math.min(box.width / 2, 40), y = box.y + box.height / 2;
  const hit = document.elementFromPoint(x, y);
  focused.push(at);
  return {
    name: [at.closest("figure")?.dataset.chart ?? "", at.ariaLabel || at.textContent.trim()],
    color: style.outlineColor,
    hasOutline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    isCovered: !at.contains(hit),
  };
}"""
"""Returns the focused element, and whether its focus is visible."""
NEVER_FOCUSED = """() => [...document.querySelectorAll("button, select, input, summary")]
  .filter((each) => each.checkVisibility() && !focused.includes(each))
  .map((each) => each.outerHTML.slice(0, 80))"""


def test_every_control_is_reached_by_keyboard_with_a_visible_focus(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.both_page)
    ground = colors_of(report)[0]
    # Backwards through the collapsed page, then forwards through the expanded page.
    for key in ("Shift+Tab", "Tab"):
        if key == "Tab":
            report.unfold()
        report.page.evaluate("() => { window.focused = []; }")
        report.page.keyboard.press(key)
        seen: list[dict[str, Any]] = []
        while (focused := report.page.evaluate(FOCUSED)) is not None and len(seen) < 400:
            seen.append(focused)
            report.page.keyboard.press(key)
        assert report.page.evaluate(NEVER_FOCUSED) == []
        assert [each["name"] for each in seen if not each["hasOutline"]] == []
        assert [each["name"] for each in seen if each["isCovered"]] == []
        assert {each["color"] for each in seen if contrast(each["color"], ground) < 3} == set()


def test_every_control_has_a_unique_name(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.both_page)
    report.unfold()
    session = report.page.context.new_cdp_session(report.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if node["role"]["value"] in ("button", "combobox", "spinbutton", "region")
    ]
    assert len(named) > 100
    assert [role for role, name in named if not name.strip()] == []
    buttons = [name for role, name in named if role == "button"]
    assert len({*buttons}) == len(buttons)


# ---- Names that look like HTML

NASTY = "<img src=x onerror=window.hasAlerted=true>&amp;\"'🙂</script><script>alert(1)</script>"
NASTY_SCOPE = NASTY.replace("/", "")
"""Parts of a key contain no slash."""
SCOPE = NASTY_SCOPE + "a_name_without_any_space_" * 6
LARGEST = "adam_update/worst_1/update_norm"
NAMES = (f"one {NASTY}", f"two {NASTY}")


def write_nasty_run(folder: Path, name: str, value: str) -> Path:
    groups = {SCOPE: {"eps": 1e-8}}
    adam = {"optimizer": {"class": "AdamW", "eps": 1e-8, "param_groups": groups}}
    keys = [f"adam_schedule/group/{SCOPE}/lr", LARGEST]
    keys += [f"adam_update/layer/{SCOPE}/update_to_weight"]
    keys += ["adam_schedule/lr", "train/loss", "val/loss", f"val/{name}"]
    counted: dict[str, Any] = {
        f"adam_histogram/group/{SCOPE}/denominator": histogram([1, 2, 3], [-3, -2, -1, 0])
    }
    counted |= {f"{LARGEST}_tensor": NASTY}
    rows = [{**dict.fromkeys(keys, step + 1.0), **counted, GLOBAL_STEP: step} for step in range(5)]
    config = {"lightning_adam": adam, name: value}
    return write_wandb(folder, rows, run_id=name[:3], name=name, config=config)


def hover_text(report: ReportPage, chart: str) -> str:
    """Returns the tooltip in the middle of a plot."""
    x, y = report.middle(chart)
    report.page.mouse.move(x - 9, y)
    report.page.mouse.move(x, y, steps=3)
    shown = report.plot(chart).locator(".hoverlayer")
    shown.locator("text").first.wait_for()
    return shown.text_content() or ""


def test_names_are_never_parsed_as_html(visit: Visits, tmp_path: Path) -> None:
    runs = [
        write_nasty_run(tmp_path / name[:3], name, value)
        for name, value in zip(NAMES, ("<b>1</b>", "<b>2</b>"), strict=True)
    ]
    for shown, width in (("one", WIDE), ("two", NARROW), ("two", WIDE)):
        write_report(read_runs(runs[: 1 if shown == "one" else 2]), tmp_path / f"{shown}.html")
        report = visit(tmp_path / f"{shown}.html", width)
        report.draw_all()
        # A label may be truncated, but is not parsed as a tag.
        if shown == "one":
            assert report.chips.all_inner_texts() == ["model", SCOPE, "worst 1"]
            for chart in ("lr", LAYERS):
                assert NASTY_SCOPE in hover_text(report, chart)
            assert f"in {NASTY}" in hover_text(report, "update_norm")
            assert NAMES[0] in hover_text(report, f"val/{NAMES[0]}")
        else:
            assert_two_runs_are_named(report)
        with report.page.expect_download():
            report.figure(LAYERS).get_by_role("button", name="PNG").click()
        assert report.page.evaluate("() => window.hasAlerted ?? null") is None
        assert report.page.locator("img").count() == 0
        assert not report.is_wider_than(width)
        assert [each["name"] for each in report.controls() if each["right"] > width] == []


def assert_two_runs_are_named(report: ReportPage) -> None:
    assert report.page.title() == f"Adam training report: {NAMES[0]}, {NAMES[1]}"
    assert report.page.locator("th[data-run]").all_inner_texts() == [*NAMES]
    assert report.chips.all_inner_texts() == [*NAMES]
    cells = [
        row.locator("th, td").all_inner_texts()
        for row in report.page.locator("#comparison tr").all()
    ]
    assert cells[0] == ["config", *NAMES]
    assert cells[1:] == [[NAMES[0], '"<b>1</b>"', "-"], [NAMES[1], "-", '"<b>2</b>"']]
    assert all(name in hover_text(report, "train/loss") for name in NAMES)
    report.choice(LAYERS, "run").select_option(NAMES[1])
    report.settle()
    assert NASTY_SCOPE in hover_text(report, LAYERS)
    report.scope.select_option(SCOPE)
    assert list(report.lines("lr")) != []


# ---- Large runs


def random_run(steps_of: Mapping[str, int]) -> Run:
    generator = np.random.default_rng(0)
    series = {
        key: Series(np.arange(steps), np.exp(generator.normal(size=steps)))
        for key, steps in steps_of.items()
    }
    return Run("run", Path("run"), {}, series, {}, [])


def test_page_of_a_large_run_is_small_and_responds(visit: Visits, tmp_path: Path) -> None:
    file = tmp_path / "large.html"
    groups = ("", "group/decay/")
    keys = [each.key_of(group) for group in groups for each in STATISTICS.values()]
    curves = dict.fromkeys(["train/loss", *keys[:59]], 100_000)
    layers = {
        each.key_of(f"layer/blocks.{number}.mlp/"): 1000
        for each in [each for each in STATISTICS.values() if each.is_headline][:22]
        for number in range(300)
    }
    for steps_of, megabytes in ((curves, 4), (layers, 4), (curves | layers, 6)):
        write_report([random_run(steps_of)], file)
        assert file.stat().st_size < megabytes * 10**6
    report = visit(file)
    (curve,) = report.lines("train/loss").values()
    assert (min(curve), max(curve)) == (0, 99_999)
    assert len(curve) <= 2001 + 1
    (before,) = report.traces(LAYERS)
    assert before["rows"] == [f"blocks.{number}.mlp" for number in range(300)]
    report.choice(LAYERS, "statistic").select_option("eps_energy_loss")
    report.settle()
    (after,) = report.traces(LAYERS)
    assert after["raw"] != before["raw"]
    assert report.plot(LAYERS).evaluate(CROWDED_TICKS) == []
    dragged = report.drag("train/loss", 0.2, 0.4)
    assert report.ranges()["train/loss"] == pytest.approx(dragged, abs=300)
    report.bring(LAYERS)
    assert report.ranges()[LAYERS] == report.ranges()["train/loss"]
