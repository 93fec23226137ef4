"""The trials as Optuna keeps them: one study a stage, one Optuna trial a training.

Whatever a search knows stands here, so that the same command goes on where it was killed, and
machines that share a database share a search.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from lightning_adam.config.errors import ConfigError
from lightning_adam.tune.dimensions import holds
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Outcome, Trial

OPENINGS = 3
"""How often it is tried to open a database."""
JOURNAL = "journal:"
"""What the place of a journal file begins with; all else is a database's URL."""


@dataclass(frozen=True)
class Record:
    """A training, with what only the search needs to know of it.

    Attributes:
        trial: What is told of it.
        turn: Which of a point's seeds it is, from 0.
        coordinates: Where it stands in the stage's space, as Optuna samples it.
        owner: The process of the sweep that began it.
        job: The process that trains it; empty before it has begun.
        attempt: 1, and 2 if it is done again for having been lost.
        is_lost: Whether it ended with its process, and may be done again.
        precision: Of the trainer, and the dtypes of the parameters.
        begun: When, in seconds since 1970.

    Example:
        >>> trial = Trial("lr", 3, Point(1e-3), 0, Outcome.complete, 0.41)
        >>> Record(trial, turn=0, coordinates={"lr": 1e-3}, owner="host/1/a").is_over
        True
    """

    trial: Trial
    turn: int
    coordinates: dict[str, Any]
    owner: str
    job: str = ""
    attempt: int = 1
    is_lost: bool = False
    precision: str = ""
    begun: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self.trial.outcome is not Outcome.running

    @property
    def is_good(self) -> bool:
        """Whether it ended with a metric to compare."""
        return self.trial.outcome is Outcome.complete


def open_storage(place: str, must_exist: bool = False) -> BaseStorage:
    """The storage at a place.

    Args:
        place: `journal:PATH`, or a database's URL.
        must_exist: Refuse a journal that is not there, as on a machine that does not see it.

    Raises:
        FileNotFoundError: If it must exist and does not.
        ConfigError: If it is neither, or the database does not answer.

    Example:
        >>> open_storage("sqlite:///:memory:").get_all_studies()
        []
    """
    if place.startswith(JOURNAL):
        path = Path(place.removeprefix(JOURNAL))
        if must_exist and not path.is_file():
            raise FileNotFoundError(path)
        return JournalStorage(JournalFileBackend(str(path)))
    for attempt in range(1, OPENINGS + 1):
        try:
            return RDBStorage(place)
        except Exception as error:
            # Two processes may create the tables at the same moment: one of them finds them there.
            if attempt < OPENINGS and isinstance(error, DBAPIError):
                time.sleep(attempt)
                continue
            said = str(error).splitlines()[0]
            raise ConfigError(
                f"hydra.sweeper.storage={place} cannot be reached: {said.rstrip('.')}",
                "Use for example hydra.sweeper.storage=sqlite:///tune.db",
            ) from error
    raise AssertionError


class Archive:
    """The studies of one search.

    Args:
        place: Where the storage is; see `open_storage`.
        name: The search's name; the studies are called `<name>/<stage>`.
        direction: `minimize` or `maximize`.

    Example:
        >>> archive = Archive("sqlite:///:memory:", "mnist", "minimize")
        >>> number = archive.begin("lr", Point(1e-3), 0, None, {}, {}, "host/1/a", 1)
        >>> archive.finish("lr", number, 0.41)
        >>> archive.records("lr")[0].trial.value
        0.41
    """

    def __init__(self, place: str, name: str, direction: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.place = place
        self.name = name
        self.direction = direction
        self._storage = open_storage(place)
        self._studies: dict[str, optuna.Study] = {}

    def claim(self, identity: Mapping[str, Any], folder: str) -> bool:
        """Makes sure that what is found under the name is of the same search.

        Args:
            identity: What trials have to have in common to be compared, as plain values.
            folder: Where this process writes.

        Returns:
            Whether there were trials already.

        Raises:
            ConfigError: If it is another search.
        """
        study = self._study("")
        found = study.user_attrs.get("identity")
        if found is None:
            study.set_user_attr("identity", dict(identity))
            return False
        changed = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
        if changed:
            told = [
                f"{key} was {found.get(key)}, now {identity.get(key)}" for key in sorted(changed)
            ]
            differences = "; ".join([*told[:4], *(["..."] if len(told) > 4 else [])])
            raise ConfigError(
                f"hydra.sweeper.study_name={self.name}: the search in {folder} has other settings"
                f" ({differences})",
                "Use the same settings, or start another search with"
                f" hydra.sweeper.study_name={self.name}_2",
            )
        return True

    def begin(
        self,
        stage: str,
        point: Point,
        turn: int,
        seed: int | None,
        coordinates: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        owner: str,
        attempt: int,
    ) -> int:
        """Writes down that a training begins.

        Returns:
            Its number in the stage's study.
        """
        study = self._study(stage)
        inside = {
            name: distribution
            for name, distribution in distributions.items()
            if holds(distribution, coordinates.get(name))
        }
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params={name: coordinates[name] for name in inside},
            distributions=inside,
            user_attrs={
                "point": asdict(point),
                "turn": turn,
                "seed": seed,
                "coordinates": dict(coordinates),
                "owner": owner,
                "attempt": attempt,
            },
        )
        storage = self._storage
        trial_id = storage.create_new_trial(
            storage.get_study_id_from_name(study.study_name), template
        )
        return int(storage.get_trial(trial_id).number)

    def note(self, stage: str, number: int, **attributes: Any) -> None:
        """Adds to what is known of a training that is under way.

        Raises:
            RuntimeError: If it has ended, as by a search that gave it up.
        """
        trial_id = self._trial_id(stage, number)
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(trial_id, name, value)

    def note_if_running(self, stage: str, number: int, **attributes: Any) -> bool:
        """Adds to what is known of a training, unless it has ended for the search.

        Returns:
            Whether it is under way.
        """
        if not self._is_running(stage, number):
            return False
        self.note(stage, number, **attributes)
        return True

    def finish(self, stage: str, number: int, value: float, seconds: float = 0.0) -> None:
        """Writes down the metric; one that is not finite is a failure, and so said."""
        if not math.isfinite(value):
            self.fail(stage, number, f"diverged: the metric is {value}", seconds)
            return
        if not self._is_running(stage, number):
            return
        self.note(stage, number, seconds=seconds)
        stopped = "stopped_at" in self._frozen(stage, number).user_attrs
        if stopped:
            self.note(stage, number, last_value=value)
            self._study(stage).tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study(stage).tell(number, value, skip_if_finished=True)

    def fail(self, stage: str, number: int, error: str, seconds: float = 0.0) -> None:
        """Writes down that a training failed, and why."""
        self._end(stage, number, error=error, seconds=seconds)

    def lose(self, stage: str, number: int) -> None:
        """Writes down that a training's process is gone: it may be done again."""
        self._end(stage, number, error="its process was killed", lost=True)

    def withdraw(self, stage: str, number: int) -> None:
        """Takes back a training that another process has begun at the same moment."""
        self._end(stage, number, error="another process trains it", withdrawn=True)

    def records(self, stage: str) -> list[Record]:
        """All trainings of a stage by their numbers, without those that were withdrawn."""
        trials = self._study(stage).get_trials(deepcopy=False)
        return [_record(stage, each) for each in trials if "withdrawn" not in each.user_attrs]

    def beat(self, process: str, count: int) -> None:
        """Says that a process lives, to those on other machines."""
        self._study("").set_user_attr(f"beat/{process}", count)

    def beats(self) -> dict[str, int]:
        """What the processes have said last, by their names."""
        attributes = self._study("").user_attrs
        return {
            name.removeprefix("beat/"): count
            for name, count in attributes.items()
            if name.startswith("beat/")
        }

    def should_stop(self, stage: str, number: int, step: int, value: float) -> bool:
        """Writes down a metric on the way, and whether the training is hopeless by it.

        It is if it is among the worst quarter of the stage's trainings at the same step, of which
        there have to be four.
        """
        trial_id = self._trial_id(stage, number)
        self._storage.set_trial_intermediate_value(trial_id, step, value)
        pruner = optuna.pruners.PercentilePruner(75.0, n_startup_trials=4)
        return bool(pruner.prune(self._study(stage), self._storage.get_trial(trial_id)))

    def _study(self, stage: str) -> optuna.Study:
        name = f"{self.name}/{stage}" if stage else self.name
        if name not in self._studies:
            self._studies[name] = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction=StudyDirection[self.direction.upper()],
                sampler=optuna.samplers.RandomSampler(),
                load_if_exists=True,
            )
        return self._studies[name]

    def _trial_id(self, stage: str, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self._study(stage).study_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _frozen(self, stage: str, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._trial_id(stage, number))

    def _is_running(self, stage: str, number: int) -> bool:
        return not self._frozen(stage, number).state.is_finished()

    def _end(self, stage: str, number: int, **attributes: Any) -> None:
        if self._is_running(stage, number):
            self.note(stage, number, **attributes)
            study = self._study(stage)
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _record(stage: str, frozen: FrozenTrial) -> Record:
    kept = frozen.user_attrs
    outcome = {
        TrialState.RUNNING: Outcome.running,
        TrialState.WAITING: Outcome.running,
        TrialState.COMPLETE: Outcome.complete,
        TrialState.PRUNED: Outcome.stopped,
        TrialState.FAIL: Outcome.failed,
    }[frozen.state]
    given = dict(kept["point"])
    if given["betas"] is not None:
        given["betas"] = tuple(given["betas"])
    value = frozen.value if outcome is Outcome.complete else kept.get("last_value")
    begun = frozen.datetime_start
    return Record(
        trial=Trial(
            stage=stage,
            number=frozen.number,
            point=Point(**given),
            seed=kept["seed"],
            outcome=outcome,
            value=value,
            seconds=kept.get("seconds", 0.0),
            folder=kept.get("folder", ""),
            error=kept.get("error", ""),
            findings=tuple(kept.get("findings", ())),
        ),
        turn=kept["turn"],
        coordinates=kept["coordinates"],
        owner=kept["owner"],
        job=kept.get("job", ""),
        attempt=kept["attempt"],
        is_lost="lost" in kept,
        precision=kept.get("precision", ""),
        begun=begun.timestamp() if begun else 0.0,
    )
