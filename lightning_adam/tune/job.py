"""A run in its own process: which one it is, and how its result gets into the history."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.variables import STORAGE_VARIABLE, TRIAL_VARIABLE
from lightning_adam.tune.history import History, open_storage, shown

RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What Lightning sets when it starts the other processes of a run."""


class NoMetricError(ConfigError):
    """The app returns no number: none of its runs can be judged."""


@dataclass(frozen=True)
class Trial:
    """Which run of which search this process trains.

    Attributes:
        study_name: The search.
        direction: `minimize` or `maximize`.
        stage: What the run is for.
        number: Its number.
        length: Its share of a full run's steps.
        hyperparameters: Arguments by which the tuned optimizer is recognized.
        overrides: What makes the app's config that of the run (default: none).

    Example:
        >>> trial = Trial("mnist", "minimize", "ladder", 3, 0.125, {"lr": 1e-3})
        >>> Trial(**json.loads(trial.as_variable())) == trial
        True
    """

    study_name: str
    direction: str
    stage: str
    number: int
    length: float
    hyperparameters: Mapping[str, Any]
    overrides: list[str] = field(default_factory=list)

    def as_variable(self) -> str:
        """The value of the environment variable.

        Example:
            >>> Trial("mnist", "minimize", "start", 0, 1.0, {}).as_variable()[:24]
            '{"study_name": "mnist", '
        """
        return json.dumps(asdict(self))

    def history(self) -> History:
        """Opens the history of the search.

        Raises:
            Exception: If it cannot be reached from here.
        """
        place = os.environ[STORAGE_VARIABLE]
        open_storage(place, must_exist=True)
        return History(place, self.study_name, self.direction)


def current_trial() -> Trial | None:
    """Which run this process trains; None outside a search.

    Example:
        >>> current_trial() is None
        True
    """
    given = os.environ.get(TRIAL_VARIABLE)
    return Trial(**json.loads(given)) if given else None


@dataclass(frozen=True)
class Job:
    """The app's function, which also writes its result to the history.

    What a launcher returns at the end of a batch is lost if the search is killed before it; what
    is in the history is not.

    Attributes:
        task_function: What `hydra.main` decorates.

    Example:
        >>> Job(lambda config: 0.41)(DictConfig({}))
        0.41
    """

    task_function: Callable[[DictConfig], Any]

    def __call__(self, config: DictConfig) -> Any:
        """Runs the app.

        Raises:
            Exception: What the app raises, and a NoMetricError if it returns no number.
        """
        trial = current_trial()
        if trial is None:
            return self._result(config)
        with env_override(_wandb_variables(trial)), _own_ranks():
            return self._recorded(trial, config) if _is_main() else self._result(config)

    def _recorded(self, trial: Trial, config: DictConfig) -> float:
        try:
            history = trial.history()
        except Exception as error:
            place = shown(os.environ.get(STORAGE_VARIABLE, "the storage"))
            warnings.warn(
                f"{place} cannot be opened here ({in_one_line(error)}): the metric of the run goes"
                " back through the launcher alone.",
                stacklevel=2,
            )
            return self._result(config)
        number = trial.number
        if not history.is_running(number):
            raise RuntimeError(f"The search has given up run {number}")
        history.note(number, folder=HydraConfig.get().runtime.output_dir)
        begun = time.monotonic()
        with history.keep_alive(str(number), [number]):
            try:
                value = self._result(config)
            except Exception as error:
                history.fail(number, in_one_line(error), time.monotonic() - begun)
                raise
            history.finish(number, value, time.monotonic() - begun)
        return value

    def _result(self, config: DictConfig) -> float:
        try:
            result = self.task_function(config)
        except BaseException:
            _finish_wandb(exit_code=1)
            raise
        _finish_wandb(exit_code=0)
        return as_metric(result)


def _is_main() -> bool:
    """Whether this is the first of the processes that train a run together."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def _own_ranks() -> Iterator[None]:
    """Makes Lightning start the other processes of each run anew, as for the only run of an app."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def as_metric(result: object) -> float:
    """The number that the app returned.

    Raises:
        NoMetricError: If it is not a number.

    Example:
        >>> as_metric("0.41")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lightning_adam.tune.job.NoMetricError: The app returned '0.41', not the validation...
    """
    is_number = hasattr(result, "__float__") and not isinstance(result, bool)
    try:
        if is_number:
            return float(result)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise NoMetricError(
        f"The app returned {result!r}, not the validation metric as a number",
        'End its function with, for example, `return trainer.callback_metrics["val/loss"].item()`',
    )


def in_one_line(error: BaseException) -> str:
    """The class of an error and the first line of its message.

    Example:
        >>> in_one_line(ValueError("no such file"))
        'ValueError: no such file'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _wandb_variables(trial: Trial) -> dict[str, str]:
    """How W&B shows the run, unless the user's environment says it."""
    named = {"WANDB_RUN_GROUP": trial.study_name, "WANDB_JOB_TYPE": trial.stage}
    return {name: value for name, value in named.items() if name not in os.environ}


def _finish_wandb(exit_code: int) -> None:
    """Ends the W&B run, which the next job of the process would else continue.

    W&B also forgets what it has read from the environment: the next job may be of another type.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown(exit_code=exit_code)
