"""The search: which trainings come next, and what those that are over come to.

Everything is worked out anew from the archive, so a search that was killed goes on as if it had
not been, and several processes may carry one on together.
"""

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from lightning_adam.errors import ConfigError
from lightning_adam.schema import When
from lightning_adam.tune.alive import Observer, process_name
from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.plan import PLACE, Plan, Stage
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Outcome, Score, Step, Trial

START = "start"
"""The stage of the app's own settings."""
ATTEMPTS = 2
"""How often a training is begun whose process is killed each time."""
HOPELESS = 5
"""Trainings that have crashed, with none that has not, before the search gives up."""
EPS_FINDINGS = ("eps_", "exp_avg_sq_underflow")
"""How the codes of the findings begin that call for another eps."""
NEAR_AN_END = 0.05
"""How close to the end of a range, as a share of it, the best is taken to lie at it."""
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Begun:
    """A training that is to be run now, and written down as under way.

    Attributes:
        stage: The stage.
        number: Its number in the stage's study.
        point: Adam's settings.
        seed: What seeds it; None for the app's own way.
        may_stop: Whether it may be stopped early.

    Example:
        >>> Begun("lr", 0, Point(1e-3), seed=0, may_stop=True).point.lr
        0.001
    """

    stage: str
    number: int
    point: Point
    seed: int | None
    may_stop: bool


@dataclass(frozen=True)
class _Wanted:
    """A training that a stage asks for."""

    point: Point
    turn: int = 0
    attempt: int = 1


@dataclass
class _Progress:
    """How far a stage is: the trainings it wants now, the step it came to, or neither yet."""

    stage: Stage | None
    wanted: list[_Wanted] = field(default_factory=list)
    samples: int = 0
    step: Step | None = None


class Search:
    """A search in stages, each of which begins where the one before it ended.

    In a stage every point is trained with the first seed. The best of them, if it is better than
    the incumbent, is then trained with the other seeds too, and takes the incumbent's place if its
    mean is better by more than the standard error of the difference.

    Args:
        plan: What is searched.
        start: The app's own settings.
        archive: Where the trainings are kept.
        seeds: What seeds a training, for each turn; None where it is not for us to say.

    Example:
        >>> from lightning_adam.schema import Direction, TuneConfig
        >>> from lightning_adam.tune.plan import read_plan
        >>> stages = {"lr": {"space": {"lr": {"low": 1e-4, "high": 1e-1}}}}
        >>> config = TuneConfig(
        ...     direction=Direction.minimize, n_trials=8, n_seeds=1, study_name="parabola"
        ... )
        >>> plan = read_plan({**vars(config), "stages": stages})
        >>> archive = Archive("journal:search.journal", "parabola", "minimize")
        >>> search = Search(plan, Point(lr=1e-4), archive, [None])
        >>> while batch := search.next_batch():
        ...     for begun in batch:
        ...         distance = math.log10(begun.point.lr) + 2
        ...         archive.finish(begun.stage, begun.number, distance**2)
        >>> 0.003 < search.steps()[-1].after.point.lr < 0.03
        True
    """

    def __init__(
        self, plan: Plan, start: Point, archive: Archive, seeds: Sequence[int | None]
    ) -> None:
        self.plan = plan
        self.start = start
        self.archive = archive
        self.owner = process_name()
        self.skipped: dict[str, str] = {}
        self._seeds = seeds
        self._observer = Observer(archive)
        self._sign = 1.0 if plan.direction == "minimize" else -1.0

    def next_batch(self) -> list[Begun]:
        """Begins the next trainings, as many as the plan has jobs; none if the search is over.

        It waits for trainings of other processes, where what comes next depends on them.

        Raises:
            ConfigError: If all trainings crash, so that there is nothing to learn.
        """
        while True:
            self._bury()
            progress = self._progress()
            if progress is None:
                return []
            self._check_hope()
            batch = self._begin(progress)
            if batch:
                return batch
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def lose(self, batch: Iterable[Begun]) -> None:
        """Waits for trainings whose launcher has given up on them, as far as they live.

        Those that do not are to be done again, each in a batch of its own; one that was in such a
        batch has failed.

        Args:
            batch: What `next_batch` returned.
        """
        batch = list(batch)
        for begun in batch:
            while True:
                record = self._record(begun)
                if record.is_over:
                    break
                if not record.job or not self._observer.is_alive(record.job):
                    if len(batch) == 1:
                        said = "its process was killed"
                        self.archive.fail(begun.stage, begun.number, said)
                    else:
                        self.archive.lose(begun.stage, begun.number)
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def steps(self) -> list[Step]:
        """What each stage came to so far; the last is the one that is under way, if it is."""
        return [progress.step for progress in self._walk() if progress.step is not None]

    def trials(self) -> list[Trial]:
        """All trainings, in the order in which they were begun, without those to be done again."""
        stages = [START, *(stage.name for stage in self.plan.stages)]
        records = [each for stage in stages for each in self._counted(stage)]
        return [each.trial for each in sorted(records, key=lambda each: each.begun)]

    def _progress(self) -> _Progress | None:
        """The first stage that is not over."""
        for progress in self._walk():
            if progress.step is None or not progress.step.is_over:
                return progress
        return None

    def _walk(self) -> Iterator[_Progress]:
        """The stages, up to the first one that is not over."""
        self.skipped = dict(self.plan.too_large)
        records = self._counted(START)
        start = self._start(records)
        yield start
        if start.step is None or not start.step.is_over:
            return
        incumbent, used = start.step.after, len(records)
        known = list(records)
        for place, stage in enumerate(self.plan.stages):
            reason = self._reason_to_skip(stage, incumbent, known)
            if reason:
                self.skipped[stage.name] = reason
                continue
            behind = [
                each
                for each in self.plan.stages[place + 1 :]
                if not self._reason_to_skip(each, incumbent, known)
            ]
            records = self._counted(stage.name)
            budget = self._budget(stage, behind, incumbent.point, self.plan.n_trials - used)
            if not budget and not records:
                self.skipped[stage.name] = "no trial was left for it"
                continue
            progress = self._advance(stage, records, incumbent, budget)
            yield progress
            if progress.step is None or not progress.step.is_over:
                return
            incumbent = progress.step.after
            used += len(records)
            known += records

    def _start(self, records: Sequence[Record]) -> _Progress:
        """The app's own settings, with all seeds; one, if it does not end well with that."""
        stage = None
        turns = min(len(self._seeds), self.plan.n_trials)
        first = [each for each in records if each.turn == 0 and each.is_over]
        if first and not any(each.is_good for each in first):
            turns = 1
        wanted = self._missing(START, self.start, turns, records)
        score = self._score(self.start, records)
        is_over = not wanted and all(each.is_over for each in records)
        if not records:
            return _Progress(stage, wanted)
        words = f"The app's own settings: {self._told(score)}."
        step = Step(START, score, score, None, None, None, words, is_over=is_over)
        return _Progress(stage, wanted, step=step)

    def _advance(
        self, stage: Stage, records: Sequence[Record], incumbent: Score, budget: int
    ) -> _Progress:
        """How far a stage is."""
        explored = [each for each in records if each.turn == 0]
        room = max(1, budget - (len(self._seeds) - 1)) - len(explored)
        alternatives = stage.alternatives(incumbent.point)
        if alternatives is not None:
            room = min(room, len(alternatives) - len({each.trial.point for each in explored}))
        lost = self._lost(stage.name, records)
        words = f"{len(explored)} of {len(explored) + max(room, 0)} points were tried."
        under_way = self._step(stage, incumbent, records, words, is_over=False)
        if lost or room > 0:
            given = [
                point
                for point in alternatives or stage.first_points(incumbent.point)
                if all(each.trial.point != point for each in explored)
            ][: max(room, 0)]
            wanted = lost or [_Wanted(point) for point in given]
            samples = 0 if lost or alternatives is not None else room - len(given)
            return _Progress(stage, wanted, samples, under_way)
        if not all(each.is_over for each in explored):
            return _Progress(stage, step=under_way)
        challenger = self._challenger(explored, incumbent)
        if challenger is not None:
            left = self.plan.n_trials - self._used()
            wanted = self._missing(stage.name, challenger, len(self._seeds), records)
            if wanted and left > 0:
                return _Progress(stage, wanted[:left], step=under_way)
            if any(not each.is_over for each in records):
                return _Progress(stage, step=under_way)
        return _Progress(stage, step=self._decide(stage, incumbent, records, challenger))

    def _challenger(self, explored: Sequence[Record], incumbent: Score) -> Point | None:
        """The best point, if it is better than the incumbent with the first seed."""
        good = [each for each in explored if each.is_good]
        if not good:
            return None
        best = min(good, key=lambda each: (self._sign * _value(each), each.trial.number))
        first = incumbent.values[0] if incumbent.values else math.nan
        is_better = not math.isfinite(first) or self._sign * (_value(best) - first) < 0
        return best.trial.point if is_better else None

    def _decide(
        self, stage: Stage, incumbent: Score, records: Sequence[Record], challenger: Point | None
    ) -> Step:
        """What a stage came to whose trainings are over."""
        if challenger is None:
            words = f"None of {len(records)} points is better with the first seed: it stays."
            return self._step(stage, incumbent, records, words)
        score = self._score(challenger, records)
        gain, spread = self._gain(incumbent, score)
        turns = len(self._seeds)
        if len(score.values) < turns and len(incumbent.values) >= turns:
            words = "Better with the first seed, and no trial was left for the others: it stays."
        elif gain is None and math.isfinite(score.mean):
            return self._step(
                stage,
                incumbent,
                records,
                f"The incumbent has no finite metric, this has {self._told(score)}: taken.",
                score,
            )
        elif gain is None:
            words = "Better with the first seed, and it fails with another: the incumbent stays."
        elif spread is None:
            words = f"Better by {gain:.4g}, with one seed, so that the spread is unknown: taken."
            words += _at_an_end(stage, challenger)
            return self._step(stage, incumbent, records, words, score)
        elif gain > spread:
            words = f"Better by {gain:.4g}, beyond the spread of {spread:.2g}: taken."
            words += _at_an_end(stage, challenger)
            return self._step(stage, incumbent, records, words, score)
        else:
            said = f"better by {gain:.4g}" if gain > 0 else f"worse by {-gain:.4g}"
            words = f"Over the seeds {said}, within the spread of {spread:.2g}: it stays."
            if gain <= 0:
                words = f"Better with the first seed, over all of them {said}: it stays."
        return self._step(stage, incumbent, records, words)

    def _step(
        self,
        stage: Stage,
        incumbent: Score,
        records: Sequence[Record],
        words: str,
        taken: Score | None = None,
        *,
        is_over: bool = True,
    ) -> Step:
        points = {each.trial.point for each in records if each.turn == 0 and each.is_good}
        scores = [self._score(point, records) for point in points]
        # One that was tried with more seeds was the best with the first.
        best = min(
            scores,
            key=lambda score: (-len(score.values), self._sign * score.mean),
            default=None,
        )
        challenger = taken or best
        gain, spread = (None, None) if challenger is None else self._gain(incumbent, challenger)
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

    def _gain(self, incumbent: Score, score: Score) -> tuple[float | None, float | None]:
        """By how much a score is better, and the standard error of that."""
        gain = self._sign * (incumbent.mean - score.mean)
        if not math.isfinite(gain):
            return None, None
        counts = len(incumbent.values), len(score.values)
        degrees = sum(counts) - 2
        if degrees < 1:
            return gain, None
        squares = sum(
            (count - 1) * (each.deviation or 0.0) ** 2
            for count, each in zip(counts, (incumbent, score), strict=True)
        )
        return gain, math.sqrt(squares / degrees * (1 / counts[0] + 1 / counts[1]))

    def _score(self, point: Point, records: Iterable[Record]) -> Score:
        of_point = [each for each in records if each.trial.point == point and each.is_over]
        of_point = [each for each in of_point if not each.is_lost]
        ordered = sorted(of_point, key=lambda each: each.turn)
        values = tuple(_value(each) for each in ordered)
        mean = statistics.fmean(values) if values else math.nan
        is_known = len(values) > 1 and math.isfinite(mean)
        return Score(point, values, mean, statistics.stdev(values) if is_known else None)

    def _missing(
        self, stage: str, point: Point, turns: int, records: Sequence[Record]
    ) -> list[_Wanted]:
        """The trainings of a point that have not begun, those that were lost in their place."""
        there = {each.turn for each in records if each.trial.point == point}
        lost = self._lost(stage, records)
        again = {each.turn for each in lost if each.point == point}
        fresh = [turn for turn in range(turns) if turn not in there | again]
        return [*(each for each in lost if each.point == point)] or [
            _Wanted(point, turn) for turn in fresh
        ]

    def _lost(self, stage: str, records: Sequence[Record]) -> list[_Wanted]:
        """The trainings that ended with their processes and that nobody has begun again."""
        there = {(each.trial.point, each.turn) for each in records}
        lost: dict[tuple[Point, int], _Wanted] = {}
        for each in self.archive.records(stage):
            key = (each.trial.point, each.turn)
            if each.is_lost and key not in there:
                lost[key] = _Wanted(*key, attempt=each.attempt + 1)
        return list(lost.values())

    def _counted(self, stage: str) -> list[Record]:
        """The trainings of a stage, without those that are to be done again."""
        return [
            each
            for each in self.archive.records(stage)
            if not each.is_lost or each.attempt >= ATTEMPTS
        ]

    def _used(self) -> int:
        stages = [START, *(stage.name for stage in self.plan.stages)]
        return sum(len(self._counted(stage)) for stage in stages)

    def _record(self, begun: Begun) -> Record:
        return next(
            each for each in self.archive.records(begun.stage) if each.trial.number == begun.number
        )

    def _begin(self, progress: _Progress) -> list[Begun]:
        """Writes down the trainings that a stage asks for, as many as there are jobs."""
        again = [each for each in progress.wanted if each.attempt > 1]
        wanted = again[:1] or progress.wanted[: self.plan.n_jobs]
        batch = [each for each in (self._begun(progress.stage, want) for want in wanted) if each]
        room = min(progress.samples, self.plan.n_jobs - len(batch))
        for _ in range(0 if again else room):
            assert progress.stage is not None
            assert progress.step is not None
            point = self._sample(progress.stage, progress.step.before)
            begun = self._begun(progress.stage, _Wanted(point))
            if begun is not None:
                batch.append(begun)
        return batch

    def _begun(self, stage: Stage | None, wanted: _Wanted) -> Begun | None:
        """Writes down a training; None if another process was a moment earlier."""
        name = START if stage is None else stage.name
        space = {} if stage is None else stage.space
        seed = self._seeds[wanted.turn]
        distributions = _distributions(space)
        number = self.archive.begin(
            name,
            wanted.point,
            wanted.turn,
            seed,
            _coordinates(space, wanted.point),
            distributions,
            self.owner,
            wanted.attempt,
        )
        for other in self.archive.records(name):
            is_same = (other.trial.point, other.turn) == (wanted.point, wanted.turn)
            if other.trial.number < number and is_same and not other.is_lost:
                self.archive.withdraw(name, number)
                return None
        may_stop = stage is not None and wanted.turn == 0
        return Begun(name, number, wanted.point, seed, may_stop)

    def _sample(self, stage: Stage, incumbent: Score) -> Point:
        """A new point of the stage's space, of Optuna's Gaussian process.

        It learns from what is over, a failure being as bad as the worst that still counts, and
        from what is under way, which it expects to be as others nearby.
        """
        distributions = _distributions(stage.space)
        records = [each for each in self._counted(stage.name) if each.turn == 0]
        values = _bounded(
            [
                *(self._sign * _value(each) if each.is_over else None for each in records),
                self._sign * (incumbent.values[0] if incumbent.values else math.nan),
            ]
        )
        coordinates = [each.coordinates for each in records]
        coordinates.append(_coordinates(stage.space, incumbent.point))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.GPSampler(
                seed=self.plan.sampler_seed + len(records), n_startup_trials=2
            )
        study = optuna.create_study(sampler=sampler)
        for each, value in zip(coordinates, values, strict=True):
            if all(_fits(distributions[name], each.get(name)) for name in distributions):
                study.add_trial(
                    optuna.create_trial(
                        state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
                        value=value,
                        params=each,
                        distributions=distributions,
                    )
                )
        tried = {each.trial.point for each in records} | {incumbent.point}
        for _ in range(10):
            sampled = study.ask(distributions).params
            point = incumbent.point
            for name, choices in stage.space.items():
                dimension = DIMENSIONS[name]
                point = dimension.sampled(point, sampled[dimension.coordinate], choices)
            if point not in tried:
                break
            # What is known exactly is not tried again: the neighbourhood of the best is left.
            study.sampler = optuna.samplers.RandomSampler(
                seed=self.plan.sampler_seed + len(records)
            )
        return point

    def _budget(self, stage: Stage, behind: Sequence[Stage], point: Point, left: int) -> int:
        """A stage's part of the trainings that are left: by shares, and no more than it can use."""
        stages = [stage, *behind]
        confirming = len(self._seeds) - 1
        ends = {each.name: each.alternatives(point) for each in stages}
        limits = {
            name: math.inf if found is None else len(found) + confirming
            for name, found in ends.items()
        }
        parts: dict[str, float] = {}
        open_stages = list(stages)
        while open_stages:
            free = left - sum(parts.values())
            shares = sum(each.share for each in open_stages)
            full = [each for each in open_stages if free * each.share / shares >= limits[each.name]]
            if not full:
                parts |= {each.name: free * each.share / shares for each in open_stages}
                break
            parts |= {each.name: limits[each.name] for each in full}
            open_stages = [each for each in open_stages if each not in full]
        # One point with all seeds is the least that can come to something.
        least = len(self._seeds)
        part = max(round(parts[stage.name]), least)
        return int(part) if part <= left else 0

    def _reason_to_skip(self, stage: Stage, incumbent: Score, known: Sequence[Record]) -> str:
        lacking = stage.lacking(incumbent.point)
        if lacking or stage.when is When.always:
            return lacking
        of_incumbent = [each for each in known if each.trial.point == incumbent.point]
        if any("16" in each.precision for each in of_incumbent):
            return ""
        found = {code for each in of_incumbent for code in each.trial.findings}
        if any(code.startswith(EPS_FINDINGS) for code in found):
            return ""
        return (
            "nothing calls for it: neither a precision of 16 bits nor a finding about eps was seen"
            f" (hydra.sweeper.stages.{stage.name}.when=always searches it all the same)"
        )

    def _bury(self) -> None:
        """Ends what is written down as under way and whose processes are gone."""
        for stage in (START, *(each.name for each in self.plan.stages)):
            for record in self.archive.records(stage):
                if record.is_over or self._lives(record):
                    continue
                number = record.trial.number
                self.archive.lose(stage, number)

    def _lives(self, record: Record) -> bool:
        if record.owner == self.owner:
            return True
        return any(
            self._observer.is_alive(process) for process in (record.owner, record.job) if process
        )

    def _check_hope(self) -> None:
        trials = self.trials()
        over = [each for each in trials if each.outcome is not Outcome.running]
        crashed = [each for each in over if each.error and not each.error.startswith("diverged")]
        if len(over) == len(crashed) >= HOPELESS:
            raise ConfigError(
                f"all of the first {len(crashed)} trials have failed, the last one of"
                f" {crashed[-1].error}; run the app once without -m to see it alone"
            )

    def _told(self, score: Score) -> str:
        if not math.isfinite(score.mean):
            return "no finite metric"
        spread = "" if score.deviation is None else f" ± {score.deviation:.2g}"
        return f"{score.mean:.5g}{spread}"


def _at_an_end(stage: Stage, point: Point) -> str:
    """What is said where the best may lie outside of what was searched."""
    for name, choices in stage.space.items():
        if isinstance(choices, list):
            continue
        dimension = DIMENSIONS[name]
        value = dimension.read(point)
        for end, edge in choices.items():
            near = {dimension.to_coordinate(each) for each in (value, edge) if each}
            if max(near) - min(near) <= NEAR_AN_END * abs(max(near, key=abs)):
                return (
                    f" It lies at the {end} end of what was searched; a wider range is"
                    f" {PLACE}.stages.{stage.name}.space.{name}.{end}=VALUE."
                )
    return ""


def _value(record: Record) -> float:
    """The metric; not a number if the training did not come to its end."""
    value = record.trial.value
    return value if record.is_good and value is not None else math.nan


def _coordinates(space: dict[str, Any], point: Point) -> dict[str, Any]:
    found = {}
    for name, choices in space.items():
        dimension = DIMENSIONS[name]
        value = dimension.read(point)
        if value is not None and (value > 0 or isinstance(choices, list)):
            is_choice = isinstance(choices, list)
            found[dimension.coordinate] = value if is_choice else dimension.to_coordinate(value)
    return found


def _distributions(space: dict[str, Any]) -> dict[str, BaseDistribution]:
    return {
        DIMENSIONS[name].coordinate: DIMENSIONS[name].distribution(choices)
        for name, choices in space.items()
    }


def _fits(distribution: BaseDistribution, value: Any) -> bool:
    if value is None:
        return False
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return bool(distribution.low <= value <= distribution.high)  # type: ignore[attr-defined]


def _bounded(values: Sequence[float | None]) -> list[float | None]:
    """Less is better: what is far worse than the middle is brought near, and so is a failure.

    A diverged training would else flatten all differences among the good ones.
    """
    finite = sorted(each for each in values if each is not None and math.isfinite(each))
    if not finite:
        return [None if each is None else 0.0 for each in values]
    middle = finite[len(finite) // 2]
    worst = min(finite[-1], middle + 2 * (middle - finite[0])) if middle > finite[0] else finite[-1]
    return [
        None if each is None else min(each, worst) if math.isfinite(each) else worst
        for each in values
    ]
