"""`Cadence`: which optimizer steps are measured. It depends only on the step."""

import sys
from dataclasses import dataclass
from typing import NamedTuple

from lightning_adam.optim.steps import next_due


class Due(NamedTuple):
    """What to log at a step."""

    statistics: bool = False
    histograms: bool = False


@dataclass(frozen=True)
class Cadence:
    """Decides at which optimizer steps statistics and histograms are due: the first and every n-th.

    Args:
        every_n_steps: Interval of the statistics; 0 or None for never.
        histograms_every_n_steps: Interval of the histograms; 0 or None for never.

    Example:
        >>> cadence = Cadence(50, 75)
        >>> cadence.next_step(0), cadence.next_step(1), cadence.next_step(50)
        (1, 50, 75)
    """

    every_n_steps: int | None
    histograms_every_n_steps: int | None

    def next_step(self, step: int) -> int:
        """Returns the first step after `step` at which anything is due."""
        intervals = [*filter(None, (self.every_n_steps, self.histograms_every_n_steps))]
        return min((next_due(step, each) for each in intervals), default=sys.maxsize)

    def due(self, step: int, since: int | None = None) -> Due:
        """Returns what is due at a step.

        Args:
            step: The optimizer step, counted from 1.
            since: The last step before it for which everything due is logged (default: `step - 1`).

        Example:
            >>> Cadence(50, 75).due(100), Cadence(50, 75).due(101, since=99)
            (Due(statistics=True, histograms=False), Due(statistics=True, histograms=False))
        """
        since = step - 1 if since is None else since
        intervals = (self.every_n_steps, self.histograms_every_n_steps)
        return Due(*(bool(each) and next_due(since, each or 1) <= step for each in intervals))
