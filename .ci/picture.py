"""Takes the screenshot of a report for the README and a guide.

python -m recipes.mnist optimizer.eps=1e-3
python .ci/picture.py outputs/2026-01-31/12-00-00/report.html
"""

import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "guides" / "report.png"
SIZE = {"width": 1280, "height": 1020}


def main(report: Path) -> None:
    """Saves the first screen of a report as a picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"),
            args=["--no-sandbox"],
        )
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("figure[data-chart='lr'] .scatterlayer path")
        page.screenshot(path=PICTURE)
        browser.close()
    Image.open(PICTURE).quantize(256, method=Image.Quantize.FASTOCTREE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
