"""How far a search is: worked out anew from what is known of its trainings, and nothing else.

So a search that was killed goes on as if it had not been, and several processes may carry one on
together.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_adam.config.tune import PATH, When
from lightning_adam.tune.archive import Record
from lightning_adam.tune.decision import challenger_of, decide, score_of, step_of, told
from lightning_adam.tune.plan import Plan, Stage
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import START, Score, Step, Trial

ATTEMPTS = 2
"""How often a training is begun whose process is killed each time."""
EPS_FINDINGS = ("eps_", "exp_avg_sq_underflow")
"""How the codes of the findings begin that call for another eps."""


@dataclass(frozen=True)
class Wanted:
    """A training that a stage asks for.

    Attributes:
        point: Adam's settings.
        turn: Which of the seeds it is trained with, from 0.
        attempt: 1, and 2 if it was lost before.

    Example:
        >>> Wanted(Point(1e-3)).attempt
        1
    """

    point: Point
    turn: int = 0
    attempt: int = 1


@dataclass(frozen=True)
class Known:
    """All trainings of a search, by their stages.

    Attributes:
        records: As the archive has them.

    Example:
        >>> Known({}).trials()
        []
    """

    records: Mapping[str, Sequence[Record]]

    def of(self, stage: str) -> list[Record]:
        """The trainings of a stage, without those that are to be done again."""
        records = self.records.get(stage, ())
        return [each for each in records if not each.is_lost or each.attempt >= ATTEMPTS]

    def lost(self, stage: str) -> list[Wanted]:
        """The trainings that ended with their processes and that nobody has begun again."""
        there = {(each.trial.point, each.turn) for each in self.of(stage)}
        lost: dict[tuple[Point, int], Wanted] = {}
        for each in self.records.get(stage, ()):
            key = (each.trial.point, each.turn)
            if each.is_lost and key not in there:
                lost[key] = Wanted(*key, attempt=each.attempt + 1)
        return list(lost.values())

    def missing(self, stage: str, point: Point, turns: int) -> list[Wanted]:
        """The trainings of a point that have not begun; those that were lost come before them."""
        lost = [each for each in self.lost(stage) if each.point == point]
        there = {each.turn for each in self.of(stage) if each.trial.point == point}
        return lost or [Wanted(point, turn) for turn in range(turns) if turn not in there]

    def trials(self) -> list[Trial]:
        """All trainings, in the order in which they were begun."""
        counted = [each for stage in self.records for each in self.of(stage)]
        return [each.trial for each in sorted(counted, key=lambda each: each.begun)]


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: None for the start.
        step: What it came to, so far.
        wanted: The trainings it asks for now.
        samples: How many new points it asks for after those.

    Example:
        >>> score = Score(Point(1e-3), (), float("nan"), None)
        >>> Progress(None, Step("start", score, score, None, None, None, ""), []).samples
        0
    """

    stage: Stage | None
    step: Step
    wanted: list[Wanted]
    samples: int = 0


@dataclass(frozen=True)
class Way:
    """How far a search is.

    Attributes:
        stages: Those that are over, and the one that is under way.
        skipped: Those that were left out, with the reason.

    Example:
        >>> Way([], {}).is_over
        True
    """

    stages: list[Progress]
    skipped: dict[str, str]

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be trained."""
        return all(each.step.is_over for each in self.stages)


def way_of(plan: Plan, start: Point, known: Known, exhausted: Collection[str] = ()) -> Way:
    """How far a search is, by what is known of its trainings.

    Args:
        plan: What is searched.
        start: The app's own settings.
        known: The trainings.
        exhausted: Stages of which no point is left that is not known.

    Example:
        >>> from lightning_adam.config.tune import Direction, TuneConfig
        >>> from lightning_adam.tune.plan import read_plan
        >>> config = TuneConfig(direction=Direction.minimize, study_name="mnist")
        >>> (progress,) = way_of(read_plan(vars(config)), Point(1e-3), Known({})).stages
        >>> [(each.point.lr, each.turn) for each in progress.wanted]
        [(0.001, 0), (0.001, 1)]
    """
    progress = _start(plan, start, known)
    stages, skipped = [progress], dict(plan.too_large)
    incumbent = progress.step.after
    seen, used = known.of(START), len(known.of(START))
    for place, stage in enumerate(plan.stages):
        if not stages[-1].step.is_over:
            break
        reason = _reason_to_skip(stage, incumbent, seen)
        if reason:
            skipped[stage.name] = reason
            continue
        behind = [
            each for each in plan.stages[place + 1 :] if not _reason_to_skip(each, incumbent, seen)
        ]
        part = plan.part_of(stage, behind, incumbent.point, plan.n_trials - used)
        records = known.of(stage.name)
        if not part and not records:
            skipped[stage.name] = "no trial was left for it"
            continue
        is_exhausted = stage.name in exhausted
        stages.append(_advance(plan, stage, known, incumbent, part, is_exhausted=is_exhausted))
        incumbent = stages[-1].step.after
        seen = [*seen, *records]
        used += len(records)
    return Way(stages, skipped)


def _start(plan: Plan, start: Point, known: Known) -> Progress:
    """The app's own settings, with all seeds; one, if it does not end well with that."""
    records = known.of(START)
    turns = min(plan.n_seeds, plan.n_trials)
    first = [each for each in records if each.turn == 0 and each.is_over]
    if first and not any(each.is_good for each in first):
        turns = 1
    wanted = known.missing(START, start, turns)
    score = score_of(start, records)
    is_over = not wanted and all(each.is_over for each in records)
    said = told(score) if is_over else "under way"
    words = f"The app's own settings: {said}."
    step = Step(START, score, score, None, None, None, words, is_over=is_over)
    return Progress(None, step, wanted)


def _advance(
    plan: Plan, stage: Stage, known: Known, incumbent: Score, part: int, *, is_exhausted: bool
) -> Progress:
    """A stage: all of its points with the first seed, then the best of them with the others."""
    records = known.of(stage.name)
    explored = [each for each in records if each.turn == 0]
    alternatives = stage.alternatives(incumbent.point)
    room = max(1, part - (plan.n_seeds - 1)) - len(explored)
    if alternatives is not None:
        room = min(room, len(alternatives) - len({each.trial.point for each in explored}))
    room = 0 if is_exhausted else max(room, 0)
    words = f"{len(explored)} of {len(explored) + room} points were tried."
    under_way = step_of(plan, stage, incumbent, records, words, is_over=False)
    lost = known.lost(stage.name)
    if lost:
        return Progress(stage, under_way, lost)
    if room:
        tried = {each.trial.point for each in explored}
        given = alternatives or stage.first_points(incumbent.point)
        wanted = [Wanted(point) for point in given if point not in tried][:room]
        samples = room - len(wanted) if alternatives is None else 0
        return Progress(stage, under_way, wanted, samples)
    if not all(each.is_over for each in explored):
        return Progress(stage, under_way, [])
    challenger = challenger_of(explored, incumbent, plan.sign)
    if challenger is not None:
        left = plan.n_trials - len(known.trials())
        wanted = known.missing(stage.name, challenger, plan.n_seeds)[: max(left, 0)]
        if wanted or not all(each.is_over for each in records):
            return Progress(stage, under_way, wanted)
    return Progress(stage, decide(plan, stage, incumbent, records, challenger), [])


def _reason_to_skip(stage: Stage, incumbent: Score, seen: Sequence[Record]) -> str:
    lacking = stage.lacking(incumbent.point)
    if lacking or stage.when is When.always:
        return lacking
    of_incumbent = [each for each in seen if each.trial.point == incumbent.point]
    if any("16" in each.precision for each in of_incumbent):
        return ""
    found = {code for each in of_incumbent for code in each.trial.findings}
    if any(code.startswith(EPS_FINDINGS) for code in found):
        return ""
    return (
        "nothing calls for it: neither a precision of 16 bits nor a finding about eps was seen"
        f" ({PATH}.stages.{stage.name}.when=always searches it all the same)"
    )
