"""The report in a real browser: what it draws of a run, and what a reader can do with it."""

import csv
import itertools
import struct
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_adam.dashboard.comparison import parting
from lightning_adam.dashboard.runs import read_runs
from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.histograms import QUANTITIES
from tests.dashboard.run_files import write_csv
from tests.support.browser import (
    CROWDED_TICKS,
    NARROW,
    VISIBLE_LINES,
    WIDE,
    Curves,
    ReportPage,
    Visits,
    contrast,
    luminance,
)
from tests.support.commands import GLOBAL_STEP, history, offline_runs, recipe, succeed
from tests.support.offline import tables

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.slow

MONITORED = (
    "width=2",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=25",
    "adam_monitor.every_n_steps=1",
    "adam_monitor.statistics=all",
    "adam_monitor.histograms_every_n_steps=5",
    "adam_monitor.scopes=[model,group,layer]",
)
"""A small training of which everything is logged."""
LRS = ("0.002", "0.005")
EPS = ("1e-08", "0.0001")
LAST_STEP = 24

HISTOGRAM = "√v̂ histogram"
EPS_CURVE = "eps_curve"
LAYERS = "layers"
OF_OTHERS = {"loss": ["train/loss"], "validation metric": ["val/accuracy", "val/loss"]}
"""Panels of keys that are not ours."""

Lines = dict[str, dict[str, dict[int, float]]]
"""Numbers by key, scope and step."""


class Logged(NamedTuple):
    """What a training has left, and its page."""

    folder: Path
    page: Path


class Logs(NamedTuple):
    """The trainings, and the page of two of them."""

    first: Logged
    second: Logged
    csv: Logged
    both: Path


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    folder = tmp_path_factory.mktemp("trainings")
    typed = [
        (f"optimizer.lr={lr}", f"optimizer.eps={eps}") for lr, eps in zip(LRS, EPS, strict=True)
    ]
    jobs = {"first": typed[0], "second": typed[1], "csv": ("logger=csv",)}
    with ThreadPoolExecutor(2) as pool:
        trained = pool.map(lambda name: recipe(folder / name, *MONITORED, *jobs[name]), jobs)
    assert [each.output for each in trained if each.returncode] == []
    runs = [*offline_runs(folder), folder / "csv"]
    pages = [reported(folder / f"{name}.html", run) for name, run in zip(jobs, runs, strict=True)]
    first, second, of_csv = (Logged(*each) for each in zip(runs, pages, strict=True))
    return Logs(first, second, of_csv, both=reported(folder / "both.html", *runs[:2]))


def reported(file: Path, *runs: Path) -> Path:
    """The page that the command writes of some runs."""
    printed = succeed(["lightning-adam", "report", *runs, "-o", file])
    assert printed.splitlines()[-1] == f"report: {file}"
    return file


# What was logged, read without the page's own reader.


def lines_of(offline_run: Path) -> Lines:
    """What is drawn as curves."""
    found: Lines = {}
    for row in history(offline_run):
        for key, value in row.items():
            base, scope = taken_apart(key)
            is_number = isinstance(value, int | float)
            if is_number and GLOBAL_STEP in row and not scope.startswith("layer/"):
                name = scope.removeprefix("group/")
                found.setdefault(base, {}).setdefault(name, {})[row[GLOBAL_STEP]] = float(value)
    return found


def taken_apart(key: str) -> tuple[str, str]:
    """A key without its scope, and its scope; of what is not ours there is none."""
    if not key.startswith("adam_"):
        return key, ""
    *base, scope = [*key.split("/", 2), "model"][:3]
    return "/".join(base), scope


def layers_of(offline_run: Path) -> Lines:
    """By name of a statistic the numbers of the layers."""
    found: Lines = {}
    for table in tables(offline_run, history(offline_run), "adam_layers"):
        for cells in table.rows:
            row = dict(zip(table.columns, cells, strict=True))
            for name in STATISTICS.keys() & row.keys():
                if row[name] is not None:
                    layer = found.setdefault(name, {}).setdefault(row["layer"], {})
                    layer[row[GLOBAL_STEP]] = float(row[name])
    return found


def shares_of(offline_run: Path, quantity: str, scope: str) -> dict[tuple[int, int], float]:
    """The share of the elements by step and octave."""
    key = f"adam_histogram/{quantity}" + ("" if scope == "model" else f"/group/{scope}")
    found = {}
    for row in history(offline_run):
        if f"{key}.values" in row:
            counts, edges = row[f"{key}.values"], row[f"{key}.bins"]
            for count, edge in zip(counts, edges[:-1], strict=True):
                if count:
                    found[row[GLOBAL_STEP], int(edge)] = count / sum(counts)
    return found


def run_name(offline_run: Path) -> str:
    return offline_run.name.rpartition("-")[2]


def labels(logs: Logs) -> list[str]:
    """How the two runs are told apart."""
    runs = (logs.first.folder, logs.second.folder)
    return [
        f"{run_name(run)} (lr={lr}, eps={eps})" for run, lr, eps in zip(runs, LRS, EPS, strict=True)
    ]


def positive(line: Mapping[Any, float], is_log: bool) -> dict[float, float]:
    """A line as it is drawn: on a logarithmic scale nothing stands at 0 and below."""
    return {step: value if value > 0 or not is_log else np.nan for step, value in line.items()}


def assert_same(
    drawn: Mapping[str, Mapping[float, float]], logged: Mapping[str, Mapping[float, float]]
) -> None:
    assert drawn.keys() == logged.keys()
    for name, line in logged.items():
        assert list(drawn[name]) == list(line)
        np.testing.assert_array_equal(list(drawn[name].values()), list(line.values()))


# Drawn: the numbers of the run


def test_every_curve_is_drawn_with_the_numbers_of_the_run(visit: Visits, logs: Logs) -> None:
    report = visit(logs.first.page)
    report.draw_all()
    logged = lines_of(logs.first.folder)
    measured = {name for name, each in STATISTICS.items() if each.key in logged}
    assert {*report.titles} == measured | OF_OTHERS.keys() | {LAYERS, HISTOGRAM, EPS_CURVE}
    own = run_name(logs.first.folder)
    drawn = report.curves()
    assert drawn.keys() == measured | OF_OTHERS.keys()
    for title in drawn:
        key = STATISTICS[title].key if title in measured else OF_OTHERS[title][0]
        assert_drawn(drawn[title], logged[key], own)
    report.choice("validation metric", "key").select_option("val/loss")
    report.settle()
    assert_drawn(report.curves()["validation metric"], logged["val/loss"], own)


def assert_drawn(drawn: Curves, logged: Mapping[str, Mapping[int, float]], own: str) -> None:
    """That all lines of a key are there, to be seen, under the names of their scopes."""
    lines = {scope or own: positive(line, drawn.is_log) for scope, line in logged.items()}
    assert_same(drawn.lines, lines)
    assert drawn.visible == sum(np.isfinite([*line.values()]).any() for line in lines.values())


def test_another_logger_than_wandb_has_a_page_too(visit: Visits, logs: Logs) -> None:
    report = visit(logs.csv.page)
    report.draw_all()
    assert {"loss", "lr", "exp_avg_sq_lag", LAYERS} < {*report.titles}
    assert {HISTOGRAM, EPS_CURVE}.isdisjoint(report.titles)
    assert report.page.get_by_text("a CSVLogger keeps none").count() == 2
    (metrics,) = logs.csv.folder.rglob("metrics.csv")
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for title, name in itertools.product(("grad_norm", "update_norm"), ("decay", "no_decay")):
        key = f"{STATISTICS[title].key}/group/{name}"
        line = {float(row["step"]): float(row[key]) for row in rows if row[key]}
        assert_same({name: report.lines(title)[name]}, {name: positive(line, report.is_log(title))})


def test_the_map_of_the_layers_shows_the_statistic_that_is_chosen(
    visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page)
    logged = layers_of(logs.first.folder)
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
    """What a map of layers holds, and that its colours are those of its numbers."""
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
    """Numbers, with NaN where the page has none."""
    return np.array(
        [[np.nan if cell is None else cell for cell in row] for row in rows], dtype=np.float64
    )


def picture(plot: "Locator") -> str:
    """The picture of a map, as it is painted."""
    plot.page.evaluate("() => new Promise((done) => setTimeout(done, 50))")
    return plot.locator(".heatmaplayer image").first.get_attribute("href") or ""


def test_a_histogram_shows_the_quantity_and_the_scope_that_are_chosen(
    visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page)
    quantities, scopes = (report.choice(HISTOGRAM, field) for field in ("quantity", "scope"))
    assert {*quantities.locator("option").all_inner_texts()} == QUANTITIES.keys()
    assert (quantities.input_value(), scopes.input_value()) == ("denominator", "model")
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
        assert shares == pytest.approx(shares_of(logs.first.folder, quantity, scope), rel=1e-6)
        assert picture(report.plot(HISTOGRAM))


def test_a_line_stands_where_eps_is_beside_the_denominators_alone(
    visit: Visits, logs: Logs
) -> None:
    for logged, eps in ((logs.first, EPS[0]), (logs.second, EPS[1])):
        report = visit(logged.page)
        for title, letter in ((HISTOGRAM, "y"), (EPS_CURVE, "x")):
            expected = report.pixel(title, letter, np.log10(float(eps)))
            box = report.box(title, ".shapelayer path")
            side = {"x": "width", "y": "height"}[letter]
            assert box[letter] + box[side] / 2 == pytest.approx(expected, abs=3)
        report.choice(HISTOGRAM, "quantity").select_option("direction")
        report.settle()
        assert report.plot(HISTOGRAM).locator(".shapelayer path").count() == 0


def test_the_curve_of_eps_is_the_share_below_each_power_of_two(visit: Visits, logs: Logs) -> None:
    curves = visit(logs.first.page).lines(EPS_CURVE)
    assert {*curves} == {"model", "decay", "no_decay"}
    for scope, curve in curves.items():
        shares = shares_of(logs.first.folder, "denominator", scope)
        last = max(step for step, _ in shares)
        for eps, share in curve.items():
            below = [
                part
                for (step, octave), part in shares.items()
                if step == last and 2.0 ** (octave + 1) <= eps
            ]
            assert share == pytest.approx(sum(below))


# Chosen on the page


@pytest.mark.parametrize("title", ["grad_norm", LAYERS])
def test_a_scale_is_made_logarithmic_and_linear(title: str, visit: Visits, logs: Logs) -> None:
    report = visit(logs.first.page)
    report.unfold()
    report.bring(title)
    # Of curves the numbers stay and the axis changes; of a map the colours.
    shown = "(plot) => plot.layout.yaxis.type + JSON.stringify(plot.data[0].z ?? null)"
    before, was_log = report.plot(title).evaluate(shown), report.is_log(title)
    report.log(title).click()
    report.settle()
    assert report.is_log(title) != was_log
    assert report.plot(title).evaluate(shown) != before
    report.log(title).click()
    report.settle()
    assert report.is_log(title) == was_log
    assert report.plot(title).evaluate(shown) == before


def grounds(report: ReportPage) -> list[str]:
    """The colours of the page, of a plot and of its first line."""
    report.settle()
    colors: list[str] = report.plot("loss").evaluate(
        """(plot) => [
          getComputedStyle(document.body).backgroundColor,
          getComputedStyle(plot.querySelector(".main-svg")).backgroundColor,
          getComputedStyle(plot.querySelector(".js-line")).stroke,
        ]"""
    )
    return colors


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_dark_where_the_system_is_and_a_button_changes_it(
    dark: bool, visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page, dark=dark)
    report.bring("loss")
    seen = []
    for is_dark in (dark, not dark, dark):
        colors = grounds(report)
        assert [luminance(color) < 0.2 for color in colors[:2]] == [is_dark, is_dark]
        seen.append(colors)
        report.theme_button.click()
    assert seen[0] == seen[2]
    assert all(one != other for one, other in zip(seen[0], seen[1], strict=True))


def test_a_chip_hides_its_lines_in_every_panel_and_shows_them_again(
    visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page)
    assert report.chips().all_inner_texts() == ["model", "decay", "no_decay"]
    report.bring("lr")
    chip = report.chips().nth(1)
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


def test_a_zoom_is_taken_over_by_every_panel_also_by_those_drawn_later(
    visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page)
    report.bring("loss")
    dragged = report.drag("loss", 0.25, 0.75)
    report.draw_all()
    ranges = report.ranges()
    assert len(ranges) == len(report.titles)
    of_eps = ranges.pop(EPS_CURVE)
    chosen = ranges["loss"]
    assert chosen == pytest.approx(dragged, abs=0.3)
    assert {tuple(each) for each in ranges.values()} == {tuple(chosen)}
    assert of_eps != chosen
    first, last = (int(step) for step in steps_shown(report))
    assert first - 1 < chosen[0] <= first
    assert last <= chosen[1] < last + 1
    # Lines leave the picture on both sides.
    steps = list(report.lines("lr")["model"])
    assert steps == list(range(first - 1, last + 2))


@pytest.mark.parametrize("back", ["all", "double click"])
def test_every_step_is_shown_again(back: str, visit: Visits, logs: Logs) -> None:
    report = visit(logs.first.page)
    report.bring("loss")
    before = report.ranges()
    report.drag("loss", 0.4, 0.8)
    assert report.ranges()["lr"] != before["lr"]
    if back == "all":
        report.page.get_by_role("button", name="all", exact=True).click()
    else:
        report.plot("lr").locator(".nsewdrag").first.dblclick()
    report.settle()
    after = report.ranges()
    assert after.keys() == before.keys()
    np.testing.assert_allclose([*after.values()], [*before.values()])
    assert steps_shown(report) == ("0", str(LAST_STEP))


def test_steps_are_typed(visit: Visits, logs: Logs) -> None:
    report = visit(logs.first.page)
    report.bring("lr")
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
    assert steps_shown(report) == ("0", str(LAST_STEP))


# Explained


def assert_explained(said: str | None, statistic: Statistic) -> None:
    """That it is said what a statistic is, as the catalogue has it, whatever the spaces."""
    expected = statistic.meaning + statistic.formula + statistic.source
    assert "".join((said or "").split()) == "".join(expected.split())


def test_a_heading_says_what_its_panel_shows(visit: Visits, logs: Logs) -> None:
    report = visit(logs.first.page)
    for title in STATISTICS.keys() & {*report.titles}:
        assert_explained(report.meaning(title).text_content(), STATISTICS[title])
    for title in ("loss", "lr", "exp_avg_sq_lag"):
        assert not report.meaning(title).is_visible()
        report.panel(title).get_by_role("heading").hover()
        assert report.meaning(title).is_visible()
        report.page.keyboard.press("Escape")
        assert not report.meaning(title).is_visible()
        # It is only that once.
        report.plot(title).hover()
        report.panel(title).get_by_role("heading").hover()
        assert report.meaning(title).is_visible()
        report.plot(title).hover()
        assert not report.meaning(title).is_visible()


def test_an_explanation_is_reached_by_keyboard_and_left_by_escape(
    visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page)
    button = report.panel("lr").get_by_role("button", name="what lr is")
    meaning = report.meaning("lr")
    assert button.get_attribute("aria-describedby") == meaning.get_attribute("id")
    report.choice("validation metric", "key").focus()
    for _ in range(10):
        report.page.keyboard.press("Tab")
        if button.evaluate("(button) => button === document.activeElement"):
            break
    assert meaning.is_visible()
    assert_explained(meaning.inner_text(), STATISTICS["lr"])
    report.page.keyboard.press("Escape")
    assert not meaning.is_visible()
    # It is only that once.
    report.page.keyboard.press("Tab")
    report.page.keyboard.press("Shift+Tab")
    assert meaning.is_visible()


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
"""Where a panel's explanation is, and what it lies over."""


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_an_explanation_stays_in_the_window_and_off_its_panels_controls(
    width: int, visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page, width)
    report.draw_all()
    report.page.add_style_tag(content="[role=tooltip] { display: block !important; }")
    placed = {title: report.panel(title).evaluate(EXPLANATION) for title in report.titles}
    assert {title: at for title, at in placed.items() if at != {"inWindow": True, "over": []}} == {}
    assert report.page.evaluate("() => document.documentElement.scrollWidth") <= width


# Saved


@pytest.mark.parametrize("dark", [False, True])
def test_a_panel_is_saved_as_a_picture_for_a_slide(
    dark: bool, visit: Visits, logs: Logs, tmp_path: Path
) -> None:
    report = visit(logs.first.page, dark=dark)
    for title in ("exp_avg_sq_lag", EPS_CURVE, HISTOGRAM, LAYERS):
        colors = [trace["color"] for trace in report.traces(title) if trace["color"]]
        report.page.mouse.move(0, 0)
        with report.page.expect_download() as download:
            report.panel(title).get_by_role("button", name="PNG").click()
        assert download.value.suggested_filename.endswith(".png")
        file = tmp_path / f"{title}.png"
        download.value.save_as(file)
        content = file.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", content[16:24])) > 1000
        pixels = np.round(255 * imread(file)[..., :3]).astype(int)
        assert pixels[0, 0].tolist() == [255, 255, 255]
        found = {tuple(color) for color in pixels.reshape(-1, 3)[::7].tolist()}
        if not dark:
            # The lines stand in it in their own colours.
            assert {tuple(bytes.fromhex(color[1:])) for color in colors} <= found
        assert len(found) > 10
    # What was saved on white leaves the page as it was.
    assert (luminance(grounds(report)[1]) < 0.2) is dark


# Two runs


def test_two_runs_differ_in_just_the_settings_that_were_changed(visit: Visits, logs: Logs) -> None:
    report = visit(logs.both)
    comparison = report.page.locator("#comparison")
    rows = comparison.locator("tr").all()
    assert [row.locator("th, td").all_inner_texts() for row in rows] == [
        ["config", *labels(logs)],
        ["lightning_adam.optimizer.lr", *LRS],
        ["lightning_adam.optimizer.eps", *EPS],
    ]


def test_where_two_runs_part_is_said_in_a_sentence(visit: Visits, logs: Logs) -> None:
    first, second = read_runs([logs.first.folder, logs.second.folder])
    at_all, clearly = parting(first, second, 0), parting(first, second)
    assert at_all is not None
    assert clearly is not None
    sentence = visit(logs.both).page.locator("#comparison .parting").inner_text()
    names = labels(logs)
    values = [f"{value:.4g}" for value in clearly.values]
    assert " ".join(sentence.split()) == (
        f"{names[1]} measures something else than {names[0]} from step {at_all.step} on;"
        f" by more than 10% for the first time at step {clearly.step},"
        f" {clearly.scope.kind} {clearly.scope}:"
        f" {clearly.statistic} {values[0]} there, {values[1]} here."
    )


def test_two_runs_are_beside_each_other_in_the_scope_that_is_chosen(
    visit: Visits, logs: Logs
) -> None:
    report = visit(logs.both)
    logged = [lines_of(logs.first.folder), lines_of(logs.second.folder)]
    assert report.chips().all_inner_texts() == labels(logs)
    for scope in ("model", "no_decay", "decay"):
        report.scope.select_option(scope)
        for title in ("lr", "exp_avg_sq_lag", "update_to_weight"):
            key = STATISTICS[title].key
            lines = [positive(run[key][scope], report.is_log(title)) for run in logged]
            assert_same(report.lines(title), dict(zip(labels(logs), lines, strict=True)))
    losses = [positive(run["train/loss"][""], report.is_log("loss")) for run in logged]
    assert_same(report.lines("loss"), dict(zip(labels(logs), losses, strict=True)))


def test_a_map_shows_the_run_that_is_chosen(visit: Visits, logs: Logs) -> None:
    report = visit(logs.both)
    runs = (logs.first.folder, logs.second.folder)
    for run, label in reversed([*zip(runs, labels(logs), strict=True)]):
        report.choice(LAYERS, "run").select_option(label)
        for name in ("direction_rms", "update_to_weight"):
            report.choice(LAYERS, "statistic").select_option(name)
            assert_map(report, layers_of(run)[name])
        report.choice(HISTOGRAM, "run").select_option(label)
        (drawn,) = report.traces(HISTOGRAM)
        shares = [share for row in drawn["z"] for share in row if share]
        expected = shares_of(run, "denominator", "model").values()
        assert sorted(shares) == pytest.approx(sorted(expected), rel=1e-6)


def test_a_run_without_the_statistic_that_is_chosen_shows_another_and_says_which(
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


# Read and reached by everybody


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("runs", ["first", "both"])
def test_nothing_is_cut_off_or_in_the_way_of_another(
    width: int, runs: str, visit: Visits, logs: Logs
) -> None:
    report = visit(logs.both if runs == "both" else logs.first.page, width)
    report.draw_all()
    page_width = report.page.evaluate("() => document.documentElement.scrollWidth")
    assert page_width <= width
    controls = report.controls()
    assert [control["name"] for control in controls if control["isCut"]] == []
    assert [
        (one["name"], other["name"])
        for one, other in itertools.combinations(controls, 2)
        if one["left"] < other["right"] - 0.5
        and other["left"] < one["right"] - 0.5
        and one["top"] < other["bottom"] - 0.5
        and other["top"] < one["bottom"] - 0.5
    ] == []
    texts = report.texts()
    assert len(texts) > 500
    assert {text["text"] for text in texts if text["isCut"]} == set()
    crowded = {title: report.plot(title).evaluate(CROWDED_TICKS) for title in report.titles}
    assert {title: ticks for title, ticks in crowded.items() if ticks} == {}


def test_no_text_is_too_small_to_read(visit: Visits, logs: Logs) -> None:
    report = visit(logs.both)
    report.draw_all()
    assert {text["text"]: text["size"] for text in report.texts() if text["size"] < 11} == {}


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_lines_stand_out_against_their_ground(
    dark: bool, visit: Visits, logs: Logs
) -> None:
    report = visit(logs.first.page, dark=dark)
    report.chips().first.click()
    report.draw_all()
    # Every explanation at once.
    report.page.add_style_tag(content="[role=tooltip] { display: block !important; }")
    pale = {
        text["text"]: contrast(text["color"], text["ground"])
        for text in report.texts()
        if contrast(text["color"], text["ground"]) < 4.5
    }
    assert pale == {}
    report.chips().first.click()
    ground = report.panel("lr").evaluate("(panel) => getComputedStyle(panel).backgroundColor")
    colors = {trace["color"] for trace in report.traces("lr")}
    marks = report.chips().evaluate_all(
        "(chips) => chips.map((chip) => getComputedStyle(chip, '::before').backgroundColor)"
    )
    assert len(colors) == len(marks) == 3
    assert {color for color in [*colors, *marks] if contrast(color, ground) < 3} == set()


FOCUSED = """() => {
  const at = document.activeElement;
  if (at === document.body) return null;
  const style = getComputedStyle(at), box = at.getBoundingClientRect();
  const x = box.x + Math.min(box.width / 2, 40), y = box.y + box.height / 2;
  const hit = document.elementFromPoint(x, y);
  window.focused ??= [];
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


@pytest.mark.parametrize("key", ["Tab", "Shift+Tab"])
def test_every_control_is_reached_by_keyboard_and_the_focus_is_seen(
    key: str, visit: Visits, logs: Logs
) -> None:
    report = visit(logs.both)
    if key == "Tab":
        report.unfold()
    report.page.keyboard.press(key)
    seen: list[dict[str, Any]] = []
    while (focused := report.page.evaluate(FOCUSED)) is not None and len(seen) < 400:
        seen.append(focused)
        report.page.keyboard.press(key)
    assert report.page.evaluate(NEVER_FOCUSED) == []
    assert [each["name"] for each in seen if not each["hasOutline"]] == []
    assert [each["name"] for each in seen if each["isCovered"]] == []
    ground = grounds(report)[0]
    assert {each["color"] for each in seen if contrast(each["color"], ground) < 3} == set()


def test_every_control_has_a_name_of_its_own(visit: Visits, logs: Logs) -> None:
    report = visit(logs.both)
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


# Names that look like HTML

NASTY = "<img src=x onerror=window.hasAlerted=true>&amp;\"'🙂</script><script>alert(1)</script>"
LONG = "a_name_without_any_space_" * 6
LOG_NASTY_RUN = """
import sys
import wandb

name, scope, value = sys.argv[1:]
adam = {"optimizer": {"class": "AdamW", "eps": 1e-8, "param_groups": {scope: {"eps": 1e-8}}}}
run = wandb.init(mode="offline", name=name, config={"lightning_adam": adam, name: value})
keys = ["adam_schedule/lr", f"adam_schedule/lr/group/{scope}"]
keys += [f"adam_update/update_to_weight/layer/{scope}"]
counted = wandb.Histogram(np_histogram=([1, 2, 3], [-3.0, -2.0, -1.0, 0.0]))
for step in range(5):
    row = dict.fromkeys([*keys, "train/loss", "val/loss", f"val/{name}"], float(step + 1))
    histogram = {f"adam_histogram/denominator/group/{scope}": counted}
    run.log({**row, **histogram, "trainer/global_step": step})
run.finish()
"""


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pages of one and of two runs, all of whose names look like HTML."""
    folder = tmp_path_factory.mktemp("nasty")
    for name, value in ((f"one {NASTY}", "<b>1</b>"), (f"two {NASTY}", "<b>2</b>")):
        (folder / name[:3]).mkdir()
        command = [sys.executable, "-c", LOG_NASTY_RUN, name, f"{NASTY}{LONG}", value]
        succeed(command, folder / name[:3])
    runs = [offline_runs(folder / name)[0] for name in ("one", "two")]
    return reported(folder / "one.html", runs[0]), reported(folder / "two.html", *runs)


def hovered(report: ReportPage, title: str) -> str:
    """What is shown beside the pointer over the middle of a plot."""
    area = report.area(title)
    middle = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    report.page.mouse.move(middle[0] - 9, middle[1])
    report.page.mouse.move(*middle, steps=3)
    shown = report.plot(title).locator(".hoverlayer")
    shown.locator("text").first.wait_for()
    return shown.text_content() or ""


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_names_of_scopes_are_shown_as_they_are(
    width: int, visit: Visits, nasty: tuple[Path, Path]
) -> None:
    report = visit(nasty[0], width)
    report.draw_all()
    assert report.page.title() == f"Adam in one {NASTY}"
    assert report.page.locator("dt").inner_text() == f"one {NASTY}"
    assert report.chips().all_inner_texts() == ["model", NASTY + LONG]
    # A label may be cut, of the front too, but it is no tag.
    for title in ("lr", LAYERS):
        shown = hovered(report, title)
        assert "step 2" in shown
        assert NASTY in shown
    report.choice("validation metric", "key").select_option(f"val/one {NASTY}")
    assert f"one {NASTY}" in hovered(report, "validation metric")
    assert_harmless(report, width)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_names_of_runs_and_settings_are_shown_as_they_are(
    width: int, visit: Visits, nasty: tuple[Path, Path]
) -> None:
    report = visit(nasty[1], width)
    report.draw_all()
    names = [f"one {NASTY}", f"two {NASTY}"]
    assert report.page.title() == f"Adam in {names[0]}, {names[1]}"
    assert report.page.locator("dt").all_inner_texts() == names
    assert report.chips().all_inner_texts() == names
    cells = [row.locator("th, td").all_inner_texts() for row in report.page.locator("tr").all()]
    assert cells[0] == ["config", *names]
    assert cells[1:] == [[names[0], '"<b>1</b>"', "-"], [names[1], "-", '"<b>2</b>"']]
    assert all(name in hovered(report, "loss") for name in names)
    report.choice(LAYERS, "run").select_option(names[1])
    report.settle()
    assert NASTY in hovered(report, LAYERS)
    report.scope.select_option(NASTY + LONG)
    assert list(report.lines("lr")) != []
    assert_harmless(report, width)


def assert_harmless(report: ReportPage, width: int) -> None:
    """No name has become an element or run as a script, or made the page wider."""
    with report.page.expect_download():
        report.panel(LAYERS).get_by_role("button", name="PNG").click()
    assert report.page.evaluate("() => window.hasAlerted ?? null") is None
    assert report.page.locator("img").count() == 0
    assert report.page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert [each["name"] for each in report.controls() if each["right"] > width] == []


# Long runs


def write_metrics(folder: Path, keys: list[str], steps: int) -> Path:
    """What a CSVLogger leaves of a run, its lines repeated after a thousand."""
    folder.mkdir(parents=True)
    noise = np.exp(np.random.default_rng(0).normal(size=(1000, len(keys))))
    lines = [",".join(map("{:.6g}".format, row)) for row in noise.tolist()]
    with (folder / "metrics.csv").open("w") as file:
        file.write(",".join(["step", *keys]) + "\n")
        file.writelines(f"{step},{lines[step % len(lines)]}\n" for step in range(steps))
    return folder


LARGEST = 25 * 2**20


@pytest.mark.slow
def test_the_page_of_a_long_run_is_small_and_answers(visit: Visits, tmp_path: Path) -> None:
    scopes = ("", "/group/decay", "/group/no_decay")
    keys = [each.key + scope for each in STATISTICS.values() for scope in scopes][:59]
    steps = 100_000
    run = write_metrics(tmp_path / "long" / "run", ["train/loss", *keys], steps)
    file = reported(tmp_path / "long.html", run)
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


@pytest.mark.slow
def test_the_page_of_a_run_of_many_layers_is_small_and_answers(
    visit: Visits, tmp_path: Path
) -> None:
    statistics = [each for each in STATISTICS.values() if each.is_headline]
    scopes = ["", *(f"/layer/blocks.{number}.mlp" for number in range(300))]
    keys = [each.key + scope for each in statistics for scope in scopes]
    run = write_metrics(tmp_path / "wide" / "run", ["train/loss", *keys], 1000)
    file = reported(tmp_path / "wide.html", run)
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
