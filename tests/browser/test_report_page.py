"""The report in a real browser: what it draws of a run, and what a reader can do with it."""

import csv
import itertools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_adam.dashboard.comparison import parting
from lightning_adam.dashboard.report import write_report
from lightning_adam.dashboard.runs import Run, Series, read_runs
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.browser.logged_runs import (
    BATCHES,
    EPS,
    LRS,
    LoggedRuns,
    curves_of,
    layers_of,
    logged_runs,
    run_name,
    shares_of,
)
from tests.dashboard.run_files import histogram, write_csv, write_wandb
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

ALL_STEPS = ("0", str(BATCHES - 1))
HISTOGRAM = "√v̂ histogram"
EPS_CURVE = "eps_curve"
LAYERS = "layers"
FOREIGN_KEYS = {"loss": ["loss"], "validation metric": ["val/accuracy", "val/loss"]}
"""The panels of keys that a module logs itself."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> LoggedRuns:
    return logged_runs(tmp_path_factory)


def reported(file: Path, *runs: Path) -> Path:
    write_report(read_runs(runs), file)
    return file


def positive(line: Mapping[Any, float], is_log: bool) -> dict[float, float]:
    """Returns a line as it is drawn: a logarithmic axis has no place for 0 and below."""
    return {step: value if value > 0 or not is_log else np.nan for step, value in line.items()}


def assert_same(
    drawn: Mapping[str, Mapping[float, float]], logged: Mapping[str, Mapping[float, float]]
) -> None:
    assert drawn.keys() == logged.keys()
    for name, line in logged.items():
        assert list(drawn[name]) == list(line)
        np.testing.assert_array_equal(list(drawn[name].values()), list(line.values()))


# ---- Numbers


def test_every_curve_shows_the_numbers_of_the_run(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.draw_all()
    logged = curves_of(logs.folders[0])
    measured = {name for name, each in STATISTICS.items() if each.key in logged}
    assert {*report.titles} == measured | FOREIGN_KEYS.keys() | {LAYERS, HISTOGRAM, EPS_CURVE}
    own = run_name(logs.folders[0])
    drawn = report.curves()
    assert drawn.keys() == measured | FOREIGN_KEYS.keys()
    for title in drawn:
        key = STATISTICS[title].key if title in measured else FOREIGN_KEYS[title][0]
        assert_drawn(drawn[title], logged[key], own)
    report.choice("validation metric", "key").select_option("val/loss")
    report.settle()
    assert_drawn(report.curves()["validation metric"], logged["val/loss"], own)
    # A zoom applies to every panel but the curve over eps.
    report.drag("loss", 0.25, 0.75)
    ranges = report.ranges()
    assert len(ranges) == len(report.titles)
    assert ranges.pop(EPS_CURVE) != ranges["loss"]
    assert {tuple(each) for each in ranges.values()} == {tuple(ranges["loss"])}


def assert_drawn(drawn: Curves, logged: Mapping[str, Mapping[int, float]], own: str) -> None:
    """Checks that all lines of a key are visible, under the names of their scopes."""
    lines = {scope or own: positive(line, drawn.is_log) for scope, line in logged.items()}
    assert_same(drawn.lines, lines)
    assert drawn.visible == sum(np.isfinite([*line.values()]).any() for line in lines.values())


def test_page_of_a_csv_run_shows_its_numbers(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.csv_page)
    report.unfold()
    assert {"loss", "lr", "exp_avg_sq_lag", LAYERS} < {*report.titles}
    assert {HISTOGRAM, EPS_CURVE}.isdisjoint(report.titles)
    assert report.page.get_by_text("a CSVLogger keeps none").count() == 2
    with (logs.csv / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for title, name in itertools.product(("grad_norm", "update_norm"), ("decay", "no_decay")):
        key = f"{STATISTICS[title].key}/group/{name}"
        line = {float(row["step"]): float(row[key]) for row in rows if row[key]}
        assert_same({name: report.lines(title)[name]}, {name: positive(line, report.is_log(title))})


def test_map_of_layers_shows_the_chosen_statistic(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    logged = layers_of(logs.folders[0])
    choice = report.choice(LAYERS, "statistic")
    assert choice.locator("option").all_inner_texts() == [
        name for name in STATISTICS if name in logged
    ]
    assert choice.input_value() == "update_to_weight"
    assert_map(report, logged["update_to_weight"])
    pictures = {picture(report.plot(LAYERS))}
    for name in ("grad_norm", "exp_avg_mean", "signal_fraction"):
        choice.select_option(name)
        assert_map(report, logged[name])
        pictures.add(picture(report.plot(LAYERS)))
    assert len(pictures) == 4


def assert_map(report: ReportPage, logged: Mapping[str, Mapping[int, float]]) -> None:
    """Checks the numbers of a map of layers, and that its colors are those of its numbers."""
    (drawn,) = report.traces(LAYERS)
    assert drawn["rows"] == sorted(logged)
    assert drawn["x"] == sorted({step for line in logged.values() for step in line})
    expected = [[logged[layer].get(step, np.nan) for step in drawn["x"]] for layer in drawn["rows"]]
    np.testing.assert_array_equal(floats(drawn["raw"]), np.array(expected, dtype=np.float32))
    colored = floats(drawn["z"])
    shown = floats(drawn["raw"])
    if report.is_log(LAYERS):
        with np.errstate(invalid="ignore", divide="ignore"):
            shown = np.where(shown > 0, np.log10(shown), np.nan)
    np.testing.assert_allclose(colored, shown)


def floats(rows: Any) -> Any:
    """Returns the numbers of a map, with NaN where the page has none."""
    return np.array(
        [[np.nan if cell is None else cell for cell in row] for row in rows], dtype=np.float64
    )


def picture(plot: "Locator") -> str:
    """Returns the picture of a map, as it is painted."""
    plot.page.evaluate("() => new Promise((done) => setTimeout(done, 50))")
    return plot.locator(".heatmaplayer image").first.get_attribute("href") or ""


def test_histogram_shows_the_chosen_quantity_and_scope(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    quantities, scopes = (report.choice(HISTOGRAM, field) for field in ("quantity", "scope"))
    assert {*quantities.locator("option").all_inner_texts()} == QUANTITIES.keys()
    assert (quantities.input_value(), scopes.input_value()) == ("denominator", "model")
    for title, letter in ((HISTOGRAM, "y"), (EPS_CURVE, "x")):
        assert_eps_line(report, title, letter, EPS[0])
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
        assert shares == pytest.approx(shares_of(logs.folders[0], quantity, scope), rel=1e-6)
        assert picture(report.plot(HISTOGRAM))
        # eps is compared with denominators alone.
        has_line = report.plot(HISTOGRAM).locator(".shapelayer path").count() > 0
        assert has_line is (quantity == "denominator")


def assert_eps_line(report: ReportPage, title: str, letter: str, eps: str) -> None:
    """Checks that a line stands at eps on an axis."""
    expected = report.pixel(title, letter, np.log10(float(eps)))
    box = report.box(title, ".shapelayer path")
    side = {"x": "width", "y": "height"}[letter]
    assert box[letter] + box[side] / 2 == pytest.approx(expected, abs=3)


def test_eps_curve_is_the_share_below_each_power_of_two(visit: Visits, logs: LoggedRuns) -> None:
    curves = visit(logs.first_page).lines(EPS_CURVE)
    assert {*curves} == {"model", "decay", "no_decay"}
    for scope, curve in curves.items():
        shares = shares_of(logs.folders[0], "denominator", scope)
        last = max(step for step, _ in shares)
        for eps, share in curve.items():
            below = [
                part
                for (step, octave), part in shares.items()
                if step == last and 2.0 ** (octave + 1) <= eps
            ]
            assert share == pytest.approx(sum(below))


# ---- Choices of the reader


def test_axis_is_switched_between_linear_and_logarithmic(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.unfold()
    # The axis of curves changes, and the colors of a map.
    shown = "(plot) => plot.layout.yaxis.type + JSON.stringify(plot.data[0].z ?? null)"
    for title in ("grad_norm", LAYERS):
        plot = report.bring(title)
        before, was_log = plot.evaluate(shown), report.is_log(title)
        report.log(title).click()
        report.settle()
        assert report.is_log(title) != was_log
        assert plot.evaluate(shown) != before
        report.log(title).click()
        report.settle()
        assert report.is_log(title) == was_log
        assert plot.evaluate(shown) == before


def grounds(report: ReportPage) -> list[str]:
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
            colors = grounds(report)
            assert [luminance(color) < 0.2 for color in colors[:2]] == [is_dark, is_dark]
            seen.append(colors)
            report.theme_button.click()
        assert seen[0] == seen[2]
        assert all(one != other for one, other in zip(seen[0], seen[1], strict=True))


def test_chip_hides_and_shows_its_lines_in_every_panel(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    assert report.chips.all_inner_texts() == ["model", "decay", "no_decay"]
    report.bring("lr")
    chip = report.chips.nth(1)
    for pressed, names in (
        ("true", ["model", "decay", "no_decay"]),
        ("false", ["model", "no_decay"]),
        ("true", ["model", "decay", "no_decay"]),
    ):
        assert chip.get_attribute("aria-pressed") == pressed
        for title in ("lr", "eps_energy_loss", EPS_CURVE):
            assert list(report.lines(title)) == names
            assert report.plot(title).evaluate(VISIBLE_LINES) == len(names)
        chip.focus()
        report.page.keyboard.press("Space")
        report.settle()


def steps_shown(report: ReportPage) -> tuple[str, str]:
    return report.first_step.input_value(), report.last_step.input_value()


def test_zoom_applies_to_panels_that_are_drawn_later(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.first_page)
    report.bring("loss")
    dragged = report.drag("loss", 0.25, 0.75)
    chosen = report.ranges()["loss"]
    assert chosen == pytest.approx(dragged, abs=0.3)
    assert LAYERS not in report.ranges()
    for title in ("exp_avg_sq_lag", LAYERS, HISTOGRAM):
        report.bring(title)
        assert report.ranges()[title] == chosen
    first, last = (int(step) for step in steps_shown(report))
    assert first - 1 < chosen[0] <= first
    assert last <= chosen[1] < last + 1
    # Lines leave the picture on both sides.
    assert list(report.lines("lr")["model"]) == list(range(first - 1, last + 2))


def test_steps_are_typed_and_all_are_shown_again(visit: Visits, logs: LoggedRuns) -> None:
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
        assert steps_shown(report) == ALL_STEPS
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
    assert steps_shown(report) == ALL_STEPS


# ---- Explanations


def test_explanation_of_a_panel_is_shown_on_hover_and_on_focus(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.first_page)
    for title in STATISTICS.keys() & {*report.titles}:
        statistic = STATISTICS[title]
        expected = statistic.meaning + statistic.formula + statistic.source
        shown = report.meaning(title).text_content() or ""
        assert "".join(shown.split()) == "".join(expected.split())
    heading, meaning = report.panel("loss").get_by_role("heading"), report.meaning("loss")
    assert not meaning.is_visible()
    # Escape hides it until the pointer comes again.
    for end in ("Escape", ""):
        heading.hover()
        assert meaning.is_visible()
        if end:
            report.page.keyboard.press(end)
            assert not meaning.is_visible()
        report.plot("loss").hover()
        assert not meaning.is_visible()
    button = report.panel("lr").get_by_role("button", name="what lr is")
    meaning = report.meaning("lr")
    assert button.get_attribute("aria-describedby") == meaning.get_attribute("id")
    report.choice("validation metric", "key").focus()
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


def test_panel_is_saved_as_a_picture_on_white(
    visit: Visits, logs: LoggedRuns, tmp_path: Path
) -> None:
    for dark, titles in ((False, ["exp_avg_sq_lag", HISTOGRAM]), (True, [EPS_CURVE, LAYERS])):
        report = visit(logs.first_page, dark=dark)
        for title in titles:
            colors = [trace["color"] for trace in report.traces(title) if trace["color"]]
            pixels = saved_picture(report, title, tmp_path / f"{title}.png")
            assert pixels[0, 0].tolist() == [255, 255, 255]
            found = {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}
            assert len(found) > 10
            if not dark:
                # The lines stand in it in their own colors.
                assert {tuple(bytes.fromhex(color[1:])) for color in colors} <= found
        # The page itself is as before.
        assert (luminance(grounds(report)[1]) < 0.2) is dark


def saved_picture(report: ReportPage, title: str, file: Path) -> Any:
    """Saves a panel as a PNG, and returns the pixels of every seventh row."""
    report.page.mouse.move(0, 0)
    with report.page.expect_download() as download:
        report.panel(title).get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename.endswith(".png")
    download.value.save_as(file)
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", content[16:24])) > 1000
    return np.round(255 * imread(file)[::7, :, :3]).astype(int)


# ---- Two runs


def test_comparison_shows_different_settings_and_the_first_difference(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.both_page)
    comparison = report.page.locator("#comparison")
    rows = comparison.locator("tr").all()
    assert [row.locator("th, td").all_inner_texts() for row in rows] == [
        ["config", *logs.labels],
        ["lightning_adam.optimizer.lr", *LRS],
        ["lightning_adam.optimizer.eps", *EPS],
    ]
    first, second = read_runs(logs.folders)
    at_all, clearly = parting(first, second, 0), parting(first, second)
    assert at_all is not None
    assert clearly is not None
    values = [f"{value:.4g}" for value in clearly.values]
    assert " ".join(comparison.locator(".parting").inner_text().split()) == (
        f"{logs.labels[1]} measures something else than {logs.labels[0]}"
        f" from step {at_all.step} on;"
        f" by more than 10% for the first time at step {clearly.step},"
        f" {clearly.scope.kind} {clearly.scope}:"
        f" {clearly.statistic} {values[0]} there, {values[1]} here."
    )


def test_two_runs_are_compared_in_the_chosen_scope(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.both_page)
    logged = [curves_of(run) for run in logs.folders]
    assert report.chips.all_inner_texts() == logs.labels
    for scope in ("model", "no_decay", "decay"):
        report.scope.select_option(scope)
        for title in ("lr", "exp_avg_sq_lag", "update_to_weight"):
            key = STATISTICS[title].key
            lines = [positive(run[key][scope], report.is_log(title)) for run in logged]
            assert_same(report.lines(title), dict(zip(logs.labels, lines, strict=True)))
    losses = [positive(run["loss"][""], report.is_log("loss")) for run in logged]
    assert_same(report.lines("loss"), dict(zip(logs.labels, losses, strict=True)))


def test_map_and_histogram_show_the_chosen_run(visit: Visits, logs: LoggedRuns) -> None:
    report = visit(logs.both_page)
    for run, label, eps in reversed([*zip(logs.folders, logs.labels, EPS, strict=True)]):
        report.choice(LAYERS, "run").select_option(label)
        for name in ("direction_rms", "update_to_weight"):
            report.choice(LAYERS, "statistic").select_option(name)
            assert_map(report, layers_of(run)[name])
        report.choice(HISTOGRAM, "run").select_option(label)
        (drawn,) = report.traces(HISTOGRAM)
        shares = [share for row in drawn["z"] for share in row if share]
        expected = shares_of(run, "denominator", "model").values()
        assert sorted(shares) == pytest.approx(sorted(expected), rel=1e-6)
        assert_eps_line(report, HISTOGRAM, "y", eps)


def test_map_of_a_run_without_the_chosen_statistic_shows_another(
    visit: Visits, tmp_path: Path
) -> None:
    names = ("update_to_weight", "update_norm")
    runs = [
        write_csv(
            tmp_path / str(place),
            [(step, {f"{STATISTICS[name].key}/layer/net": place + 1.0}) for step in range(3)],
        )
        for place, name in enumerate(names)
    ]
    report = visit(reported(tmp_path / "page.html", *runs))
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
"""Where a panel's explanation is, and the controls that it covers."""


@pytest.mark.parametrize(
    ("runs", "width", "dark"),
    [
        ("first", WIDE, False),
        ("first", NARROW, True),
        ("both", WIDE, True),
        ("both", NARROW, False),
    ],
)
def test_everything_is_readable_and_nothing_is_cut_off_or_covered(
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
    crowded = {title: report.plot(title).evaluate(CROWDED_TICKS) for title in report.titles}
    assert {title: ticks for title, ticks in crowded.items() if ticks} == {}
    assert_lines_stand_out(report)
    report.chips.first.click()
    report.show_explanations()
    assert report.faint_texts() == {}
    placed = {title: report.panel(title).evaluate(EXPLANATION) for title in report.titles}
    assert {title: at for title, at in placed.items() if at != {"inWindow": True, "over": []}} == {}
    assert not report.is_wider_than(width)


def assert_lines_stand_out(report: ReportPage) -> None:
    """Checks the contrast of lines and of their marks in the legend."""
    ground = report.panel("lr").evaluate("(panel) => getComputedStyle(panel).backgroundColor")
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
    name: [at.closest("figure")?.dataset.panel ?? "", at.ariaLabel || at.textContent.trim()],
    color: style.outlineColor,
    hasOutline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    isCovered: !at.contains(hit),
  };
}"""
"""What has the focus, and whether that can be seen."""
NEVER_FOCUSED = """() => [...document.querySelectorAll("button, select, input, summary")]
  .filter((each) => each.checkVisibility() && !focused.includes(each))
  .map((each) => each.outerHTML.slice(0, 80))"""


def test_every_control_is_reached_by_keyboard_with_a_visible_focus(
    visit: Visits, logs: LoggedRuns
) -> None:
    report = visit(logs.both_page)
    ground = grounds(report)[0]
    # Backwards through the folded page, then forwards through all of it.
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
SCOPE = NASTY + "a_name_without_any_space_" * 6
NAMES = (f"one {NASTY}", f"two {NASTY}")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pages of one and of two runs with names that look like HTML."""
    folder = tmp_path_factory.mktemp("nasty")
    runs = [
        write_nasty_run(folder / name[:3], name, value)
        for name, value in zip(NAMES, ("<b>1</b>", "<b>2</b>"), strict=True)
    ]
    return reported(folder / "one.html", runs[0]), reported(folder / "two.html", *runs)


def write_nasty_run(folder: Path, name: str, value: str) -> Path:
    groups = {SCOPE: {"eps": 1e-8}}
    adam = {"optimizer": {"class": "AdamW", "eps": 1e-8, "param_groups": groups}}
    keys = ["adam_schedule/lr", f"adam_schedule/lr/group/{SCOPE}"]
    keys += [f"adam_update/update_to_weight/layer/{SCOPE}"]
    keys += ["train/loss", "val/loss", f"val/{name}"]
    counted = {f"adam_histogram/denominator/group/{SCOPE}": histogram([1, 2, 3], [-3, -2, -1, 0])}
    rows = [{**dict.fromkeys(keys, step + 1.0), **counted, GLOBAL_STEP: step} for step in range(5)]
    config = {"lightning_adam": adam, name: value}
    return write_wandb(folder, rows, run_id=name[:3], name=name, config=config)


def hovered(report: ReportPage, title: str) -> str:
    """Returns what is shown beside the pointer over the middle of a plot."""
    x, y = report.middle(title)
    report.page.mouse.move(x - 9, y)
    report.page.mouse.move(x, y, steps=3)
    shown = report.plot(title).locator(".hoverlayer")
    shown.locator("text").first.wait_for()
    return shown.text_content() or ""


def test_names_of_scopes_and_keys_are_never_read_as_html(
    visit: Visits, nasty: tuple[Path, Path]
) -> None:
    for width in (WIDE, NARROW):
        report = visit(nasty[0], width)
        report.draw_all()
        assert report.page.title() == f"Adam in {NAMES[0]}"
        assert report.page.locator("dt").inner_text() == NAMES[0]
        assert report.chips.all_inner_texts() == ["model", SCOPE]
        # A label may be shortened, but it is no tag.
        for title in ("lr", LAYERS):
            shown = hovered(report, title)
            assert "step 2" in shown
            assert NASTY in shown
        report.choice("validation metric", "key").select_option(f"val/{NAMES[0]}")
        assert NAMES[0] in hovered(report, "validation metric")
        assert_harmless(report, width)


def test_names_of_runs_and_settings_are_never_read_as_html(
    visit: Visits, nasty: tuple[Path, Path]
) -> None:
    for width in (WIDE, NARROW):
        report = visit(nasty[1], width)
        report.draw_all()
        assert report.page.title() == f"Adam in {NAMES[0]}, {NAMES[1]}"
        assert report.page.locator("dt").all_inner_texts() == [*NAMES]
        assert report.chips.all_inner_texts() == [*NAMES]
        cells = [row.locator("th, td").all_inner_texts() for row in report.page.locator("tr").all()]
        assert cells[0] == ["config", *NAMES]
        assert cells[1:] == [[NAMES[0], '"<b>1</b>"', "-"], [NAMES[1], "-", '"<b>2</b>"']]
        assert all(name in hovered(report, "loss") for name in NAMES)
        report.choice(LAYERS, "run").select_option(NAMES[1])
        report.settle()
        assert NASTY in hovered(report, LAYERS)
        report.scope.select_option(SCOPE)
        assert list(report.lines("lr")) != []
        assert_harmless(report, width)


def assert_harmless(report: ReportPage, width: int) -> None:
    """Checks that no name has become an element, run as a script, or widened the page."""
    with report.page.expect_download():
        report.panel(LAYERS).get_by_role("button", name="PNG").click()
    assert report.page.evaluate("() => window.hasAlerted ?? null") is None
    assert report.page.locator("img").count() == 0
    assert not report.is_wider_than(width)
    assert [each["name"] for each in report.controls() if each["right"] > width] == []


# ---- Large runs

LARGEST = 25 * 2**20


def random_run(keys: list[str], steps: int) -> Run:
    """Makes a run with random numbers for every key and step."""
    noise = np.exp(np.random.default_rng(0).normal(size=(len(keys), steps)))
    series = {key: Series(np.arange(steps), row) for key, row in zip(keys, noise, strict=True)}
    return Run("run", Path("run"), {}, series, {}, [])


def test_page_of_a_long_run_is_small_and_responds(visit: Visits, tmp_path: Path) -> None:
    scopes = ("", "/group/decay", "/group/no_decay")
    keys = [each.key + scope for each in STATISTICS.values() for scope in scopes][:59]
    steps = 100_000
    file = tmp_path / "long.html"
    write_report([random_run(["train/loss", *keys], steps)], file)
    assert file.stat().st_size < LARGEST
    report = visit(file)
    (line,) = report.lines("loss").values()
    assert (min(line), max(line)) == (0, steps - 1)
    assert len(line) <= 2001 + 1
    dragged = report.drag("loss", 0.2, 0.4)
    assert report.ranges()["loss"] == pytest.approx(dragged, abs=steps / 300)
    report.unfold()
    report.bring("grad_norm")
    assert report.ranges()["grad_norm"] == report.ranges()["loss"]
    was_log = report.is_log("grad_norm")
    report.log("grad_norm").click()
    report.settle()
    assert report.is_log("grad_norm") != was_log


def test_page_of_a_run_with_many_layers_is_small_and_responds(
    visit: Visits, tmp_path: Path
) -> None:
    statistics = [each for each in STATISTICS.values() if each.is_headline]
    scopes = ["", *(f"/layer/blocks.{number}.mlp" for number in range(300))]
    keys = [each.key + scope for each in statistics for scope in scopes]
    file = tmp_path / "wide.html"
    write_report([random_run(["train/loss", *keys], 1000)], file)
    assert file.stat().st_size < LARGEST
    report = visit(file)
    (before,) = report.traces(LAYERS)
    assert before["rows"] == [f"blocks.{number}.mlp" for number in range(300)]
    report.choice(LAYERS, "statistic").select_option("eps_energy_loss")
    report.settle()
    (after,) = report.traces(LAYERS)
    assert after["raw"] != before["raw"]
    assert report.plot(LAYERS).evaluate(CROWDED_TICKS) == []
    dragged = report.drag(LAYERS, 0.2, 0.4)
    assert report.ranges()[LAYERS] == pytest.approx(dragged, abs=5)
    report.bring("loss")
    assert report.ranges()["loss"] == report.ranges()[LAYERS]
