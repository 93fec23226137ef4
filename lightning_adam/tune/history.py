"""The runs of a search, as trials of one Optuna study.

All that a search knows stands here: the same command goes on where it was interrupted, machines
that share a database share the search, and `optuna-dashboard` shows it.
"""

import math
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from lightning_adam.config.errors import ConfigError
from lightning_adam.tune.configuration import Configuration
from lightning_adam.tune.runs import Outcome, Request, Run, Stage

MAX_OPENINGS = 3
"""How often it is tried to open a database."""
SECONDS_BETWEEN_BEATS, SECONDS_OF_GRACE = 15, 90
"""How often a process says to a database that it lives, and when it is taken for dead."""
JOURNAL = "journal:"
"""What the place of a journal file begins with; all else is a database's URL."""
NEUTRAL_KEYS = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "tags"}
NEUTRAL_ROOTS = {"logger", "paths"}
"""Keys, and parts of the app's config, that do not change what a run returns."""
KILLED = "its process was killed"


def open_storage(place: str, must_exist: bool = False) -> BaseStorage:
    """Opens the storage at a place.

    Args:
        place: `journal:PATH`, or a database's URL.
        must_exist: Raise if there is no journal, as on a machine that does not see it.

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
    for attempt in range(1, MAX_OPENINGS + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return RDBStorage(
                    place,
                    heartbeat_interval=SECONDS_BETWEEN_BEATS,
                    grace_period=SECONDS_OF_GRACE,
                )
        except Exception as error:
            # Two processes may create the tables at the same moment: one of them finds them there.
            if attempt < MAX_OPENINGS and isinstance(error, DBAPIError):
                time.sleep(attempt)
                continue
            reason = str(error).splitlines()[0].rstrip(".").replace(place, shown(place))
            raise ConfigError(
                f"hydra.sweeper.storage={shown(place)} cannot be opened: {reason}",
                "Use for example hydra.sweeper.storage=sqlite:///tune.db",
            ) from error
    raise AssertionError


def shown(place: str) -> str:
    """The place of a storage without its password.

    Example:
        >>> shown("postgresql://me:secret@host/tune")
        'postgresql://me:***@host/tune'
    """
    try:
        return place if place.startswith(JOURNAL) else str(make_url(place))
    except Exception:
        return place


class History:
    """The runs of one search.

    Args:
        place: Where the storage is; see `open_storage`.
        name: The study's name.
        direction: `minimize` or `maximize`.

    Example:
        >>> history = History("sqlite:///:memory:", "mnist", "minimize")
        >>> number = history.begin(Request(Stage.start, Configuration(1e-3)), "sweep")
        >>> history.finish(number, 0.41)
        >>> history.runs()[0].value
        0.41
    """

    def __init__(self, place: str, name: str, direction: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.place = place
        self._storage = open_storage(place)
        self.study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction=StudyDirection[direction.upper()],
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(name)
        self._locks = Path(f"{place.removeprefix(JOURNAL)}.locks")

    def claim(self, identity: Mapping[str, str], folder: str) -> None:
        """Makes sure that the study's runs are of the same app, with the same config.

        Args:
            identity: What runs must have in common to be compared.
            folder: Where this process writes.

        Raises:
            ConfigError: If the study is of something else.
        """
        found = self.study.user_attrs.get("identity")
        if found is None:
            self.study.set_user_attr("identity", dict(identity))
            return
        changed = [
            key
            for key in sorted({*found, *identity})
            if found.get(key) != identity.get(key) and not _is_neutral(key)
        ]
        if changed:
            changes = [f"{key} was {found.get(key)}, now {identity.get(key)}" for key in changed]
            differences = "; ".join([*changes[:4], *(["..."] if len(changes) > 4 else [])])
            name = self.study.study_name
            raise ConfigError(
                f"hydra.sweeper.study_name={name}: the search in {folder} has other settings"
                f" ({differences})",
                f"Use the same settings, or start another search with"
                f" hydra.sweeper.study_name={name}_2",
            )

    def begin(
        self,
        request: Request,
        owner: str,
        seed: int | None = None,
        params: Mapping[str, float] | None = None,
        distributions: Mapping[str, BaseDistribution] | None = None,
    ) -> int | None:
        """Adds a run that is about to start.

        Returns:
            Its number; None if another process has begun the same run a moment earlier.
        """
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=dict(params or {}),
            distributions=dict(distributions or {}),
            user_attrs={
                "stage": request.stage.value,
                "replicate": request.replicate,
                "length": request.length,
                "attempt": request.attempt,
                "configuration": asdict(request.configuration),
                "seed": seed,
                "owner": owner,
            },
        )
        trial_id = self._storage.create_new_trial(self._study_id, template)
        number = self._storage.get_trial(trial_id).number
        self._beat([number])
        for other in self.runs():
            is_same = other.request.key == request.key and not other.is_retried
            if is_same and other.number < number:
                self.note(number, withdrawn=True)
                self.study.tell(number, state=TrialState.FAIL)
                return None
        return number

    def note(self, number: int, **attributes: Any) -> None:
        """Adds to what is known of a run.

        Raises:
            RuntimeError: If it has ended, as for a search that has given it up.
        """
        trial_id = self._trial_id(number)
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(trial_id, name, value)

    def is_running(self, number: int) -> bool:
        """Whether a run has not ended."""
        return not self._storage.get_trial(self._trial_id(number)).state.is_finished()

    def finish(self, number: int, value: float, seconds: float = 0.0) -> None:
        """Ends a run with its metric; one that is not finite is a failure."""
        if not math.isfinite(value):
            self.fail(number, f"diverged: the metric is {value}", seconds)
        elif self.is_running(number):
            self.note(number, seconds=seconds)
            self.study.tell(number, value, skip_if_finished=True)

    def fail(self, number: int, error: str, seconds: float = 0.0) -> None:
        """Ends a run that has failed, with the reason."""
        if self.is_running(number):
            self.note(number, error=error, seconds=seconds)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def runs(self) -> list[Run]:
        """All runs in the order in which they began."""
        trials = self.study.get_trials(deepcopy=False)
        return [
            _run(each)
            for each in trials
            if "configuration" in each.user_attrs and "withdrawn" not in each.user_attrs
        ]

    @contextmanager
    def keep_alive(self, owner: str, numbers: list[int]) -> Iterator[None]:
        """Shows other processes that this one lives, for as long as the block lasts.

        A database has Optuna's heartbeats. A journal has a lock file, which the operating system
        releases with the process.

        Args:
            owner: What the process is called: an owner of runs, or a run's number.
            numbers: The runs that it answers for; may be changed during the block.
        """
        if self._is_journal:
            self._locks.mkdir(exist_ok=True)
            with FileLock(self._locks / owner):
                yield
            return
        is_over = threading.Event()

        def beat() -> None:
            while not is_over.wait(SECONDS_BETWEEN_BEATS):
                # A database that is away for a moment is no reason to stop.
                with suppress(Exception):
                    self._beat(list(numbers))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def reap_stale(self, given_up: Iterable[int] = (), reason: str = "") -> None:
        """Ends the runs whose processes are gone: they may be started again.

        Args:
            given_up: Runs for which their owner does not answer any more, as their launcher has
                lost them (default: none).
            reason: Why it has.
        """
        orphans = {each for each in given_up if self.is_running(each)}
        for number in orphans:
            self.note(number, lost=reason)
        if not self._is_journal:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                fail_stale_trials(self.study)
            return
        for run in self.runs():
            if run.outcome is Outcome.running:
                names = [str(run.number), *([] if run.number in orphans else [run.owner])]
                if not any(self._is_held(name) for name in names):
                    self.study.tell(run.number, state=TrialState.FAIL, skip_if_finished=True)

    @property
    def _is_journal(self) -> bool:
        return self.place.startswith(JOURNAL)

    def _is_held(self, name: str) -> bool:
        path = self._locks / name
        if not path.exists():
            return False
        try:
            with FileLock(path, blocking=False):
                return False
        except Timeout:
            return True

    def _beat(self, numbers: Iterable[int]) -> None:
        if isinstance(self._storage, RDBStorage):
            for number in numbers:
                self._storage.record_heartbeat(self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def _is_neutral(key: str) -> bool:
    names = key.split(".")
    return names[-1] in NEUTRAL_KEYS or names[0] in NEUTRAL_ROOTS


def _run(trial: FrozenTrial) -> Run:
    """A run from its Optuna trial."""
    kept = trial.user_attrs
    values = dict(kept["configuration"])
    if values["betas"] is not None:
        values["betas"] = tuple(values["betas"])
    outcome = {TrialState.COMPLETE: Outcome.complete, TrialState.FAIL: Outcome.failed}
    is_failed = trial.state is TrialState.FAIL
    return Run(
        request=Request(
            stage=Stage(kept["stage"]),
            configuration=Configuration(**values),
            length=kept["length"],
            replicate=kept["replicate"],
            attempt=kept["attempt"],
        ),
        number=trial.number,
        outcome=outcome.get(trial.state, Outcome.running),
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        seed=kept["seed"],
        seconds=kept.get("seconds", 0.0),
        folder=kept.get("folder", ""),
        error=kept.get("error", kept.get("lost", KILLED)) if is_failed else "",
        is_lost=is_failed and "error" not in kept,
        is_given_up="lost" in kept,
        findings=tuple(kept.get("findings", ())),
        steps=kept.get("steps"),
        fixed_length=kept.get("fixed_length", ""),
        state_dtypes=tuple(kept.get("state_dtypes", ())),
        owner=kept["owner"],
    )
