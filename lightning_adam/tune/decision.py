"""What trainings come to: a point's score, by how much it is better, and whether it is taken."""

import math
import statistics
from collections.abc import Iterable, Sequence

from lightning_adam.config.tune import PATH
from lightning_adam.tune.archive import Record
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.plan import Plan, Stage
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Score, Step

NEAR_AN_END = 0.05
"""How close to the end of a range, as a share of it, the best is taken to lie at it."""


def metric_of(record: Record) -> float:
    """The metric; not a number if the training did not come to its end.

    Example:
        >>> from lightning_adam.tune.story import Outcome, Trial
        >>> failed = Trial("lr", 0, Point(1e-3), 0, Outcome.failed, error="out of memory")
        >>> metric_of(Record(failed, turn=0, coordinates={}, owner="host/1/a"))
        nan
    """
    value = record.trial.value
    return value if record.is_good and value is not None else math.nan


def score_of(point: Point, records: Iterable[Record]) -> Score:
    """A point's metric over the seeds that were run; not finite if one of them failed.

    Example:
        >>> score_of(Point(1e-3), []).values
        ()
    """
    of_point = [each for each in records if each.trial.point == point and each.is_over]
    return _score(
        point, tuple(metric_of(each) for each in sorted(of_point, key=lambda each: each.turn))
    )


def _score(point: Point, values: tuple[float, ...]) -> Score:
    mean = statistics.fmean(values) if values else math.nan
    is_known = len(values) > 1 and math.isfinite(mean)
    return Score(point, values, mean, statistics.stdev(values) if is_known else None)


def told(score: Score) -> str:
    """A score in words.

    Example:
        >>> told(Score(Point(1e-3), (0.4, 0.5), 0.45, 0.0707))
        '0.45 ± 0.071'
    """
    if not math.isfinite(score.mean):
        return "no finite metric"
    spread = "" if score.deviation is None else f" ± {score.deviation:.2g}"
    return f"{score.mean:.5g}{spread}"


def gain_of(before: Score, after: Score, sign: float) -> tuple[float | None, float | None]:
    """By how much a score is better, and the standard error of that.

    The two are taken to spread alike (the pooled variance of Student's test).

    Args:
        before: The score to compare with.
        after: The other.
        sign: 1 where less is better, -1 where more is.

    Returns:
        None for what is not known: the difference if one of them failed, its standard error if
        none has two seeds.

    Example:
        >>> gain_of(
        ...     Score(Point(1e-3), (3.0, 5.0), 4.0, 1.5), Score(Point(1e-2), (2.0,), 2.0, None), 1.0
        ... )  # doctest: +ELLIPSIS
        (2.0, 1.83...)
    """
    gain = sign * (before.mean - after.mean)
    if not math.isfinite(gain):
        return None, None
    counts = len(before.values), len(after.values)
    degrees = sum(counts) - 2
    if degrees < 1:
        return gain, None
    squares = sum(
        (count - 1) * (each.deviation or 0.0) ** 2
        for count, each in zip(counts, (before, after), strict=True)
    )
    return gain, math.sqrt(squares / degrees * (1 / counts[0] + 1 / counts[1]))


def challenger_of(explored: Sequence[Record], incumbent: Score, sign: float) -> Point | None:
    """The best point, if it is better than the incumbent with the first seed.

    Args:
        explored: The trainings with the first seed.
        incumbent: What is to be beaten.
        sign: 1 where less is better, -1 where more is.
    """
    good = [each for each in explored if each.is_good]
    if not good:
        return None
    best = min(good, key=lambda each: (sign * metric_of(each), each.trial.number))
    first = incumbent.values[0] if incumbent.values else math.nan
    is_better = not math.isfinite(first) or sign * (metric_of(best) - first) < 0
    return best.trial.point if is_better else None


def decide(
    plan: Plan,
    stage: Stage,
    incumbent: Score,
    records: Sequence[Record],
    challenger: Point | None,
) -> Step:
    """What a stage came to whose trainings are over.

    Args:
        plan: What is searched.
        stage: The stage.
        incumbent: What it began with.
        records: Its trainings.
        challenger: The best point of the first seed, if it is better there.
    """

    def stays(words: str) -> Step:
        return step_of(plan, stage, incumbent, records, f"{words}: it stays.")

    def is_taken(score: Score, words: str) -> Step:
        words = f"{words}: taken.{_at_an_end(stage, score.point)}"
        return step_of(plan, stage, incumbent, records, words, taken=score)

    if challenger is None:
        return stays(f"Of {len(records)} points none is better with the first seed")
    score = score_of(challenger, records)
    gain, spread = gain_of(incumbent, score, plan.sign)
    if len(score.values) < plan.n_seeds and len(incumbent.values) >= plan.n_seeds:
        return stays("Better with the first seed, and no trial was left for the others")
    if gain is None and math.isfinite(score.mean):
        return is_taken(score, f"The incumbent has no finite metric, this has {told(score)}")
    if gain is None:
        return stays("Better with the first seed, and it fails with another")
    if spread is None:
        return is_taken(score, f"Better by {gain:.4g}, with one seed, so the spread is unknown")
    if gain > spread:
        return is_taken(score, f"Better by {gain:.4g}, beyond the spread of {spread:.2g}")
    if gain > 0:
        return stays(f"Over the seeds better by {gain:.4g}, within the spread of {spread:.2g}")
    return stays(f"Better with the first seed, over all of them worse by {-gain:.4g}")


def step_of(
    plan: Plan,
    stage: Stage,
    incumbent: Score,
    records: Sequence[Record],
    words: str,
    *,
    taken: Score | None = None,
    is_over: bool = True,
) -> Step:
    """A stage as it is told.

    Args:
        plan: What is searched.
        stage: The stage.
        incumbent: What it began with.
        records: Its trainings.
        words: The decision.
        taken: What takes the incumbent's place; None if it stays.
        is_over: Whether the stage has come to its end.
    """
    points = {each.trial.point: None for each in records if each.turn == 0 and each.is_good}
    scores = [score_of(point, records) for point in points]
    # One that was tried with more seeds was the best with the first.
    best = min(scores, key=lambda score: (-len(score.values), plan.sign * score.mean), default=None)
    challenger = taken or best
    gain, spread = None, None
    if challenger is not None:
        # What was tried with the first seed alone is compared with the same seed of the incumbent.
        before = _score(incumbent.point, incumbent.values[: len(challenger.values)])
        gain, spread = gain_of(before, challenger, plan.sign)
    return Step(
        stage=stage.name,
        before=incumbent,
        after=taken or incumbent,
        challenger=challenger,
        gain=gain,
        spread=spread,
        words=words,
        dimensions=tuple(stage.space),
        is_over=is_over,
    )


def _at_an_end(stage: Stage, point: Point) -> str:
    """What is said where the best may lie outside of what was searched."""
    for name, choices in stage.space.items():
        if isinstance(choices, list):
            continue
        dimension = DIMENSIONS[name]
        value = dimension.read(point)
        for end, edge in choices.items() if value else ():
            near = {dimension.to_coordinate(each) for each in (value, edge)}
            if max(near) - min(near) <= NEAR_AN_END * abs(max(near, key=abs)):
                return (
                    f" It lies at the {end} end of what was searched; a wider range is"
                    f" {PATH}.stages.{stage.name}.space.{name}.{end}=VALUE."
                )
    return ""
