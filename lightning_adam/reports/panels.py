"""The panels, in their sections: drawn in a W&B workspace and in the page alike.

To add one, declare it here; a statistic of the catalogue has its panel already.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from lightning_adam.config.errors import format_override
from lightning_adam.monitor.log_keys import DENOMINATOR
from lightning_adam.reports.keys import PERCENTILE_KEYS
from lightning_adam.statistics.catalogue import STATISTICS, Statistic
from lightning_adam.statistics.histograms import QUANTITIES


class Drawing(Enum):
    """How a panel is drawn."""

    CURVES = "curves"
    EPS_CURVE = "eps_curve"
    """The share of the elements that any eps would dominate."""
    HISTOGRAM = "histogram"
    """Counts by magnitude over the steps."""
    LAYERS = "layers"
    """A statistic's value by layer and step."""
    EVENTS = "events"
    """The same, of the steps before a training blew up."""


@dataclass(frozen=True)
class Panel:
    """One picture, and all there is to say of it."""

    title: str
    meaning: str
    """In words."""
    keys: str
    """The keys it draws, as a regular expression for all of a key but its scope."""
    drawing: Drawing = Drawing.CURVES
    definition: str = ""
    """In words and the symbols of the catalogue."""
    source: str = ""
    """The paper that it is from."""
    unit: str = ""
    """What it is measured in; empty for a pure number."""
    absent: str = ""
    """What to do where a run has nothing of it."""
    matters: bool = False
    """Whether it is among those that are looked at first; all others are folded."""

    def draws(self, key: str) -> bool:
        """Whether a logged key is this panel's, whatever its scope.

        Example:
            >>> (panel,) = [panel for panel in SECTIONS["Overview"] if panel.title == "loss"]
            >>> [key for key in ("train/loss", "val/loss", "train_loss_epoch") if panel.draws(key)]
            ['train/loss', 'train_loss_epoch']
        """
        return re.fullmatch(self.keys, key) is not None


def _of(statistic: Statistic, matters: bool = False) -> Panel:
    return Panel(
        title=statistic.name,
        meaning=statistic.meaning,
        keys=statistic.key,
        definition=statistic.formula,
        source=statistic.source,
        unit=statistic.unit,
        absent="Not logged. Set "
        + format_override("adam_monitor.statistics", ["headline", statistic.name]),
        matters=matters,
    )


def _section(family: str, first: str = "", beside: Sequence[Panel] = ()) -> list[Panel]:
    """A family's statistics and what stands beside them, those that matter first."""
    statistics = [each for each in STATISTICS.values() if each.family == family]
    panels = [*(_of(each, matters=each.name == first) for each in statistics), *beside]
    return sorted(panels, key=lambda panel: not panel.matters)


NO_HISTOGRAMS = "The run has no histograms. Log to W&B, and set " + format_override(
    "adam_monitor.histograms_every_n_steps", 100
)
EPS_CURVE = Panel(
    title="eps_curve",
    meaning="The share of the active elements that each eps would dominate, at the last step that"
    " was counted: a good eps stands where the curve is still 0.",
    keys=DENOMINATOR,
    drawing=Drawing.EPS_CURVE,
    definition="share of active elements with √v̂ < ε, for every ε",
    unit="fraction",
    absent=NO_HISTOGRAMS,
    matters=True,
)


def _percentiles(quantity: str, unit: str = "") -> Panel:
    return Panel(
        title=f"{quantity} percentiles",
        meaning="What 1 %, 50 % and 99 % of the active elements are below; read off the histogram.",
        keys="|".join(PERCENTILE_KEYS[quantity]),
        definition=QUANTITIES[quantity],
        unit=unit,
        absent="Not logged. Set " + format_override("adam_monitor.histograms_every_n_steps", 100),
    )


HISTOGRAM = Panel(
    title="√v̂ histogram",
    meaning="Where the denominators stand, step by step, beside eps: below its line Adam is SGD."
    " The lowest octave of each step holds all that is smaller, zeros too.",
    keys=f"adam_histogram/({'|'.join(QUANTITIES)})",
    drawing=Drawing.HISTOGRAM,
    definition="share of the active elements in each octave",
    unit="fraction",
    absent=NO_HISTOGRAMS,
    matters=True,
)
LAYERS = Panel(
    title="layers",
    meaning="A statistic by layer and step: which layer goes its own way, and when.",
    keys="|".join(statistic.key for statistic in STATISTICS.values()),
    drawing=Drawing.LAYERS,
    absent="The run has no layers. Set "
    + format_override("adam_monitor.scopes", ["model", "layer"]),
    matters=True,
)
EVENTS = Panel(
    title="before it blew up",
    meaning="A statistic by layer, at each of the last steps before the loss jumped, something was"
    " not finite, or an exception ended the training: which layer went first.",
    keys=LAYERS.keys,
    drawing=Drawing.EVENTS,
    absent="The flight recorder has written nothing. To enable it, set "
    + format_override("adam_monitor.flight_recorder", 200),
    matters=True,
)

SECTIONS: dict[str, list[Panel]] = {
    "Overview": [
        Panel(
            title="loss",
            meaning="What is minimized.",
            keys=r"(loss|train.*loss)(_step|_epoch)?",
            absent="Not logged; write for example self.log('train/loss', loss)",
            matters=True,
        ),
        Panel(
            title="validation metric",
            meaning="What training is judged by.",
            keys=r"val(id|idation)?[/_].*",
            absent="Not logged; write for example self.log('val/loss', loss)",
            matters=True,
        ),
        _of(STATISTICS["lr"], matters=True),
    ],
    "Gradient": _section("gradient", first="grad_norm"),
    "Moments": _section(
        "moments", first="rms_ratio", beside=[_percentiles("denominator", "gradient")]
    ),
    "Underflow": _section("underflow", first="eps_energy_loss", beside=[EPS_CURVE, HISTOGRAM]),
    "Update": _section(
        "update", first="update_to_weight", beside=[_percentiles("normalized_update")]
    ),
    "Weight decay": _section("weight_decay", first="decay_to_update"),
    "Layers": [LAYERS, EVENTS],
    "Schedule": [panel for panel in _section("schedule") if panel.title != "lr"],
}
"""The panels by the section they stand in, those that matter first."""
