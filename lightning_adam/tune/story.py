"""What a search has done: its trials, what each stage came to, and the line to paste.

`search.py` knows it from the archive, `sweeper.py` puts it together, `report.py` tells it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lightning_adam.tune.point import Point

START = "start"
"""The stage of the app's own settings."""


class Outcome(str, Enum):
    """How a trial ended."""

    running = "running"
    """It has not yet."""
    complete = "complete"
    """It returned the metric."""
    stopped = "stopped"
    """It was hopeless beside the others, and stopped early; its value is the last one."""
    failed = "failed"
    """It crashed, was killed, or its metric is not finite."""


@dataclass(frozen=True)
class Trial:
    """One training: a job of the sweep, a run of W&B.

    Attributes:
        stage: The stage it was run for; `start` for the app's own settings.
        number: Its number in the study of the stage.
        point: Adam's settings.
        seed: The training's seed; None where none was typed.
        outcome: How it ended.
        value: The metric; None if it failed.
        seconds: How long it took; 0 if it was killed.
        folder: Its output folder.
        error: Why it failed, in one line.
        findings: Codes of what AdamMonitor said of it, above info.

    Example:
        >>> Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41).value
        0.41
    """

    stage: str
    number: int
    point: Point
    seed: int | None
    outcome: Outcome
    value: float | None = None
    seconds: float = 0.0
    folder: str = ""
    error: str = ""
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """A point's metric over its seeds.

    Attributes:
        point: Adam's settings.
        values: The metric of each seed that was run, in the order of the seeds.
        mean: Their mean; not finite if a training failed.
        deviation: Their standard deviation (n - 1); None for a single one.

    Example:
        >>> Score(Point(1e-3), (0.4, 0.5), 0.45, 0.0707).mean
        0.45
    """

    point: Point
    values: tuple[float, ...]
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Step:
    """What a stage came to.

    Attributes:
        stage: Its name.
        before: The incumbent it began with; for `start` the same as `after`.
        after: The incumbent it ended with.
        challenger: The best other point that was tried; None if there was none.
        gain: By how much the challenger is better than `before`, above 0 if it is, in the metric's
            units; None if either has no finite metric.
        spread: The standard error of that difference over the seeds; None with a single seed.
        words: The decision and its reason, in a sentence or two.
        dimensions: What was searched, as in `("lr",)`: fields of `Point`, or `beta1`, `beta2`.
        is_over: Whether the stage has come to its end.

    Example:
        >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
        >>> Step("start", score, score, None, None, None, "as configured").is_over
        True
    """

    stage: str
    before: Score
    after: Score
    challenger: Score | None
    gain: float | None
    spread: float | None
    words: str
    dimensions: tuple[str, ...] = ()
    is_over: bool = True


@dataclass(frozen=True)
class Story:
    """All that a report tells.

    Attributes:
        name: The study.
        job: The app's name.
        direction: `minimize` or `maximize`.
        n_trials: The budget, in trainings.
        n_seeds: Seeds that a point is confirmed with.
        steps: What each stage came to, in order, `start` first.
        trials: Every training, in the order they were begun.
        skipped: Stages that were left out, with the reason.
        overrides: What to type for the incumbent, as words of Hydra's command line.
        fixed: What was typed by the user for every trial.
        is_over: Whether the search has come to its end.

    Example:
        >>> Story("mnist", "mnist", "maximize", 20, 2, [], []).is_over
        False
    """

    name: str
    job: str
    direction: str
    n_trials: int
    n_seeds: int
    steps: Sequence[Step]
    trials: Sequence[Trial]
    skipped: dict[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    fixed: Sequence[str] = ()
    is_over: bool = False

    @property
    def start(self) -> Point:
        """The app's own settings; one without a learning rate as long as no stage has begun.

        Example:
            >>> Story("mnist", "mnist", "maximize", 20, 2, [], []).start.lr
            nan
        """
        return self.steps[0].after.point if self.steps else Point(math.nan)

    @property
    def stages(self) -> list[str]:
        """The stages that trials were run for, in the order in which they began.

        Example:
            >>> trial = Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41)
            >>> Story("mnist", "mnist", "maximize", 20, 2, [], [trial]).stages
            ['lr']
        """
        return list(dict.fromkeys(each.stage for each in self.trials))

    @property
    def incumbent(self) -> Score:
        """The best point, confirmed.

        Example:
            >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
            >>> step = Step("start", score, score, None, None, None, "as configured")
            >>> Story("mnist", "mnist", "maximize", 20, 2, [step], []).incumbent.mean
            0.4
        """
        return self.steps[-1].after

    @property
    def failures(self) -> dict[str, list[Trial]]:
        """The trials that failed, by what is said of it.

        Example:
            >>> trial = Trial("lr", 3, Point(1e-3), 0, Outcome.failed, error="out of memory")
            >>> list(Story("mnist", "mnist", "maximize", 20, 2, [], [trial]).failures)
            ['out of memory']
        """
        failed = [each for each in self.trials if each.outcome is Outcome.failed]
        return {
            error: [each for each in failed if each.error == error]
            for error in dict.fromkeys(each.error for each in failed)
        }

    @property
    def findings(self) -> dict[str, list[Trial]]:
        """The trials of which AdamMonitor found something, by what it found.

        Example:
            >>> found = ("eps_too_large",)
            >>> trial = Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41, findings=found)
            >>> list(Story("mnist", "mnist", "maximize", 20, 2, [], [trial]).findings)
            ['eps_too_large']
        """
        codes = dict.fromkeys(code for each in self.trials for code in each.findings)
        return {code: [each for each in self.trials if code in each.findings] for code in codes}

    def of_stage(self, stage: str) -> list[Trial]:
        """The trials that were run for a stage.

        Example:
            >>> trial = Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41)
            >>> len(Story("mnist", "mnist", "maximize", 20, 2, [], [trial]).of_stage("lr"))
            1
        """
        return [each for each in self.trials if each.stage == stage]

    def of_incumbent(self, step: Step) -> list[Trial]:
        """The trials of what a stage began with, which were run for stages before it.

        Example:
            >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
            >>> start, lr = (Step(name, score, score, None, None, None, "") for name in ("a", "b"))
            >>> trials = [Trial("a", 0, Point(1e-3), 0, Outcome.complete, 0.4)]
            >>> story = Story("mnist", "mnist", "maximize", 20, 2, [start, lr], trials)
            >>> len(story.of_incumbent(lr))
            1
        """
        names = [each.stage for each in self.steps]
        earlier = names[: names.index(step.stage)]
        return [
            each
            for each in self.trials
            if each.stage in earlier and each.point == step.before.point
        ]


def seconds_of(trials: Iterable[Trial]) -> float:
    """How long trials took together.

    Example:
        >>> seconds_of([Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41, seconds=4.5)])
        4.5
    """
    return sum(each.seconds for each in trials)


def sign_of(direction: str) -> float:
    """What a metric is multiplied by, so that less is better.

    Example:
        >>> sign_of("maximize")
        -1.0
    """
    return 1.0 if direction == "minimize" else -1.0
