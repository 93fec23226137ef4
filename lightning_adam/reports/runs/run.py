"""`Run`: what a training run has logged."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_adam.findings.finding import Finding
from lightning_adam.statistics.histograms import Histogram


class Series(NamedTuple):
    """The values of a key by step; each step occurs once."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Event(NamedTuple):
    """A failure that the flight recorder has written: the steps before it."""

    step: int
    """The optimizer step."""
    reason: str
    series: dict[str, Series]
    """By key, for the model and the layers."""

    def __str__(self) -> str:
        """Its label in the report.

        Example:
            >>> print(Event(1200, "loss_spike", {}))
            loss_spike at step 1,200
        """
        return f"{self.reason} at step {self.step:,}"


@dataclass(frozen=True)
class Run:
    """What a run has logged."""

    name: str
    path: Path
    config: dict[str, Any]
    series: dict[str, Series]
    """By key. Rows of the layer table are included, under the keys of their layers."""
    histograms: dict[str, dict[int, Histogram]]
    """By key and step."""
    notes: list[str]
    """What could not be read, one sentence each."""
    events: list[Event] = field(default_factory=list)
    """In the order of their steps."""
    findings: list[Finding] | None = None
    """In the order of their steps; None if rules were disabled, or nothing was stored."""
    tensors: dict[str, dict[int, str]] = field(default_factory=dict)
    """Names of the tensors with the largest values, by the key of the values and step."""
    source: str = ""
    """Where it was read from: `W&B`, `CSVLogger`, `TensorBoard`, or `checkpoint`."""
    times: Series | None = None
    """Unix time in seconds by step; None if the logger stores none."""
    seconds: float | None = None
    """Wall time; None if it is not known."""
    measurements: int | None = None
    """Number of measurements of AdamMonitor; None if there are none."""
    has_ended: bool = True
    """False while the run trains, or if it was killed."""

    @property
    def is_monitored(self) -> bool:
        """Whether AdamMonitor has logged anything."""
        logged = any(key.startswith("adam_") for key in [*self.series, *self.histograms])
        return logged or bool(self.events)

    @property
    def last_step(self) -> int | None:
        """The last logged step; None if nothing is logged yet."""
        return max((int(each.steps[-1]) for each in self.series.values()), default=None)
