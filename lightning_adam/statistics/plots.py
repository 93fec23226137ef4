"""Measurements as small multiples: a panel for each statistic, a line for each scope."""

import math
from collections.abc import Mapping, Sequence

try:
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "AdamStatistics.plot draws with matplotlib: pip install 'lightning-adam[dashboard]'"
    ) from error

from lightning_adam.statistics.catalogue import STATISTICS

COLUMNS = 4
LOG_SPAN = 100
"""A panel whose values span more than this is logarithmic."""


def plot_statistics(
    measurements: Sequence[Mapping[str, float]], ax: Axes | None = None
) -> tuple[Figure | SubFigure, Axes | list[Axes]]:
    """Draws measurements: as lines if there are several, as bars if there is one.

    Args:
        measurements: What `AdamStatistics.compute` returned, each time.
        ax: Where to draw, if there is one statistic alone (default: None, a new figure).

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is nothing to draw, or several statistics and one `ax`.

    Example:
        >>> figure, axes = plot_statistics([{"adam_update/update_norm": 1.0}])
        >>> axes[0].get_ylabel()
        'weight'
    """
    panels = {
        statistic.name: _lines(statistic.key, measurements) for statistic in STATISTICS.values()
    }
    panels = {name: lines for name, lines in panels.items() if lines}
    if not panels:
        raise ValueError("There is nothing to plot. Call update(optimizer) first")
    figure: Figure | SubFigure
    if ax is not None:
        if len(panels) > 1:
            raise ValueError(
                f"ax holds one statistic, and there are {len(panels)}. Choose one with"
                f" AdamStatistics(statistics=['{next(iter(panels))}'])"
            )
        figure, axes = ax.figure, [ax]
    else:
        columns = min(COLUMNS, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(3.4 * columns, 2.4 * rows), squeeze=False, layout="constrained"
        )
        axes = list(grid.flat)[: len(panels)]
        for unused in list(grid.flat)[len(panels) :]:
            unused.set_axis_off()
    for panel, (name, lines) in zip(axes, panels.items(), strict=True):
        _draw(panel, name, lines)
    if any(len(lines) > 1 for lines in panels.values()):
        axes[0].legend(fontsize="x-small")
    return figure, axes if ax is None else ax


def _lines(key: str, measurements: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """A statistic's values by scope, NaN where it was undefined."""
    keys = dict.fromkeys(
        each for values in measurements for each in values if f"{each}/".startswith(f"{key}/")
    )
    return {
        each.removeprefix(key).removeprefix("/") or "model": [
            values.get(each, math.nan) for values in measurements
        ]
        for each in keys
    }


def _draw(ax: Axes, name: str, lines: Mapping[str, list[float]]) -> None:
    for scope, values in lines.items():
        if len(values) == 1:
            ax.bar(scope, values[0], label=scope)
        else:
            ax.plot(values, label=scope)
            ax.set_xlabel("measurement", fontsize="small")
    values = [abs(value) for line in lines.values() for value in line if math.isfinite(value)]
    if min(values, default=0) > 0 and max(values) > LOG_SPAN * min(values):
        ax.set_yscale("log")
    elif STATISTICS[name].unit == "fraction":
        ax.set_ylim(0, 1.05 * max(values, default=0) or 1)
    ax.set_title(name, fontsize="medium")
    ax.set_ylabel(STATISTICS[name].unit, fontsize="small")
    ax.tick_params(labelsize="x-small")
