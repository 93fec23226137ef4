"""`Run`: the logged data of a training run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_adam.findings.finding import Finding
from lightning_adam.statistics.histograms import Histogram


class Series(NamedTuple):
    """The values of a key by step. Steps are unique and sorted."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Event(NamedTuple):
    """A failure recorded by the flight recorder, with the steps before it."""

    step: int
    """The optimizer step."""
    reason: str
    series: dict[str, Series]
    """Values by key, for the model and the layers."""

    def __str__(self) -> str:
        """Returns the label in the report.

        Example:
            >>> print(Event(1200, "loss_spike", {}))
            loss_spike at step 1,200
        """
        return f"{self.reason} at step {self.step:,}"


@dataclass(frozen=True)
class Run:
    """The logged data of a run."""

    name: str
    path: Path
    config: dict[str, Any]
    series: dict[str, Series]
    """Values by key, including those of the layer table."""
    histograms: dict[str, dict[int, Histogram]]
    """Histograms by key and step."""
    notes: list[str]
    """Sentences about missing or damaged data."""
    events: list[Event] = field(default_factory=list)
    """Sorted by step."""
    findings: list[Finding] | None = None
    """Sorted by step; None if rules were disabled or nothing is stored."""
    tensors: dict[str, dict[int, str]] = field(default_factory=dict)
    """Names of the tensors with the largest values, by key and step."""
    source: str = ""
    """The logger, `W&B`, `CSVLogger` or `TensorBoard`, or `checkpoint`."""
    times: Series | None = None
    """Unix time in seconds by step; None if not logged."""
    seconds: float | None = None
    """Wall time in seconds; None if unknown."""
    measurements: int | None = None
    """Number of measurements by AdamMonitor; None if there are none."""
    has_ended: bool = True
    """False while the run is training, or if it was killed."""

    @property
    def is_monitored(self) -> bool:
        """Whether AdamMonitor has logged anything."""
        logged = any(key.startswith("adam_") for key in [*self.series, *self.histograms])
        return logged or bool(self.events)

    @property
    def last_step(self) -> int | None:
        """The last logged step; None if there is none."""
        return max((int(each.steps[-1]) for each in self.series.values()), default=None)
