"""The report's page in a real browser: its charts, texts and controls."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

if TYPE_CHECKING:
    # Only a browser test needs it: without it every other test still runs.
    from playwright.sync_api import Browser, Locator, Page, ViewportSize

WIDE = 1280
NARROW = 390
HEIGHT = 900

WATCH = """
window.networkCalls = [];
for (const name of ["fetch", "XMLHttpRequest", "WebSocket", "EventSource"]) {
  window[name] = new Proxy(window[name], {
    apply(...call) { networkCalls.push(name); return Reflect.apply(...call); },
    construct(...call) { networkCalls.push(name); return Reflect.construct(...call); },
  });
}
navigator.sendBeacon = () => { networkCalls.push("sendBeacon"); return true; };
window.alert = () => { window.hasAlerted = true; };
"""
"""Counts the network calls of the page's script."""

PAINTED = """() => new Promise((done) => requestAnimationFrame(() => {
  // The page watches what comes into sight in the same way, and is called first.
  const sight = new IntersectionObserver(() => {
    sight.disconnect();
    requestAnimationFrame(() => setTimeout(done));
  });
  sight.observe(document.documentElement);
}))"""

TRACES = """(plot) => plot.data.map((trace) => ({
  name: trace.name, type: trace.type, color: trace.line?.color, width: trace.line?.width,
  x: Array.from(trace.x), y: Array.from(trace.y),
  z: (trace.z ?? []).map((row) => Array.from(row)),
  raw: (trace.customdata ?? []).map((row) => Array.from(row)),
  rows: (trace.text ?? []).map((row) => row[0]),
}))"""

VISIBLE_LINES = """(plot) => [...plot.querySelectorAll(".scatterlayer .trace")].filter(
  (trace) => trace.checkVisibility() && trace.getBoundingClientRect().width > 0).length"""

PIECES = """() => {
  const pieces = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility({ visibilityProperty: true })) continue;
    if (parent.closest("script, style, option, noscript")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    pieces.push([node.textContent.trim(), parent, range.getBoundingClientRect()]);
  }
  for (const field of document.querySelectorAll("input, select")) {
    if (field.checkVisibility()) pieces.push([field.value, field, field.getBoundingClientRect()]);
  }
  const seen = pieces.filter(([, , box]) => box.width > 1 && box.height > 1);
  return seen.map(([text, parent, box]) => {
    const style = getComputedStyle(parent);
    let ground = "rgb(255, 255, 255)";
    for (let at = parent; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/^rgba\\(.*, 0\\)$/.test(color)) { ground = color; break; }
    }
    // What may not be left: a plot by its labels, a figure by anything.
    const frame = (parent.closest("[role=tooltip]") ? null : parent.closest(".plot, figure"))
      ?.getBoundingClientRect();
    return {
      text, ground, size: parseFloat(style.fontSize),
      color: parent instanceof SVGElement ? style.fill : style.color,
      // A wide table is scrolled.
      isCut: !parent.closest("[role=region]") && (
        box.left < -0.5 || box.right > innerWidth + 0.5 || Boolean(frame) && (
          box.left < frame.left - 1 || box.right > frame.right + 1 ||
          box.top < frame.top - 1 || box.bottom > frame.bottom + 1)),
    };
  });
}"""
"""Every visible text: its size, its colors, and whether it leaves its frame."""

CONTROLS = """() => [...document.querySelectorAll("button, select, input, summary")].filter(
  (control) => control.checkVisibility()).map((control) => {
    const box = control.getBoundingClientRect(), style = getComputedStyle(control);
    let needed = control.scrollWidth;
    if (control.matches("select")) {
      const pen = document.createElement("canvas").getContext("2d");
      pen.font = style.font;
      const arrow = 16;
      needed = pen.measureText(control.selectedOptions[0]?.text ?? "").width
        + parseFloat(style.paddingLeft) + parseFloat(style.paddingRight) + arrow;
    }
    return {
      name: [control.closest("figure")?.dataset.chart, control.ariaLabel || control.textContent],
      left: box.left, right: box.right, top: box.top, bottom: box.bottom,
      isCut: needed > control.clientWidth + 1 || box.left < 0 || box.right > innerWidth,
    };
  })"""

CROWDED_TICKS = """(plot) => ["x", "y"].flatMap((letter) => {
  const labels = [...plot.querySelectorAll(`.${letter}tick text`)];
  const boxes = labels.map((label) => label.getBoundingClientRect());
  return boxes.flatMap((box, place) => boxes.slice(place + 1).filter((other) =>
    box.left < other.right && other.left < box.right &&
    box.top < other.bottom && other.top < box.bottom).map(() => labels[place].textContent));
})"""

TICKS = """(plot, letter) => [...plot.querySelectorAll(`.${letter}tick text`)].filter(
  (label) => label.checkVisibility()).map((label) => {
    const box = label.getBoundingClientRect();
    return [label.__data__.x,
            letter === "x" ? box.left + box.width / 2 : box.top + box.height / 2];
  })"""
"""The ticks of an axis: values (exponents on a logarithmic axis) and pixels."""


CURVES = f"""(figures) => figures.map((figure) => {{
  const plot = figure.querySelector(".plot");
  const isLog = plot.layout.yaxis.type === "log";
  return [figure.dataset.chart, ({TRACES})(plot), isLog, ({VISIBLE_LINES})(plot)];
}})"""

MARKS = """(plot) => ({
  lines: (plot.layout.shapes ?? []).map(({ type, x0, x1, y0, y1, xref, yref }) => (
    { type, x0, x1, y0, y1, isAcross: xref === "paper", isAlong: yref === "paper" })),
  labels: (plot.layout.annotations ?? []).map((each) => each.text),
})"""
"""The lines and labels over the curves of a plot."""

RANGES = """() => Object.fromEntries([...document.querySelectorAll("figure")]
  .map((each) => [each.dataset.chart, each.querySelector(".plot")])
  .filter(([, plot]) => plot.data)
  .map(([chart, plot]) => [chart, Array.from(plot._fullLayout.xaxis.range)]))"""

OVERLAPPING = """(controls) => controls.flatMap((one, place) => controls.slice(place + 1).filter(
  (other) => one.left < other.right - 0.5 && other.left < one.right - 0.5 &&
    one.top < other.bottom - 0.5 && other.top < one.bottom - 0.5
  ).map((other) => [one.name, other.name]))"""


class Curves(NamedTuple):
    """The contents of a chart of curves."""

    lines: dict[str, dict[float, float]]
    """By name, the numbers by step."""
    is_log: bool
    visible: int
    """The number of lines that are visible."""


def named_lines(traces: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    return {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in traces}


class ReportPage:
    """A report that is open in a browser."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.first_step = page.get_by_label("first step", exact=True)
        self.last_step = page.get_by_label("last step", exact=True)
        self.theme_button = page.get_by_role("button", name="Toggle dark theme")
        self.scope = page.locator("#scope")
        """The selection of the scope in which runs are compared."""
        self.chips = page.get_by_role("group", name="Lines").get_by_role("button")
        """The buttons that show and hide lines."""

    def steps(self) -> tuple[str, str]:
        """Returns the first and the last step as the toolbar shows them."""
        return self.first_step.input_value(), self.last_step.input_value()

    @property
    def charts(self) -> list[str]:
        """The charts, in their order."""
        figures = self.page.locator("figure")
        found: list[str] = figures.evaluate_all("(all) => all.map((each) => each.dataset.chart)")
        return found

    def figure(self, chart: str) -> "Locator":
        return self.page.locator(f"figure[data-chart={json.dumps(chart, ensure_ascii=False)}]")

    def plot(self, chart: str) -> "Locator":
        return self.figure(chart).locator(".plot").first

    def choice(self, chart: str, label: str) -> "Locator":
        return self.figure(chart).get_by_label(label, exact=True)

    def meaning(self, chart: str) -> "Locator":
        return self.figure(chart).locator("[role=tooltip]")

    def log(self, chart: str) -> "Locator":
        return self.figure(chart).get_by_role("button", name="logarithmic")

    def unfold(self) -> None:
        self.page.evaluate(
            "() => { for (const each of document.querySelectorAll('details')) each.open = true; }"
        )

    def draw_all(self) -> None:
        """Makes the window high enough to draw every chart."""
        self.unfold()
        height = self.page.evaluate("() => document.documentElement.scrollHeight")
        size: ViewportSize = {"width": self.page.evaluate("() => innerWidth"), "height": height}
        self.page.set_viewport_size(size)
        self.settle()

    def settle(self) -> None:
        """Waits until changes are painted."""
        self.page.evaluate(PAINTED)

    def bring(self, chart: str) -> "Locator":
        """Scrolls to a chart, and returns its plot when it is drawn."""
        plot = self.plot(chart)
        plot.scroll_into_view_if_needed()
        self.settle()
        return plot

    def traces(self, chart: str) -> list[dict[str, Any]]:
        """Returns the traces that Plotly draws."""
        found: list[dict[str, Any]] = self.bring(chart).evaluate(TRACES)
        return found

    def lines(self, chart: str) -> dict[str, dict[float, float]]:
        """Returns the drawn lines: the numbers by name and step."""
        return named_lines(self.traces(chart))

    def curves(self) -> dict[str, "Curves"]:
        """Returns the contents of each chart of curves, once it is drawn."""
        found = self.page.locator("[data-kind=curves]").evaluate_all(CURVES)
        return {
            chart: Curves(named_lines(traces), is_log, visible)
            for chart, traces, is_log, visible in found
        }

    def marks(self, chart: str) -> dict[str, Any]:
        """Returns the lines and the labels over the curves of a chart."""
        found: dict[str, Any] = self.bring(chart).evaluate(MARKS)
        return found

    def is_log(self, chart: str) -> bool:
        self.bring(chart)
        return self.log(chart).get_attribute("aria-pressed") == "true"

    def axis(self, chart: str, letter: str) -> Any:
        """Returns the values and the pixels of the ticks of an axis."""
        return np.transpose(sorted(self.bring(chart).evaluate(TICKS, letter)))

    def pixel(self, chart: str, letter: str, value: float) -> float:
        """Returns the position of a value on an axis, by its ticks."""
        places, pixels = self.axis(chart, letter)
        return float(np.polyval(np.polyfit(places, pixels, 1), value))

    def box(self, chart: str, part: str = ".nsewdrag") -> dict[str, float]:
        """Returns the box of a part of a plot: by default that of its lines."""
        box = self.bring(chart).locator(part).first.bounding_box()
        assert box is not None
        return {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"]}

    def middle(self, chart: str) -> tuple[float, float]:
        box = self.box(chart)
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, chart: str, start: float, end: float) -> tuple[float, float]:
        """Drags between two fractions of a plot's width, and returns the steps at both ends."""
        box, (_, y) = self.box(chart), self.middle(chart)
        pixels = [box["x"] + share * box["width"] for share in (start, end)]
        places, ticks = self.axis(chart, "x")
        first, last = np.polyval(np.polyfit(ticks, places, 1), pixels)
        self.page.mouse.move(pixels[0], y)
        self.page.mouse.down()
        self.page.mouse.move(pixels[1], y, steps=5)
        self.page.mouse.up()
        self.settle()
        return float(first), float(last)

    def ranges(self) -> dict[str, list[float]]:
        """Returns the ends of the horizontal axis of each chart that is drawn."""
        found: dict[str, list[float]] = self.page.evaluate(RANGES)
        return found

    def texts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.page.evaluate(PIECES)
        return found

    def faint_texts(self) -> dict[str, float]:
        """Returns the texts with too little contrast for WCAG 2 AA, and their contrast."""
        found = [(each["text"], contrast(each["color"], each["ground"])) for each in self.texts()]
        return {text: value for text, value in found if value < 4.5}

    def controls(self) -> list[dict[str, Any]]:
        """Returns every visible control, and its box."""
        found: list[dict[str, Any]] = self.page.evaluate(CONTROLS)
        return found

    def is_wider_than(self, width: int) -> bool:
        return bool(self.page.evaluate("() => document.documentElement.scrollWidth") > width)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Starts Chromium, which has to be installed."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.fail("playwright is missing: pip install -e '.[dev]'")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None or shutil.which(program) is None:
        pytest.fail("chromium is missing: apt install chromium, or CHROMIUM=/its/program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visits:
    """The pages that a test opens, with their errors and network requests."""

    def __init__(self, browser: "Browser") -> None:
        self.browser = browser
        self.pages: list[Page] = []
        self.complaints: list[str] = []

    def __call__(
        self, file: Path, width: int = WIDE, dark: bool = False, ready: str = "html[data-theme]"
    ) -> ReportPage:
        """Opens a page, and waits for an element that its script makes."""
        context = self.browser.new_context(
            viewport={"width": width, "height": HEIGHT},
            color_scheme="dark" if dark else "light",
            offline=True,
        )
        context.add_init_script(WATCH)
        page = context.new_page()
        self.pages.append(page)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.note_request(request.url))
        page.on("websocket", lambda socket: self.complaints.append(socket.url))
        page.set_default_timeout(30_000)
        page.goto(file.as_uri(), timeout=60_000)
        page.locator(ready).first.wait_for(state="attached")
        return ReportPage(page)

    def note_request(self, address: str) -> None:
        if not address.startswith(("file:", "data:", "blob:")):
            self.complaints.append(address)

    def leave(self) -> None:
        """Closes the pages, and fails if one has logged an error."""
        calls = [call for page in self.pages for call in page.evaluate("() => networkCalls")]
        for page in self.pages:
            page.context.close()
        assert calls == []
        assert self.complaints == [], self.complaints


def contrast(one: str, other: str) -> float:
    """Returns the contrast of two colors, as WCAG 2 defines it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    """Returns the luminance of a color as a browser writes it, or of #rrggbb."""
    if color.startswith("#"):
        levels = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    else:
        levels = [round(float(level)) for level in color.strip("rgba()").split(",")[:3]]
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (level / 255 for level in levels)
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
