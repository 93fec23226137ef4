"""The runs of a search, as trials of one Optuna study.

The study is the only state of a search. So the same command resumes an interrupted search, machines
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

MAX_OPEN_ATTEMPTS = 3
"""Attempts to open a database."""
HEARTBEAT_SECONDS, GRACE_SECONDS = 15, 90
"""Seconds between heartbeats, and without one until a process counts as dead."""
JOURNAL = "journal:"
"""Prefix of the URL of a journal file; all other URLs are those of databases."""
NEUTRAL_KEYS = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "tags"}
NEUTRAL_ROOTS = {"logger", "paths"}
"""Keys and top-level nodes of the app's config that do not affect the metric of a run."""
KILLED = "its process was killed"


def open_storage(url: str, must_exist: bool = False) -> BaseStorage:
    """Opens the storage at a URL.

    Args:
        url: `journal:PATH`, or a database's URL.
        must_exist: Whether a missing journal file is an error (default: False).

    Raises:
        FileNotFoundError: If the journal file must exist and does not.
        ConfigError: If the URL is invalid, or the database does not answer.

    Example:
        >>> open_storage("sqlite:///:memory:").get_all_studies()
        []
    """
    if url.startswith(JOURNAL):
        path = Path(url.removeprefix(JOURNAL))
        if must_exist and not path.is_file():
            raise FileNotFoundError(path)
        return JournalStorage(JournalFileBackend(str(path)))
    for attempt in range(1, MAX_OPEN_ATTEMPTS + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return RDBStorage(
                    url,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                )
        except Exception as error:
            # Two processes may create the tables at the same time, and one of them fails.
            if attempt < MAX_OPEN_ATTEMPTS and isinstance(error, DBAPIError):
                time.sleep(attempt)
                continue
            reason = str(error).splitlines()[0].rstrip(".").replace(url, hide_password(url))
            raise ConfigError(
                f"hydra.sweeper.storage={hide_password(url)} cannot be opened: {reason}",
                "Use for example hydra.sweeper.storage=sqlite:///tune.db",
            ) from error
    raise AssertionError


def hide_password(url: str) -> str:
    """Returns the URL of a storage without its password.

    Example:
        >>> hide_password("postgresql://me:secret@host/tune")
        'postgresql://me:***@host/tune'
    """
    try:
        return url if url.startswith(JOURNAL) else str(make_url(url))
    except Exception:
        return url


class History:
    """The runs of one search.

    Args:
        url: URL of the storage; see `open_storage`.
        name: The study's name.
        direction: `minimize` or `maximize`.

    Example:
        >>> history = History("sqlite:///:memory:", "mnist", "minimize")
        >>> number = history.begin(Request(Stage.start, Configuration(1e-3)), "sweep")
        >>> history.finish(number, 0.41)
        >>> history.runs()[0].value
        0.41
    """

    def __init__(self, url: str, name: str, direction: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url = url
        self._storage = open_storage(url)
        self.study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction=StudyDirection[direction.upper()],
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(name)
        self._locks = Path(f"{url.removeprefix(JOURNAL)}.locks")

    def check_identity(self, identity: Mapping[str, str], folder: str) -> None:
        """Checks that the study's runs have the same app and config; records them in a new study.

        Args:
            identity: The settings that comparable runs share.
            folder: The folder of this process, for the error.

        Raises:
            ConfigError: If the study was started with other settings.
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
            Its number; None if another process has just added the same run.
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
        self._record_heartbeats([number])
        for other in self.runs():
            is_same = other.request.key == request.key and not other.is_retried
            if is_same and other.number < number:
                self.set_attributes(number, withdrawn=True)
                self.study.tell(number, state=TrialState.FAIL)
                return None
        return number

    def set_attributes(self, number: int, **attributes: Any) -> None:
        """Sets attributes of a run.

        Raises:
            RuntimeError: If the run has ended, for example because it counts as dead.
        """
        trial_id = self._trial_id(number)
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(trial_id, name, value)

    def is_running(self, number: int) -> bool:
        """Returns whether a run has not ended."""
        return not self._storage.get_trial(self._trial_id(number)).state.is_finished()

    def finish(self, number: int, value: float, seconds: float = 0.0) -> None:
        """Ends a run with its metric, or as failed if the metric is not finite."""
        if not math.isfinite(value):
            self.fail(number, f"diverged: the metric is {value}", seconds)
        elif self.is_running(number):
            self.set_attributes(number, seconds=seconds)
            self.study.tell(number, value, skip_if_finished=True)

    def fail(self, number: int, error: str, seconds: float = 0.0) -> None:
        """Ends a run as failed, with the reason."""
        if self.is_running(number):
            self.set_attributes(number, error=error, seconds=seconds)
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def runs(self) -> list[Run]:
        """Returns all runs in the order in which they were added."""
        trials = self.study.get_trials(deepcopy=False)
        return [
            _run(each)
            for each in trials
            if "configuration" in each.user_attrs and "withdrawn" not in each.user_attrs
        ]

    @contextmanager
    def keep_alive(self, owner: str, numbers: list[int]) -> Iterator[None]:
        """Sends heartbeats from this process while the block runs.

        In a database these are Optuna's heartbeats. With a journal it is a lock file, which the
        operating system releases when the process ends.

        Args:
            owner: Name of the lock: the owner of runs, or a run's number.
            numbers: The runs of this process; may change while the block runs.
        """
        if self._is_journal:
            self._locks.mkdir(exist_ok=True)
            with FileLock(self._locks / owner):
                yield
            return
        has_ended = threading.Event()

        def beat() -> None:
            while not has_ended.wait(HEARTBEAT_SECONDS):
                # The database may be unavailable for a moment.
                with suppress(Exception):
                    self._record_heartbeats(list(numbers))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()

    def reap_stale(self, lost: Iterable[int] = (), reason: str = "") -> None:
        """Ends the runs whose processes have died, so that they can start again.

        Args:
            lost: Runs that the launcher of their owner has lost. Only their own processes can keep
                them alive (default: none).
            reason: Why the launcher lost them.
        """
        orphans = {each for each in lost if self.is_running(each)}
        for number in orphans:
            self.set_attributes(number, lost=reason)
        if not self._is_journal:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                fail_stale_trials(self.study)
            return
        for run in self.runs():
            if run.outcome is Outcome.running:
                names = [str(run.number), *([] if run.number in orphans else [run.owner])]
                if not any(self._is_locked(name) for name in names):
                    self.study.tell(run.number, state=TrialState.FAIL, skip_if_finished=True)

    @property
    def _is_journal(self) -> bool:
        return self.url.startswith(JOURNAL)

    def _is_locked(self, name: str) -> bool:
        path = self._locks / name
        if not path.exists():
            return False
        try:
            with FileLock(path, blocking=False):
                return False
        except Timeout:
            return True

    def _record_heartbeats(self, numbers: Iterable[int]) -> None:
        if isinstance(self._storage, RDBStorage):
            for number in numbers:
                self._storage.record_heartbeat(self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def _is_neutral(key: str) -> bool:
    names = key.split(".")
    return names[-1] in NEUTRAL_KEYS or names[0] in NEUTRAL_ROOTS


def _run(trial: FrozenTrial) -> Run:
    """Converts an Optuna trial to a run."""
    attributes = trial.user_attrs
    values = dict(attributes["configuration"])
    if values["betas"] is not None:
        values["betas"] = tuple(values["betas"])
    outcome = {TrialState.COMPLETE: Outcome.complete, TrialState.FAIL: Outcome.failed}
    is_failed = trial.state is TrialState.FAIL
    return Run(
        request=Request(
            stage=Stage(attributes["stage"]),
            configuration=Configuration(**values),
            length=attributes["length"],
            replicate=attributes["replicate"],
            attempt=attributes["attempt"],
        ),
        number=trial.number,
        outcome=outcome.get(trial.state, Outcome.running),
        value=trial.value if trial.state is TrialState.COMPLETE else None,
        seed=attributes["seed"],
        seconds=attributes.get("seconds", 0.0),
        folder=attributes.get("folder", ""),
        error=attributes.get("error", attributes.get("lost", KILLED)) if is_failed else "",
        is_lost=is_failed and "error" not in attributes,
        is_given_up="lost" in attributes,
        findings=tuple(attributes.get("findings", ())),
        steps=attributes.get("steps"),
        fixed_length=attributes.get("fixed_length", ""),
        state_dtypes=tuple(attributes.get("state_dtypes", ())),
        owner=attributes["owner"],
    )
