"""Parses the page of a report: its elements, and the data of its script."""

import base64
import functools
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_adam.reports.report import page
from lightning_adam.reports.runs import Run
from tests.support.html_page import HtmlPage


class ParsedReport(HtmlPage):
    """A page in which every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        assert self.misplaced == []

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        (script,) = (each for each in self.all("script") if each.attributes.get("id") == "data")

        def refuse(constant: str) -> None:
            raise AssertionError(f"JSON does not support {constant}")

        return dict(json.loads(script.source, parse_constant=refuse))

    @property
    def charts(self) -> dict[str, Any]:
        return dict(self.data["charts"])

    def named(self, name: str) -> list[str]:
        return self.texts("p", name)


def report_of(*runs: Run) -> ParsedReport:
    return ParsedReport(page(runs))


def unpack(parts: dict[str, str]) -> NDArray[Any]:
    """Decodes an array like page.js."""
    content = base64.b64decode(parts["bytes"], validate=True)
    return np.frombuffer(content, np.dtype(parts["type"]).newbyteorder("<"))
