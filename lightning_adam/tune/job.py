"""The job of a run: identifies the run, calls the app, and records its result."""

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
from lightning_adam.tune.history import History, hide_password, open_storage

RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables that Lightning sets when it starts the other processes of a run."""


class NoMetricError(ConfigError):
    """The app does not return a number, so no run can be evaluated."""


@dataclass(frozen=True)
class Trial:
    """The run that this process trains.

    Attributes:
        study_name: Name of the study.
        direction: `minimize` or `maximize`.
        stage: Stage of the search.
        number: Number of the run.
        length: Fraction of a full run's steps.
        hyperparameters: Arguments that identify the tuned optimizer.
        overrides: Overrides of the app's config for this run (default: none).

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
        """Returns the trial as the value of `LIGHTNING_ADAM_TRIAL`."""
        return json.dumps(asdict(self))

    def history(self) -> History:
        """Opens the history of the search.

        Raises:
            Exception: If the storage cannot be opened.
        """
        url = os.environ[STORAGE_VARIABLE]
        open_storage(url, must_exist=True)
        return History(url, self.study_name, self.direction)


def current_trial() -> Trial | None:
    """Returns the run that this process trains; None outside a search."""
    given = os.environ.get(TRIAL_VARIABLE)
    return Trial(**json.loads(given)) if given else None


@dataclass(frozen=True)
class Job:
    """The app's function, which also writes its result to the history.

    A launcher returns results only at the end of a batch. If the search is killed before, they are
    still in the history.

    Attributes:
        task_function: The function that `hydra.main` decorates.

    Example:
        >>> Job(lambda config: 0.41)(DictConfig({}))
        0.41
    """

    task_function: Callable[[DictConfig], Any]

    def __call__(self, config: DictConfig) -> Any:
        """Runs the app.

        Raises:
            Exception: Any error of the app.
            NoMetricError: If the app does not return a number.
        """
        trial = current_trial()
        if trial is None:
            return self._run_app(config)
        with env_override(_wandb_variables(trial)), _restore_rank_variables():
            return self._run_and_record(trial, config) if _is_main() else self._run_app(config)

    def _run_and_record(self, trial: Trial, config: DictConfig) -> float:
        try:
            history = trial.history()
        except Exception as error:
            url = hide_password(os.environ.get(STORAGE_VARIABLE, "the storage"))
            warnings.warn(
                f"{url} cannot be opened here ({format_error(error)}), so only the launcher returns"
                " the metric of the run. Use a storage that all nodes can access.",
                stacklevel=2,
            )
            return self._run_app(config)
        number = trial.number
        if not history.is_running(number):
            raise RuntimeError(
                f"Run {number} had no heartbeat, so the search has ended it and may start it again."
                " Let the new run finish"
            )
        history.set_attributes(number, folder=HydraConfig.get().runtime.output_dir)
        start = time.monotonic()
        with history.keep_alive(str(number), [number]):
            try:
                value = self._run_app(config)
            except Exception as error:
                history.fail(number, format_error(error), time.monotonic() - start)
                raise
            history.finish(number, value, time.monotonic() - start)
        return value

    def _run_app(self, config: DictConfig) -> float:
        try:
            result = self.task_function(config)
        except BaseException:
            _finish_wandb(exit_code=1)
            raise
        _finish_wandb(exit_code=0)
        return to_metric(result)


def _is_main() -> bool:
    """Returns whether this is rank 0 of the processes that train a run."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def _restore_rank_variables() -> Iterator[None]:
    """Restores the environment after a run, so that Lightning starts new processes for the next."""
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


def to_metric(result: object) -> float:
    """Converts the return value of the app to a float.

    Raises:
        NoMetricError: If it is not a number.

    Example:
        >>> to_metric("0.41")  # doctest: +ELLIPSIS
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


def format_error(error: BaseException) -> str:
    """Returns the class of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _wandb_variables(trial: Trial) -> dict[str, str]:
    """Returns the W&B variables of the run that the user's environment does not set."""
    named = {"WANDB_RUN_GROUP": trial.study_name, "WANDB_JOB_TYPE": trial.stage}
    return {name: value for name, value in named.items() if name not in os.environ}


def _finish_wandb(exit_code: int) -> None:
    """Ends the W&B run, which the next job of the process would otherwise continue.

    It also makes W&B read the environment again, because the next job may have another job type.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown(exit_code=exit_code)
