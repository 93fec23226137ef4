"""A trial in its own process: who it is, what it tells the archive, and what it leaves behind."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.variables import TRIAL_VARIABLE
from lightning_adam.tune.alive import Heart, process_name
from lightning_adam.tune.archive import Archive, open_storage


class NoMetricError(ConfigError):
    """The app returns no number: no trial of it can be judged."""


@dataclass(frozen=True)
class Identity:
    """Which trial of which search this process trains.

    Attributes:
        storage: Where the archive is.
        study_name: The search.
        direction: `minimize` or `maximize`.
        stage: The trial's stage.
        number: Its number in that.
        monitor: By which metric it may be stopped early; None where it may not.

    Example:
        >>> who = Identity("journal:tune.journal", "mnist", "minimize", "lr", 3)
        >>> Identity(**json.loads(who.as_variable())) == who
        True
    """

    storage: str
    study_name: str
    direction: str
    stage: str
    number: int
    monitor: str | None = None

    def as_variable(self) -> str:
        """The variable's value.

        Example:
            >>> Identity("journal:a", "mnist", "minimize", "lr", 3).as_variable()[:24]
            '{"storage": "journal:a",'
        """
        return json.dumps(asdict(self))

    def archive(self) -> Archive:
        """The search's archive.

        Raises:
            Exception: If it cannot be reached from here.
        """
        open_storage(self.storage, must_exist=True)
        return Archive(self.storage, self.study_name, self.direction)


def identity() -> Identity | None:
    """Which trial this process trains; None outside a search.

    Example:
        >>> identity() is None
        True
    """
    given = os.environ.get(TRIAL_VARIABLE)
    return Identity(**json.loads(given)) if given else None


@dataclass(frozen=True)
class Job:
    """The app's function, which tells its result to the archive too, if that can be reached.

    What a launcher returns at the end of a batch is lost if the search is killed before; what is
    in the archive is not.

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
        who = identity()
        if who is None:
            return self._result(config)
        with env_override(_of_wandb(who)):
            return self._told(who, config)

    def _told(self, who: Identity, config: DictConfig) -> float:
        archive = _reached(who)
        if archive is None:
            return self._result(config)
        process = process_name()
        if not archive.note_if_running(
            who.stage, who.number, job=process, folder=HydraConfig.get().runtime.output_dir
        ):
            raise RuntimeError(f"{who.stage}/{who.number}: the search has given this trial up")
        begun = time.monotonic()
        with Heart(archive, process):
            try:
                value = self._result(config)
            except Exception as error:
                archive.fail(who.stage, who.number, in_one_line(error), time.monotonic() - begun)
                raise
            archive.finish(who.stage, who.number, value, time.monotonic() - begun)
        return value

    def _result(self, config: DictConfig) -> float:
        try:
            result = self.task_function(config)
        except BaseException:
            _finish_wandb(exit_code=1)
            raise
        _finish_wandb(exit_code=0)
        return as_metric(result)


def as_metric(result: object) -> float:
    """What the app returned, as a number.

    Raises:
        NoMetricError: If it is none.

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
    """An error's class and the first line of what it says.

    Example:
        >>> in_one_line(ValueError("no such file"))
        'ValueError: no such file'
    """
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__


def _reached(who: Identity) -> Archive | None:
    try:
        return who.archive()
    except Exception as error:
        warnings.warn(
            f"{who.storage} cannot be reached from here ({in_one_line(error)}): the trial's metric"
            " goes back through the launcher alone, and it is not stopped early.",
            stacklevel=2,
        )
        return None


def _of_wandb(who: Identity) -> dict[str, str]:
    """How W&B shows the trial's run, unless the user's environment has words of its own."""
    named = {"WANDB_RUN_GROUP": who.study_name, "WANDB_JOB_TYPE": who.stage}
    return {name: value for name, value in named.items() if name not in os.environ}


def _finish_wandb(exit_code: int) -> None:
    """Ends the app's run, which the next trial of the process would else go on with.

    What W&B has read from the environment goes too: the next trial's job type is another.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown(exit_code=exit_code)
