"""What a search asks for and what it knows: requests for training runs, and the runs."""

import math
from dataclasses import dataclass
from enum import Enum

from lightning_adam.tune.configuration import Configuration

SHORTEST = 1 / 8
"""The shortest length of a run, as a share of a full one."""
MAX_ATTEMPTS = 2
"""How often a run is started that its launcher loses each time."""


class Stage(str, Enum):
    """What a run is for, in the order of the search."""

    start = "start"
    """The configuration of the app, once."""
    ladder = "ladder"
    """Learning rates half a decade apart, in short runs; the best of them in longer ones."""
    search = "search"
    """Configurations that the Gaussian process proposes."""
    race = "race"
    """The best configuration and the start with fresh seeds."""


class Outcome(str, Enum):
    """How a run ended."""

    running = "running"
    """It has not."""
    complete = "complete"
    """With a finite metric."""
    failed = "failed"
    """With an error, or with a metric that is not finite."""


@dataclass(frozen=True)
class Request:
    """A run to start.

    Attributes:
        stage: What it is for.
        configuration: The hyperparameters.
        length: Its share of a full run's steps, above 0 and at most 1 (default: 1).
        replicate: Index of its seed; all runs before the race have 0 (default: 0).
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
        """What makes two runs the same run.

        Example:
            >>> Request(Stage.start, Configuration(1e-3)).key[1:]
            (1.0, 0)
        """
        return self.configuration, self.length, self.replicate


@dataclass(frozen=True)
class Run:
    """A training run of a search.

    Attributes:
        request: What was asked for.
        number: Its number in the Optuna study.
        outcome: How it ended.
        value: The metric that the app returned; None unless it is complete.
        seed: The seed that was set; None if the app has none.
        seconds: Its duration; 0 if it was killed.
        folder: Its output folder.
        error: Why it failed, in one line.
        is_lost: Whether its process was killed.
        is_given_up: Whether its launcher lost it, rather than that the whole search was killed.
        findings: Codes of the findings of AdamMonitor above info.
        steps: Optimizer steps of a full run; None if they are not known.
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
        """Whether the run is started again, since its process was killed.

        Example:
            >>> request = Request(Stage.start, Configuration(1e-3))
            >>> Run(request, 0, Outcome.failed, is_lost=True).is_retried
            True
        """
        return self.is_lost and (not self.is_given_up or self.request.attempt < MAX_ATTEMPTS)

    def loss(self, sign: float) -> float:
        """The metric with the sign by which less is better; nan without a metric.

        Example:
            >>> Run(Request(Stage.start, Configuration(1e-3)), 0, Outcome.failed).loss(1.0)
            nan
        """
        return math.nan if self.value is None else sign * self.value
