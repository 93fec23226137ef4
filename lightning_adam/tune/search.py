"""The search: begins the trainings that come next, and writes down those whose processes died."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_adam.config.errors import ConfigError
from lightning_adam.tune.alive import Observer, process_name
from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.decision import metric_of
from lightning_adam.tune.plan import Plan, Stage
from lightning_adam.tune.point import Point
from lightning_adam.tune.progress import Known, Progress, Wanted, Way, way_of
from lightning_adam.tune.sampling import coordinates_of, propose, space_distributions
from lightning_adam.tune.story import START, Outcome, Score, Trial

HOPELESS = 5
"""Trainings that have crashed, with none that has not, before the search gives up."""
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
        >>> from lightning_adam.config.tune import Direction, TuneConfig
        >>> from lightning_adam.tune.plan import read_plan
        >>> stages = {"lr": {"space": {"lr": {"low": 1e-4, "high": 1e-1}}}}
        >>> config = TuneConfig(
        ...     direction=Direction.minimize, n_trials=8, n_seeds=1, study_name="parabola"
        ... )
        >>> plan = read_plan({**vars(config), "stages": stages})
        >>> archive = Archive("sqlite:///:memory:", "parabola", "minimize")
        >>> search = Search(plan, Point(lr=1e-4), archive, [None])
        >>> while batch := search.next_batch():
        ...     for begun in batch:
        ...         distance = math.log10(begun.point.lr) + 2
        ...         archive.finish(begun.stage, begun.number, distance**2)
        >>> way, trials = search.look()
        >>> 0.003 < way.stages[-1].step.after.point.lr < 0.03
        True
        >>> len(trials)
        8
    """

    def __init__(
        self, plan: Plan, start: Point, archive: Archive, seeds: Sequence[int | None]
    ) -> None:
        self.plan = plan
        self.start = start
        self.archive = archive
        self.owner = process_name()
        self._seeds = seeds
        self._observer = Observer(archive)
        self._exhausted: set[str] = set()

    def next_batch(self) -> list[Begun]:
        """Begins the next trainings, as many as the plan has jobs; none if the search is over.

        It waits for trainings of other processes, where what comes next depends on them.

        Raises:
            ConfigError: If all trainings crash, so that there is nothing to learn.
        """
        while True:
            known = self._known()
            if self._bury(known):
                continue
            way = self._way(known)
            if way.is_over:
                return []
            _check_hope(known.trials())
            batch = self._begin(way.stages[-1])
            if batch:
                return batch
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def lose(self, batch: Iterable[Begun], reason: str) -> None:
        """Waits for trainings whose launcher has given up on them, as far as they live.

        Those that do not are to be done again, each in a batch of its own; one that was in such a
        batch has failed.

        Args:
            batch: What `next_batch` returned.
            reason: What the launcher raised.
        """
        batch = list(batch)
        for begun in batch:
            while True:
                record = self._record(begun)
                if record.is_over:
                    break
                if not record.job or not self._observer.is_alive(record.job):
                    if len(batch) == 1:
                        unborn = f"the launcher did not begin it: {reason}"
                        said = "its process was killed" if record.job else unborn
                        self.archive.fail(begun.stage, begun.number, said)
                    else:
                        self.archive.lose(begun.stage, begun.number)
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def look(self) -> tuple[Way, list[Trial]]:
        """How far it is, and all trainings in the order in which they were begun."""
        known = self._known()
        return self._way(known), known.trials()

    def _known(self) -> Known:
        stages = [START, *(stage.name for stage in self.plan.stages)]
        return Known({stage: self.archive.records(stage) for stage in stages})

    def _way(self, known: Known) -> Way:
        return way_of(self.plan, self.start, known, self._exhausted)

    def _record(self, begun: Begun) -> Record:
        return next(
            each for each in self.archive.records(begun.stage) if each.trial.number == begun.number
        )

    def _begin(self, progress: Progress) -> list[Begun]:
        """Writes down the trainings that a stage asks for, as many as there are jobs."""
        again = [each for each in progress.wanted if each.attempt > 1]
        wanted = again[:1] or progress.wanted[: self.plan.n_jobs]
        batch = [each for each in (self._begun(progress.stage, want) for want in wanted) if each]
        room = min(progress.samples, self.plan.n_jobs - len(wanted))
        for _ in range(room):
            assert progress.stage is not None
            records = self.archive.records(progress.stage.name)
            point = self._sample(progress.stage, progress.step.before, records)
            if point is None:
                self._exhausted.add(progress.stage.name)
                break
            begun = self._begun(progress.stage, Wanted(point))
            if begun is not None:
                batch.append(begun)
        return batch

    def _sample(self, stage: Stage, incumbent: Score, records: Sequence[Record]) -> Point | None:
        """A new point of the stage's space; None if all of them are known."""
        counted = Known({stage.name: records}).of(stage.name)
        explored = [each for each in counted if each.turn == 0]
        sign = self.plan.sign
        seen = [
            (each.coordinates, sign * metric_of(each) if each.is_over else None)
            for each in explored
        ]
        first = incumbent.values[0] if incumbent.values else math.nan
        seen.append((coordinates_of(stage.space, incumbent.point), sign * first))
        seed = self.plan.sampler_seed + len(explored)
        return propose(stage.space, incumbent.point, seen, seed)

    def _begun(self, stage: Stage | None, wanted: Wanted) -> Begun | None:
        """Writes down a training; None if another process was a moment earlier."""
        name = START if stage is None else stage.name
        space = {} if stage is None else stage.space
        seed = self._seeds[wanted.turn]
        number = self.archive.begin(
            name,
            wanted.point,
            wanted.turn,
            seed,
            coordinates_of(space, wanted.point),
            space_distributions(space),
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

    def _bury(self, known: Known) -> bool:
        """Ends what is written down as under way and whose processes are gone."""
        dead = [
            record
            for records in known.records.values()
            for record in records
            if not record.is_over and not self._lives(record)
        ]
        for record in dead:
            self.archive.lose(record.trial.stage, record.trial.number)
        return bool(dead)

    def _lives(self, record: Record) -> bool:
        if record.owner == self.owner:
            return True
        return any(
            self._observer.is_alive(process) for process in (record.owner, record.job) if process
        )


def _check_hope(trials: Sequence[Trial]) -> None:
    over = [each for each in trials if each.outcome is not Outcome.running]
    crashed = [each for each in over if each.error and not each.error.startswith("diverged")]
    if len(over) == len(crashed) >= HOPELESS:
        raise ConfigError(
            f"All of the first {len(crashed)} trials failed, the last one with"
            f" {crashed[-1].error.rstrip('.')}",
            "Run the app once without -m, then the search with hydra/launcher=basic",
        )
