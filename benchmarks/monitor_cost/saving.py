"""What is left in a folder: the numbers, a picture of them, and the tables in its README.md."""

import json
from pathlib import Path

from benchmarks.monitor_cost.picture import draw
from benchmarks.monitor_cost.results import Results
from benchmarks.monitor_cost.tables import report

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def save(results: Results, folder: Path | None) -> None:
    """Keeps the numbers beside what is there, and renders all of them anew; None: nowhere."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "monitor_cost.json"
    if kept.exists():
        earlier = json.loads(kept.read_text())
        results = Results(
            step={**earlier["step"], **results["step"]},
            training={**earlier["training"], **results["training"]},
        )
    kept.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for device, part in results["step"].items():
        suffix = "" if device == "cpu" else f"_{device}"
        draw(part["sizes"], folder / f"monitor_cost{suffix}.png")
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if BEGIN in text and END in text:
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        readme.write_text(f"{before}{BEGIN}\n\n{report(results)}\n\n{END}{after}")
