"""The requests for training runs of a search, and the runs."""

import math
from dataclasses import dataclass
from enum import Enum

from lightning_adam.tune.configuration import Configuration

MIN_LENGTH = 1 / 8
"""The shortest length of a run, as a fraction of a full run."""
MAX_ATTEMPTS = 2
"""Attempts at a run that its launcher loses each time."""


class Stage(str, Enum):
    """The purpose of a run, in the order of the search."""

    start = "start"
    """The configuration of the app, once."""
    ladder = "ladder"
    """Learning rates half a decade apart in short runs, and the best of them in longer runs."""
    search = "search"
    """Configurations that the Gaussian process proposes."""
    race = "race"
    """The best configuration and the app's with fresh seeds."""


class Outcome(str, Enum):
    """How a run ended."""

    running = "running"
    """Not ended yet."""
    complete = "complete"
    """With a finite metric."""
    failed = "failed"
    """With an error, or with a metric that is not finite."""


@dataclass(frozen=True)
class Request:
    """A run to start.

    Attributes:
        stage: Its purpose.
        configuration: The hyperparameters.
        length: Fraction of a full run's steps, above 0 and at most 1 (default: 1).
        replicate: Index of its seed; 0 for all runs before the race (default: 0).
        attempt: 2 if the launcher lost the first attempt (default: 1).

    Example:
        >>> Request(Stage.ladder, Configuration(1e-3), length=0.125).replicate
        0
    """

    stage: Stage
    configuration: Configuration
    length: float = 1.0
    replicate: int = 0
    attempt: int = 1

    @property
    def key(self) -> tuple[Configuration, float, int]:
        """Identifies a run: requests with the same key are the same run."""
        return self.configuration, self.length, self.replicate


@dataclass(frozen=True)
class Run:
    """A training run of a search.

    Attributes:
        request: The request.
        number: Its number in the Optuna study.
        outcome: How it ended.
        value: The metric that the app returned; None unless it is complete.
        seed: Its seed; None if the app has none.
        seconds: Its duration in seconds; 0 if it was killed.
        folder: Its output folder.
        error: Why it failed, in one line.
        is_lost: Whether its process was killed.
        is_given_up: Whether the launcher lost only this run, and the search continued.
        findings: Codes of the findings of AdamMonitor above info.
        steps: Optimizer steps of a full run; None if unknown.
        fixed_length: Why the run could not be shortened; empty if it could.
        state_dtypes: The dtypes of the trained parameters, such as `bfloat16`.
        owner: The process that requested it.

    Example:
        >>> Run(Request(Stage.start, Configuration(1e-3)), 0, Outcome.complete, 0.41).loss(-1.0)
        -0.41
    """

    request: Request
    number: int
    outcome: Outcome
    value: float | None = None
    seed: int | None = None
    seconds: float = 0.0
    folder: str = ""
    error: str = ""
    is_lost: bool = False
    is_given_up: bool = False
    findings: tuple[str, ...] = ()
    steps: int | None = None
    fixed_length: str = ""
    state_dtypes: tuple[str, ...] = ()
    owner: str = ""

    @property
    def is_retried(self) -> bool:
        """Whether the run is started again, because its process was killed."""
        return self.is_lost and (not self.is_given_up or self.request.attempt < MAX_ATTEMPTS)

    def loss(self, sign: float) -> float:
        """Returns the metric times `sign`, so that lower is better; nan without a metric."""
        return math.nan if self.value is None else sign * self.value
