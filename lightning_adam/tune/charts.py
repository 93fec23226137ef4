"""A story as pictures: what is drawn where, before anybody paints it."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_adam.tune.decision import told
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.point import Point
from lightning_adam.tune.scale import LARGEST, Scale, Tick, scale_of
from lightning_adam.tune.story import Outcome, Score, Step, Story, Trial, sign_of
from lightning_adam.tune.wording import searched_value

TOP, BOTTOM, LEFT, RIGHT = 34, 42, 62, 14
"""What is left free around a picture for what is written, in pixels."""
END = 26
"""How wide what the search has come to is drawn behind the trials."""
SLOT = 46
"""The room of a value that has no place on a logarithmic axis."""
DECADES = 2
"""From how many on the metric is drawn on a logarithmic axis."""
OUTLYING = 5
"""By how many times the distance of the best a metric may be worse than the worst quarter begins,
and still have a place on the axis."""
FEW = 5
"""Metrics of which it cannot be told what is usual."""


@dataclass(frozen=True)
class Mark:
    """A training in a picture.

    Attributes:
        trial: The training.
        x: Where it stands, from the left.
        y: From the top.
        shape: An outcome, `beyond` if the metric is too bad for the axis, or `incumbent`.
        colour: The number of the stage's colour.
    """

    trial: Trial
    x: float
    y: float
    shape: str
    colour: int


@dataclass(frozen=True)
class Level:
    """A metric over a stretch, with what it varies by.

    Attributes:
        first: Where it begins, from the left.
        last: Where it ends.
        y: The mean, from the top.
        low: Where the worse end of its spread is; None without one.
        high: The better end.
        said: The number.
    """

    first: float
    last: float
    y: float
    low: float | None
    high: float | None
    said: str


@dataclass(frozen=True)
class Label:
    """A word at a place; at an edge it is written inwards."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: What it shows.
        description: The same in a sentence, for those who cannot see it.
        x_title: What the horizontal axis is.
        y_title: What the vertical one is.
        slots: Values that have no place on the horizontal axis, to the left of it.
        lines: Places that are joined, from left to right or from seed to seed.
        edges: Where stages begin.
        rings: Places that are singled out.
    """

    title: str
    description: str
    x_title: str
    y_title: str
    width: int
    height: int
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark]
    levels: Sequence[Level] = ()
    slots: Sequence[Tick] = ()
    lines: Sequence[Sequence[tuple[float, float]]] = ()
    edges: Sequence[float] = ()
    rings: Sequence[tuple[float, float]] = ()
    labels: Sequence[Label] = ()

    @property
    def floor(self) -> int:
        """Where the horizontal axis is, from the top."""
        return self.height - BOTTOM

    @property
    def left(self) -> int:
        """Where the vertical axis is, from the left."""
        return LEFT

    @property
    def top(self) -> int:
        """Where the drawing begins, from the top."""
        return TOP

    @property
    def right(self) -> int:
        """Where the drawing ends, from the left."""
        return self.width - RIGHT


def path_chart(story: Story) -> Chart:
    """Every training in the order of their beginning, and the incumbent over them.

    Args:
        story: The story.

    Example:
        >>> trial = Trial("start", 0, Point(1e-3), 0, Outcome.complete, 0.4)
        >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
        >>> steps = [Step("start", score, score, None, None, None, "")]
        >>> chart = path_chart(Story("mnist", "mnist", "minimize", 20, 2, steps, [trial]))
        >>> len(chart.marks), chart.levels[0].said
        (1, '0.4')
    """
    width, height = 1200, 330
    heights = _Heights(story, story.trials, [each.after for each in story.steps], height)
    # A training is as wide as another, however few have begun.
    count = max(story.n_trials, len(story.trials), 1)
    along = Scale(0.0, float(count), float(LEFT), float(width - RIGHT - END), is_log=False)
    middles = {id(each): along.place(n + 0.5) for n, each in enumerate(story.trials)}
    colours = colours_of(story)
    levels, edges, labels = [], [], []
    for place, step in enumerate(story.steps):
        numbers = [n for n, each in enumerate(story.trials) if each.stage == step.stage]
        if not numbers:
            continue
        first, last = along.place(min(numbers)), along.place(max(numbers) + 1)
        edges.append(first)
        # Names of narrow stages would stand in each other.
        row = place % 2 if any(_is_narrow(story, each) for each in story.steps) else 0
        labels.append(Label((first + last) / 2, 13 + 13 * row, step.stage))
        level = heights.level(step.before, first, last)
        levels += [level] if level else []
    if story.steps and levels:
        end = along.place(len(story.trials))
        level = heights.level(story.incumbent, end, end + END)
        levels += [level] if level else []
    marks = [
        heights.mark(each, middles[id(each)], colours.get(each.stage, 0)) for each in story.trials
    ]
    numbers = sorted({1, *range(5 * math.ceil(count / 60), count + 1, 5 * math.ceil(count / 60))})
    return Chart(
        title="The path",
        description=f"The metric of {len(story.trials)} trials in the order they were begun, and"
        " that of the best settings after each stage; the table of all trials has the numbers.",
        x_title="trial",
        y_title=heights.title,
        width=width,
        height=height,
        x_ticks=[Tick(along.place(each - 0.5), str(each)) for each in numbers],
        y_ticks=heights.scale.ticks(),
        marks=marks,
        levels=levels,
        lines=[
            [(one.last, one.y), (other.first, other.y)] for one, other in itertools.pairwise(levels)
        ],
        edges=edges,
        labels=labels,
    )


def response_charts(story: Story) -> list[Chart]:
    """Of each stage and each of its dimensions the metric against the value.

    Args:
        story: The story.

    Example:
        >>> trial = Trial("lr", 0, Point(1e-2), 0, Outcome.complete, 0.3)
        >>> score = Score(Point(1e-3), (0.4,), 0.4, None)
        >>> steps = [Step("lr", score, score, None, None, None, "", ("lr",))]
        >>> (chart,) = response_charts(Story("mnist", "mnist", "minimize", 20, 2, steps, [trial]))
        >>> chart.title, chart.x_title
        ('lr', 'learning rate')
    """
    return [_response(story, step, name) for step in story.steps for name in step.dimensions]


def colours_of(story: Story) -> dict[str, int]:
    """The number of each stage's colour.

    Example:
        >>> trial = Trial("lr", 0, Point(1e-2), 0, Outcome.complete, 0.3)
        >>> colours_of(Story("mnist", "mnist", "minimize", 20, 2, [], [trial]))
        {'lr': 0}
    """
    stages = [*(each.stage for each in story.steps), *(each.stage for each in story.trials)]
    return {stage: number for number, stage in enumerate(dict.fromkeys(stages))}


def _response(story: Story, step: Step, name: str) -> Chart:
    width, height = 420, 270
    before, trials = story.of_incumbent(step), story.of_stage(step.stage)
    shown = [*before, *trials]
    heights = _Heights(story, shown, [step.before, step.after], height)
    points = [*(each.point for each in shown), step.before.point, step.after.point]
    widths = _Widths(name, points, width)
    colour = colours_of(story)[step.stage]
    marks = [heights.mark(each, widths.place(each.point), colour, "incumbent") for each in before]
    marks += [heights.mark(each, widths.place(each.point), colour) for each in trials]
    level = heights.level(step.before, float(LEFT), float(width - RIGHT))
    singled = _singled(step)
    rings, labels = [], []
    for point, said in singled.items():
        ends = [each for each in marks if each.trial.point == point and each.shape in DRAWN]
        if ends:
            top = min(ends, key=lambda each: each.y)
            is_end = step.is_over and point == step.after.point
            rings += [(each.x, each.y) for each in ends if is_end]
            labels.append(_label(top, said, width))
    title = step.stage if step.dimensions == (name,) else f"{step.stage}: {name}"
    best, axis = step.challenger, DIMENSIONS[name].axis
    description = f"The metric of {len(trials)} trials against {axis}. " + (
        f"The best tried is {searched_value(name, best.point)}, with {told(best)}; " if best else ""
    )
    return Chart(
        title=title,
        description=f"{description}the stage began with"
        f" {searched_value(name, step.before.point)}, with {told(step.before)}.",
        x_title=axis,
        y_title=heights.title,
        width=width,
        height=height,
        x_ticks=widths.ticks,
        y_ticks=heights.scale.ticks(),
        marks=marks,
        levels=[level] if level else [],
        slots=widths.slots,
        lines=[*_curve(step, marks), *_seeds(marks)],
        rings=rings,
        labels=labels,
    )


DRAWN = {Outcome.complete.value, Outcome.stopped.value, "incumbent", "beyond"}
"""The shapes of marks that stand where their metric is."""


def _singled(step: Step) -> dict[Point, str]:
    """The points of a stage that are named in its picture."""
    before, after = step.before.point, step.after.point
    if after != before:
        return {before: "began here", after: "taken"}
    if step.is_over:
        return {before: "stays"}
    best = step.challenger.point if step.challenger else before
    return {before: "began here", best: "best so far"} if best != before else {before: "began here"}


def _label(mark: Mark, text: str, width: int) -> Label:
    """Beside a mark, where there is room."""
    y = mark.y - 13 if mark.y > TOP + 16 else mark.y + 23
    if mark.x > width - RIGHT - 40:
        return Label(width - RIGHT, y, text, "end")
    if mark.x < LEFT + 40:
        return Label(LEFT + 4, y, text, "start")
    return Label(mark.x, y, text)


def _curve(step: Step, marks: Sequence[Mark]) -> Iterator[list[tuple[float, float]]]:
    """The first training of each point, joined; only if nothing else differs between them."""
    first = {each.trial.point: each for each in reversed(marks)}
    # One that was stopped has not come as far as the others.
    ends = sorted(
        (each.x, each.y)
        for each in first.values()
        if each.shape in DRAWN and each.trial.outcome is Outcome.complete
    )
    if len(step.dimensions) == 1 and len({x for x, _ in ends}) > 2:
        yield ends


def _seeds(marks: Sequence[Mark]) -> Iterator[list[tuple[float, float]]]:
    """The trainings of a point, joined."""
    for point in dict.fromkeys(each.trial.point for each in marks):
        ends = [
            (each.x, each.y) for each in marks if each.trial.point == point and each.shape in DRAWN
        ]
        if len(ends) > 1:
            yield sorted(ends, key=lambda end: end[1])


def _is_narrow(story: Story, step: Step) -> bool:
    most = max(story.n_trials, len(story.trials))
    return len(story.of_stage(step.stage)) / most * 1100 < 9 * len(step.stage)


class _Heights:
    """Where metrics stand: a picture's vertical axis."""

    def __init__(
        self, story: Story, trials: Sequence[Trial], scores: Sequence[Score], height: int
    ) -> None:
        is_less = story.direction == "minimize"
        self._sign = sign_of(story.direction)
        values = [each.value for each in trials if _has_metric(each) and each.value is not None]
        means = [each.mean for each in scores if math.isfinite(each.mean)]
        known = [each for each in [*values, *means] if abs(each) < LARGEST]
        is_log = (
            bool(known)
            and min(known) > 0
            and math.log10(max(known)) - math.log10(min(known)) >= DECADES
        )
        self.title = f"metric, {'less' if is_less else 'more'} is better"
        # Failures have a row of their own, behind the worst.
        bottom, top = float(height - BOTTOM), float(TOP)
        self.worst_edge = top + 4 if is_less else bottom - 6
        self.best_edge = bottom - 6 if is_less else top + 4
        ends = (bottom - 8, top + 22) if is_less else (bottom - 24, top + 8)
        inside = _without_outliers(known, self._sign, is_log)
        self._worst = max((self._sign * each for each in inside), default=math.inf)
        self.scale = scale_of(inside, *ends, is_log=is_log)

    def mark(self, trial: Trial, x: float, colour: int, shape: str = "") -> Mark:
        """A training at its metric; at an edge where it has none, or too bad a one."""
        if trial.outcome is Outcome.running:
            return Mark(trial, x, self.best_edge, trial.outcome.value, colour)
        if not _has_metric(trial) or trial.value is None:
            return Mark(trial, x, self.worst_edge, Outcome.failed.value, colour)
        if self._sign * trial.value > self._worst:
            return Mark(trial, x, self.worst_edge, "beyond", colour)
        return Mark(trial, x, self.scale.place(trial.value), shape or trial.outcome.value, colour)

    def level(self, score: Score, first: float, last: float) -> Level | None:
        """A score over a stretch; None if it has no finite metric."""
        if not math.isfinite(score.mean):
            return None
        low = high = None
        if score.deviation is not None and math.isfinite(score.deviation):
            ends = [score.mean - score.deviation, score.mean + score.deviation]
            high, low = sorted(self.scale.place(each) for each in ends)
        return Level(first, last, self.scale.place(score.mean), low, high, told(score))


def _without_outliers(values: Sequence[float], sign: float, is_log: bool) -> list[float]:
    """The metrics without those that would leave no room for the others."""
    along = {each: sign * (math.log10(each) if is_log else each) for each in values}
    ordered = sorted(along.values())
    if len(ordered) < FEW:
        return list(values)
    best, poor = ordered[0], ordered[3 * (len(ordered) - 1) // 4]
    limit = poor + OUTLYING * (poor - best) if poor > best else math.inf
    return [each for each in values if along[each] <= limit]


def _has_metric(trial: Trial) -> bool:
    is_number = trial.value is not None and math.isfinite(trial.value)
    return is_number and trial.outcome in (Outcome.complete, Outcome.stopped)


class _Widths:
    """Where a dimension's values stand: a picture's horizontal axis."""

    def __init__(self, name: str, points: Sequence[Point], width: int) -> None:
        self._name = name
        found = [self._coordinate(each) for each in points]
        numbers = [each for each in found if isinstance(each, float)]
        self._names = sorted({each for each in found if isinstance(each, str)})
        # Where there is nothing but names they have the whole width.
        self._part = SLOT if numbers else (width - RIGHT - LEFT) / max(len(self._names), 1)
        ends = (float(LEFT + 8 + SLOT * len(self._names)), float(width - RIGHT - 8))
        # 1 - beta falls where beta rises.
        self._scale = scale_of(numbers, *(ends[::-1] if self._is_beta else ends), is_log=True)
        ticks = self._scale.ticks() if numbers else []
        values = [f"{1 - each:.10g}" for each in self._scale.numbers()]
        self.ticks = [
            Tick(tick.place, value if self._is_beta else tick.text)
            for tick, value in zip(ticks, values, strict=False)
        ]
        self.slots = [Tick(self._slot(each), each) for each in self._names]

    def place(self, point: Point) -> float:
        """Where a point stands, from the left."""
        at = self._coordinate(point)
        return self._slot(at) if isinstance(at, str) else self._scale.place(at)

    @property
    def _is_beta(self) -> bool:
        return self._name.startswith("beta")

    def _slot(self, value: str) -> float:
        return round(LEFT + (self._names.index(value) + 0.5) * self._part, 1)

    def _coordinate(self, point: Point) -> float | str:
        """A number on the axis, or the word of what has no place there."""
        value = DIMENSIONS[self._name].read(point)
        if value is None or isinstance(value, bool):
            return searched_value(self._name, point)
        number = 1 - value if self._is_beta else float(value)
        return number if 1 / LARGEST < number < LARGEST else searched_value(self._name, point)
