"""Draws docs/guides/schedules.png: python -m docs.schedules_picture."""

from typing import Any

import matplotlib.pyplot as plt

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.schedule import parse_schedule
from lightning_adam.optim.shapes import SHAPES, RunLength, curve

STEPS = 400
OPTIONS: dict[str, Any] = {"polynomial": {"power": 2}, "exponential": {"gamma": 0.7}}

if __name__ == "__main__":
    figure, axes = plt.subplots(2, 5, figsize=(9, 3), sharey=True, layout="constrained")
    # That of plateau depends on a metric.
    for panel, name in zip(axes.flat, [each for each in SHAPES if each != "plateau"], strict=True):
        options = OPTIONS.get(name, {}) | ({} if name == "one_cycle" else {"warmup_steps": 40})
        config: Any = parse_schedule({"name": name, **options}).config
        factor = curve(config, ConfigPath("scheduler"), RunLength(STEPS, 40), peak=1.0)
        panel.plot([factor(step) for step in range(STEPS)], color="#3f51b5")
        panel.set(title=name, xticks=[0, STEPS], yticks=[0, 1], yticklabels=["0", "peak"])
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step")
    figure.savefig("docs/guides/schedules.png", dpi=100)
