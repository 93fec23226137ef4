"""The part `step` as a picture."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.monitor_cost.results import ALL, COMPOSER, OURS, READ, STEPS, Size
from benchmarks.monitor_cost.tables import percentiles, title

TARGET = 1.3
"""The largest cost of a measurement that is acceptable, in fused steps."""


def draw(sizes: Mapping[str, Size], path: Path) -> None:
    """A panel for each size, with a bar for each arm."""
    arms = {
        name: {key: arm["ratios"] for key, arm in size["arms"].items() if key not in STEPS}
        for name, size in sizes.items()
    }
    heights = [0.27 * len(each) + 0.3 for each in arms.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.55 * len(arms) + 0.4), layout="constrained")
    axes = figure.subplots(len(arms), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, ratios) in zip(axes, arms.items(), strict=True):
        order = sorted(ratios, key=lambda key: median(ratios[key]), reverse=True)
        middles = [median(ratios[key]) for key in order]
        lows, highs = zip(*(percentiles(ratios[key]) for key in order), strict=True)
        panel.barh(order, middles, color=[color(key) for key in order], height=0.72)
        panel.hlines(order, lows, highs, color="#222222", linewidth=1.1)
        for key, middle, high in zip(order, middles, highs, strict=True):
            panel.annotate(
                f"{middle:.2f}" if middle < 10 else f"{middle:.0f}",
                (max(middle, high), key),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                bbox={"color": "white", "pad": 0.6},
            )
        is_one = panel.axvline(1, color="#222222", linewidth=1.2)
        is_target = panel.axvline(TARGET, color="#c03030", linewidth=1, linestyle=":", alpha=0.7)
        panel.set_title(title(name, sizes[name]), loc="left", fontsize=10)
        panel.set_xscale("log")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelbottom=True)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    reached = [
        value for each in arms.values() for own in each.values() for value in percentiles(own)
    ]
    # A bar on a logarithmic axis begins somewhere: left of the shortest, with room for numbers.
    axes[-1].set_xlim(min(1.0, *reached) / 1.6, max(TARGET, *reached) * 1.6)
    axes[0].legend(
        [*(Patch(color=color(key)) for key in (ALL, COMPOSER, READ)), is_one, is_target],
        ["lightning_adam", "others", "plain read", "fused step = 1", f"target {TARGET:g}"],
        loc="upper right",
        fontsize=8.5,
        framealpha=1,
    )
    axes[-1].set_xlabel(
        "time of one measurement / time of torch's fused AdamW step"
        " (median; 10th to 90th percentile)",
        fontsize=9,
    )
    figure.savefig(path, dpi=140)


def color(arm: str) -> str:
    if arm in OURS:
        return "#1f6fb4"
    return "#d4d4d4" if arm == READ else "#949494"
