"""The README's picture: the top of a report, as Chromium draws it.

python .ci/picture.py outputs/2026-01-31/12-00-00/report.html
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).with_name("report.png")
SIZE = {"width": 1280, "height": 1365}


def main(report: Path) -> None:
    """Writes the picture of a report beside this file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"),
            args=["--no-sandbox"],
        )
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("figure[data-panel='√v̂ histogram'] .heatmaplayer image")
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
