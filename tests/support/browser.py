"""A report's page as a reader's browser shows it: what is drawn, what is read, what is reached."""

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
"""Counts what a script may ask of a network."""

PAINTED = """() => new Promise((done) => requestAnimationFrame(() => {
  // The page watches what comes into sight in the same way, and is told first.
  const sight = new IntersectionObserver(() => {
    sight.disconnect();
    requestAnimationFrame(() => setTimeout(done));
  });
  sight.observe(document.documentElement);
}))"""

TRACES = """(plot) => plot.data.map((trace) => ({
  name: trace.name, type: trace.type, color: trace.line?.color,
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
    // What may not be left: a picture by its labels, a panel by anything.
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
"""Every text that can be seen: how large, in which colours, and whether it leaves its frame."""

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
      name: [control.closest("figure")?.dataset.panel, control.ariaLabel || control.textContent],
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
"""Where an axis has its ticks: in its values, of a logarithmic one the exponents, and in pixels."""


CURVES = f"""(figures) => figures.map((figure) => {{
  const plot = figure.querySelector(".plot");
  const isLog = figure.querySelector(".controls [aria-pressed]").ariaPressed === "true";
  return [figure.dataset.panel, ({TRACES})(plot), isLog, ({VISIBLE_LINES})(plot)];
}})"""


class Curves(NamedTuple):
    """What a panel of curves shows."""

    lines: dict[str, dict[float, float]]
    """By name, the numbers by step."""
    is_log: bool
    visible: int
    """How many lines can be seen."""


def named_lines(traces: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    return {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in traces}


class ReportPage:
    """A report that is open in a browser."""

    def __init__(self, page: "Page") -> None:
        self.page = page

    @property
    def titles(self) -> list[str]:
        """The panels' titles, as they stand on the page."""
        found: list[str] = self.page.evaluate(
            "() => [...document.querySelectorAll('figure')].map((each) => each.dataset.panel)"
        )
        return found

    @property
    def first_step(self) -> "Locator":
        return self.page.get_by_label("first step", exact=True)

    @property
    def last_step(self) -> "Locator":
        return self.page.get_by_label("last step", exact=True)

    @property
    def theme_button(self) -> "Locator":
        return self.page.get_by_role("button", name="light or dark")

    def panel(self, title: str) -> "Locator":
        return self.page.locator(f'figure[data-panel="{title}"]')

    def plot(self, title: str) -> "Locator":
        return self.panel(title).locator(".plot")

    def choice(self, title: str, label: str) -> "Locator":
        """A panel's selection."""
        return self.panel(title).get_by_label(label, exact=True)

    def meaning(self, title: str) -> "Locator":
        """What is said of a panel when it is asked for."""
        return self.panel(title).locator("[role=tooltip]")

    def log(self, title: str) -> "Locator":
        return self.panel(title).get_by_role("button", name="logarithmic")

    @property
    def scope(self) -> "Locator":
        """The selection of the scope in which runs are beside each other."""
        return self.page.get_by_role("toolbar").get_by_role("combobox")

    def chips(self) -> "Locator":
        """The buttons that show and hide lines."""
        return self.page.get_by_role("group", name="Lines").get_by_role("button")

    def unfold(self) -> None:
        """Opens all that is folded."""
        self.page.evaluate(
            "() => { for (const each of document.querySelectorAll('details')) each.open = true; }"
        )

    def draw_all(self) -> None:
        """Brings every panel into sight at once."""
        self.unfold()
        height = self.page.evaluate("() => document.documentElement.scrollHeight")
        size: ViewportSize = {"width": self.page.evaluate("() => innerWidth"), "height": height}
        self.page.set_viewport_size(size)
        self.settle()

    def settle(self) -> None:
        """Waits until what was changed is painted."""
        self.page.evaluate(PAINTED)

    def bring(self, title: str) -> "Locator":
        """Scrolls to a panel; its plot, drawn."""
        plot = self.plot(title)
        plot.scroll_into_view_if_needed()
        self.settle()
        return plot

    def traces(self, title: str) -> list[dict[str, Any]]:
        """What is drawn: the numbers that Plotly was given."""
        found: list[dict[str, Any]] = self.bring(title).evaluate(TRACES)
        return found

    def curves(self) -> dict[str, "Curves"]:
        """What each panel of curves shows, once it is drawn."""
        found = self.page.locator("[data-drawing=curves]").evaluate_all(CURVES)
        return {
            title: Curves(named_lines(traces), is_log, visible)
            for title, traces, is_log, visible in found
        }

    def lines(self, title: str) -> dict[str, dict[float, float]]:
        """The drawn lines: names, and numbers by step."""
        return named_lines(self.traces(title))

    def is_log(self, title: str) -> bool:
        self.bring(title)
        return self.log(title).get_attribute("aria-pressed") == "true"

    def pixel(self, title: str, letter: str, value: float) -> float:
        """Where a value stands on an axis, judged by its ticks."""
        ticks = sorted(self.bring(title).evaluate(TICKS, letter))
        (low, low_pixel), (high, high_pixel) = ticks[0], ticks[-1]
        return float(low_pixel + (value - low) / (high - low) * (high_pixel - low_pixel))

    def value(self, title: str, letter: str, pixel: float) -> float:
        """What stands on an axis at a pixel, judged by its ticks."""
        places, pixels = np.transpose(sorted(self.bring(title).evaluate(TICKS, letter)))
        slope = (places[-1] - places[0]) / (pixels[-1] - pixels[0])
        return float(places[0] + (pixel - pixels[0]) * slope)

    def area(self, title: str) -> dict[str, float]:
        """The box of a plot in which its lines are."""
        return self.box(title, ".nsewdrag")

    def box(self, title: str, part: str) -> dict[str, float]:
        """The box of a part of a plot."""
        box = self.bring(title).locator(part).first.bounding_box()
        assert box is not None
        return {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"]}

    def drag(self, title: str, start: float, end: float) -> tuple[float, float]:
        """Drags over a plot, from a share of its width to another; the steps that lie there."""
        area = self.area(title)
        pixels = [area["x"] + share * area["width"] for share in (start, end)]
        first, last = (self.value(title, "x", pixel) for pixel in pixels)
        middle = area["y"] + area["height"] / 2
        self.page.mouse.move(pixels[0], middle)
        self.page.mouse.down()
        self.page.mouse.move(pixels[1], middle, steps=5)
        self.page.mouse.up()
        self.settle()
        return first, last

    def ranges(self) -> dict[str, list[float]]:
        """The ends of the horizontal axis of each panel that is drawn."""
        found: dict[str, list[float]] = self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll("figure")]
              .map((each) => [each.dataset.panel, each.querySelector(".plot")])
              .filter(([, plot]) => plot.data)
              .map(([title, plot]) => [title, Array.from(plot._fullLayout.xaxis.range)]))"""
        )
        return found

    def texts(self) -> list[dict[str, Any]]:
        """Every text in sight."""
        found: list[dict[str, Any]] = self.page.evaluate(PIECES)
        return found

    def controls(self) -> list[dict[str, Any]]:
        """Every control in sight, and its box."""
        found: list[dict[str, Any]] = self.page.evaluate(CONTROLS)
        return found


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Debian's browser; whoever asks for these tests has to have it."""
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
    """The pages that a test opens, and all that they complain of or ask of a network."""

    def __init__(self, browser: "Browser") -> None:
        self.browser = browser
        self.pages: list[Page] = []
        self.complaints: list[str] = []

    def __call__(self, file: Path, width: int = WIDE, dark: bool = False) -> ReportPage:
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
        page.set_default_timeout(10_000)
        page.goto(file.as_uri(), timeout=60_000)
        return ReportPage(page)

    def note_request(self, address: str) -> None:
        if not address.startswith(("file:", "data:", "blob:")):
            self.complaints.append(address)

    def leave(self) -> None:
        """Closes the pages, of which none may have complained."""
        calls = [call for page in self.pages for call in page.evaluate("() => networkCalls")]
        for page in self.pages:
            page.context.close()
        assert calls == []
        assert self.complaints == [], self.complaints


def contrast(one: str, other: str) -> float:
    """How far two colours are apart, as WCAG 2 has it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    """Of a colour as a browser writes it, or of #rrggbb."""
    if color.startswith("#"):
        levels = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    else:
        levels = [round(float(level)) for level in color.strip("rgba()").split(",")[:3]]
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (level / 255 for level in levels)
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
