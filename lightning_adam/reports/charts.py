"""The charts of a report by section, for the HTML page and the W&B workspace.

Every statistic of the catalogue has a chart. To add another chart, declare it here.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from lightning_adam.config.errors import format_override
from lightning_adam.findings import RULES
from lightning_adam.monitor.log_keys import DENOMINATOR
from lightning_adam.reports.keys import PERCENTILE_KEYS
from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.histograms import QUANTITIES


class ChartKind(Enum):
    """How a chart is drawn."""

    CURVES = "curves"
    """Values over the steps."""
    EPS_CURVE = "eps_curve"
    """The fraction of elements that each eps would dominate."""
    HISTOGRAM = "histogram"
    """Counts by magnitude and step."""
    LAYERS = "layers"
    """Values of a statistic by layer and step."""
    EVENTS = "events"
    """Values of a statistic by layer, at the steps before a failure."""


@dataclass(frozen=True)
class Settings:
    """The settings of Adam on which reference values depend; NaN if unknown."""

    beta1: float = math.nan
    beta2: float = math.nan
    eps: float = math.nan

    @classmethod
    def of(cls, optimizer: Mapping[str, Any]) -> "Settings":
        """Returns the settings of an optimizer in the config of a run.

        Example:
            >>> Settings.of({"betas": [0.9, 0.999], "eps": 1e-8})
            Settings(beta1=0.9, beta2=0.999, eps=1e-08)
        """
        beta1, beta2 = optimizer.get("betas") or (math.nan, math.nan)
        return cls(float(beta1), float(beta2), float(optimizer.get("eps") or math.nan))


@dataclass(frozen=True)
class Reference:
    """A horizontal line to compare a curve with."""

    label: str
    value: float | Callable[[Settings], float]
    """The value, or a function of the settings of a run."""
    code: str = ""
    """The rule with this threshold; empty for a healthy value or a noise level."""

    def at(self, settings: Settings = Settings()) -> float:
        """Returns the value for some settings; NaN if they are unknown.

        Example:
            >>> REFERENCES["signal_fraction"][0].at(Settings(beta1=0.5))
            0.333...
        """
        return self.value(settings) if callable(self.value) else self.value


REFERENCES = {
    "clip_coefficient": [Reference("not clipped", 1.0)],
    "exp_avg_carryover": [Reference("β1: constant gradient", lambda run: run.beta1)],
    "grad_momentum_cosine": [Reference("noise", 0.0)],
    "signal_fraction": [Reference("noise", lambda run: (1 - run.beta1) / (1 + run.beta1))],
    "rms_ratio": [Reference("healthy", 1.0)],
    "rms_ratio_max": [Reference("bound 1/√(1-β2)", lambda run: (1 - run.beta2) ** -0.5)],
    "amsgrad_gap": [Reference("no effect", 1.0)],
    "denominator_mean": [Reference("eps", lambda run: run.eps)],
    "eps_damping": [Reference("no effect", 1.0)],
    "normalized_update_rms": [
        Reference("noise", lambda run: math.sqrt((1 - run.beta1) / (1 + run.beta1)))
    ],
    "update_to_weight": [Reference("rule of thumb", 1e-3)],
    "equilibrium_ratio": [Reference("equilibrium", 1.0)],
}
"""Healthy values and noise levels by statistic. `thresholds` returns the thresholds of rules."""
LOG_UNITS = ("gradient", "gradient²", "weight")
"""Units of values that span decades in any model."""
LOG_RATIOS = (
    "decay_timescale",
    "decay_to_grad",
    "decay_to_update",
    "equilibrium_ratio",
    "loss_scale",
    "update_to_weight",
    "update_to_weight_max",
)
"""Ratios that span decades."""
SIGNED = ("exp_avg_mean",)
"""Signed statistics, which need a linear axis."""


@dataclass(frozen=True)
class Chart:
    """A chart and its explanation."""

    id: str
    """Unique; part of links to it."""
    title: str
    meaning: str
    """Explanation in words."""
    keys: str
    """The keys to draw: a regular expression that matches the whole key without its scope."""
    kind: ChartKind = ChartKind.CURVES
    definition: str = ""
    """Definition in the symbols of the catalogue."""
    source: str = ""
    """The paper that defines it."""
    unit: str = ""
    """Unit of the values; empty for a pure number."""
    is_log: bool = False
    """Whether the axis of the values, or the color scale, is logarithmic."""
    references: tuple[Reference, ...] = ()
    """Healthy values, noise levels and thresholds."""
    missing: str = ""
    """What to do if a run has none of the keys."""
    is_pinned: bool = False
    """Whether the chart is always visible; the others of its section are collapsed."""

    def draws(self, key: str) -> bool:
        """Returns whether the chart draws a key, given without its scope.

        Example:
            >>> (loss,) = [chart for chart in SECTIONS["Overview"] if chart.id == "loss"]
            >>> [key for key in ("train/loss", "val/loss", "train_loss_epoch") if loss.draws(key)]
            ['train/loss', 'train_loss_epoch']
        """
        return re.fullmatch(self.keys, key) is not None

    def of_key(self, key: str, is_pinned: bool = True) -> "Chart":
        """Returns the chart of a single key that the module logs, with the key as its title."""
        return replace(self, id=key, title=key, keys=re.escape(key), is_pinned=is_pinned)


def is_logarithmic(statistic: Statistic) -> bool:
    """Returns whether a statistic is drawn on a logarithmic axis.

    Example:
        >>> is_logarithmic(STATISTICS["grad_norm"]), is_logarithmic(STATISTICS["lr"])
        (True, False)
    """
    spans_decades = statistic.unit in LOG_UNITS or statistic.name in LOG_RATIOS
    return spans_decades and statistic.name not in SIGNED


def thresholds(statistic: str, settings: Mapping[str, Any] | None = None) -> list[Reference]:
    """Returns the thresholds of the rules on a statistic.

    Args:
        statistic: Its name.
        settings: The settings of rules in a run, `adam_monitor.findings` (default: none).

    Example:
        >>> [(each.code, each.value) for each in thresholds("update_to_weight")]
        [('learning_rate_too_small', 0.0001), ('learning_rate_too_large', 0.03)]
    """
    found = []
    for code, rule in RULES.items():
        own = (settings or {}).get(code) or {}
        if statistic in rule.limits and own.get("severity") != "off":
            name = rule.limits[statistic]
            value = float(own.get(name, rule.thresholds[name]))
            found.append(Reference(code, value, code))
    return found


PINNED = (
    *("grad_norm", "rms_ratio", "rms_ratio_max", "grad_momentum_cosine"),
    *("eps_energy_loss", "update_lost_fraction"),
    *("update_to_weight", "normalized_update_rms", "decay_to_update", "weight_norm"),
    "lr",
)
"""The statistics with charts that are always visible."""


def _of(statistic: Statistic) -> Chart:
    override = format_override("adam_monitor.statistics", ["headline", statistic.name])
    return Chart(
        id=statistic.name,
        title=statistic.name,
        meaning=statistic.meaning,
        keys=statistic.key,
        definition=statistic.formula,
        source=statistic.source,
        unit=statistic.unit,
        is_log=is_logarithmic(statistic),
        references=(*REFERENCES.get(statistic.name, ()), *thresholds(statistic.name)),
        missing=f"Not logged. Set {override}",
        is_pinned=statistic.name in PINNED,
    )


def _section(*families: str, others: Sequence[Chart] = ()) -> list[Chart]:
    """Returns the charts of some families and others, pinned charts first."""
    statistics = [each for each in STATISTICS.values() if each.family in families]
    charts = [*map(_of, statistics), *others]
    return sorted(charts, key=lambda chart: not chart.is_pinned)


def _percentiles(quantity: str, unit: str = "", *references: Reference) -> Chart:
    return Chart(
        id=f"{quantity}_percentiles",
        title=f"{quantity} percentiles",
        meaning="1st, 50th and 99th percentile of the active elements, from the histogram.",
        keys="|".join(PERCENTILE_KEYS[quantity]),
        definition=QUANTITIES[quantity],
        unit=unit,
        is_log=True,
        references=references,
        missing="Not logged. Set " + format_override("adam_monitor.histograms_every_n_steps", 100),
    )


NO_HISTOGRAMS = "No histograms. Log to W&B or TensorBoard, and set " + format_override(
    "adam_monitor.histograms_every_n_steps", 100
)
EPS = REFERENCES["denominator_mean"][0]
EPS_CURVE = Chart(
    id="eps_curve",
    title="Elements dominated by eps",
    meaning="Fraction of the active elements with √v̂ below eps, for every eps, in the last"
    " histogram. A good eps is where the curve is still 0.",
    keys=DENOMINATOR,
    kind=ChartKind.EPS_CURVE,
    definition="fraction of active elements with √v̂ < ε",
    unit="fraction",
    missing=NO_HISTOGRAMS,
    is_pinned=True,
)
HISTOGRAM = Chart(
    id="histogram",
    title="Histogram of √v̂",
    meaning="The distribution of the denominators. Below the line of eps, Adam acts like SGD. The"
    " lowest octave of a step contains everything smaller, including zeros.",
    keys=f"adam_histogram/({'|'.join(QUANTITIES)})",
    kind=ChartKind.HISTOGRAM,
    definition="fraction of active elements in each octave",
    unit="fraction",
    is_log=True,
    missing=NO_HISTOGRAMS,
    is_pinned=True,
)
LAYERS = Chart(
    id="layers",
    title="Layers",
    meaning="A statistic by layer and step, which shows the layer that differs and since when."
    " Select a layer to see its curve.",
    keys="|".join(statistic.key for statistic in STATISTICS.values()),
    kind=ChartKind.LAYERS,
    missing="No layers. Set " + format_override("adam_monitor.scopes", ["model", "layer"]),
    is_pinned=True,
)
EVENTS = Chart(
    id="events",
    title="Last steps before the failure",
    meaning="A statistic by layer at the last steps before a loss spike, a NaN or infinite value,"
    " or an exception. It shows which layer diverged first.",
    keys=LAYERS.keys,
    kind=ChartKind.EVENTS,
    missing="No recording. Set " + format_override("adam_monitor.flight_recorder", 200),
    is_pinned=True,
)
LOSS = Chart(
    id="loss",
    title="Training loss",
    meaning="The training loss.",
    keys=r"(loss|train.*loss)(_step|_epoch)?",
    missing="Not logged. Use for example self.log('train/loss', loss)",
    is_pinned=True,
)
VALIDATION = Chart(
    id="validation",
    title="Validation metrics",
    meaning="A metric on the validation data.",
    keys=r"val(id|idation)?[/_].*",
    missing="Not logged. Use for example self.log('val/loss', loss)",
    is_pinned=True,
)

SECTIONS: dict[str, list[Chart]] = {
    "Overview": [LOSS, VALIDATION, _of(STATISTICS["lr"])],
    "Gradient and moments": _section(
        "gradient", "moments", others=[_percentiles("denominator", "gradient", EPS)]
    ),
    "Underflow": _section("underflow", others=[EPS_CURVE, HISTOGRAM]),
    "Update and weight decay": _section(
        "update", "weight_decay", others=[_percentiles("normalized_update")]
    ),
    "Layers": [LAYERS, EVENTS],
    "Schedule": [chart for chart in _section("schedule") if chart.id != "lr"],
}
"""The charts by section, pinned charts first."""
