"""AdamMonitor: decides when to measure, for which scopes, and where to log."""

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_adam._private.lightning import log_every_n_steps, logging_step
from lightning_adam.errors import ConfigError
from lightning_adam.optimizers import settings as optimizer_settings
from lightning_adam.reading import read_monitor
from lightning_adam.schedulers import settings as scheduler_settings
from lightning_adam.schema import Scope
from lightning_adam.statistics import AdamStatistics, is_measurable
from lightning_adam.version import __version__


@dataclass
class _Watched:
    """One optimizer, and how far it has come."""

    optimizer: Optimizer
    statistics: AdamStatistics
    steps: int
    due: int
    measured: bool = False


class AdamMonitor(Callback):
    """Measures Adam right after its steps, and logs to every logger of the trainer.

    It reads the clipped, unscaled gradient, the new parameters and the new state in the optimizer's
    step-post-hook, where all three stand together. It changes nothing that it reads; a fault inside
    it is reported once and switches it off. The numbers are also in `trainer.callback_metrics`.

    Args:
        every_n_steps: Measure the first optimizer step and every n-th (default: None, the
            trainer's `log_every_n_steps`).
        scopes: What the statistics are given for: `model`, `group` (default: both).

    Raises:
        ConfigError: If an argument cannot work or, when `fit` starts, if no optimizer is Adam or
            AdamW.

    Example:
        >>> trainer = Trainer(callbacks=[AdamMonitor(every_n_steps=10)], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        scopes: Sequence[str] = (Scope.model, Scope.group),
    ) -> None:
        config = read_monitor({"every_n_steps": every_n_steps, "scopes": list(scopes)})
        self.every_n_steps = config.every_n_steps
        self.scopes = config.scopes
        self._interval = 0
        self._watched: list[_Watched] = []
        self._hooks: list[RemovableHandle] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses optimizers that cannot be measured, before a step is spent."""
        others = [type(each).__name__ for each in trainer.optimizers if not is_measurable(each)]
        if len(others) == len(trainer.optimizers):
            raise ConfigError(
                "AdamMonitor: expected Adam or AdamW, which keep exp_avg and exp_avg_sq, but the"
                f" model trains with {', '.join(others) or 'no optimizer'}; train with"
                " torch.optim.Adam or AdamW (AdamMixin builds them), or remove the callback"
            )
        if others:
            rank_zero_info(f"AdamMonitor does not measure {', '.join(others)}: no Adam or AdamW.")
        if not trainer.loggers:
            rank_zero_warn(
                "AdamMonitor has no logger: its numbers are in trainer.callback_metrics only."
                " Give the Trainer one, such as WandbLogger(offline=True)."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks into the optimizers; a checkpoint's state has been restored by now."""
        with self._never_harm():
            # 0 is Lightning's word for never.
            self._interval = self.every_n_steps or log_every_n_steps(trainer)
            if not self._interval:
                return
            for index, optimizer in enumerate(trainer.optimizers):
                if is_measurable(optimizer):
                    name = str(index) if len(trainer.optimizers) > 1 else None
                    self._watch(optimizer, AdamStatistics(self.scopes, name))
            _log_settings(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs what the batch's optimizer steps have left, under the step of the batch's loss."""
        if any(watched.measured for watched in self._watched):
            with self._never_harm():
                self._log(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of the optimizers."""
        self._stop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the optimizers."""
        self._stop()

    def _watch(self, optimizer: Optimizer, statistics: AdamStatistics) -> None:
        taken = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
        steps = int(max(taken, default=0))
        watched = _Watched(optimizer, statistics, steps, self._next_due(steps))
        self._watched.append(watched)
        self._hooks.append(
            optimizer.register_step_post_hook(
                lambda optimizer, args, kwargs: self._after_step(watched)
            )
        )

    def _after_step(self, watched: _Watched) -> None:
        watched.steps += 1
        if watched.steps < watched.due:
            return
        with self._never_harm():
            watched.due = self._next_due(watched.steps)
            watched.statistics.update(watched.optimizer)
            watched.measured = True

    def _next_due(self, steps: int) -> int:
        """The first optimizer step after `steps` that is 1 or divisible by the interval."""
        return 1 if steps == 0 else (steps // self._interval + 1) * self._interval

    def _log(self, trainer: Trainer) -> None:
        values: dict[str, float] = {}
        for watched in self._watched:
            if watched.measured:
                values |= watched.statistics.compute()
                watched.measured = False
        trainer.callback_metrics.update(
            {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        )
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logging_step(trainer))

    @contextmanager
    def _never_harm(self) -> Iterator[None]:
        """A fault in monitoring is reported once, ends the monitoring, and never the training."""
        try:
            yield
        except Exception:
            self._stop()
            rank_zero_warn(
                "AdamMonitor has failed and is off from here on; training is not affected.\n"
                f"{traceback.format_exc()}"
            )

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._watched = []


def _log_settings(trainer: Trainer) -> None:
    """The settings as they were resolved, in the run's config, and how to draw our keys."""
    config: dict[str, Any] = {
        "version": __version__,
        "optimizer": _one_or_numbered(map(optimizer_settings, trainer.optimizers)),
        "scheduler": _one_or_numbered(
            scheduler_settings(entry.scheduler) for entry in trainer.lr_scheduler_configs
        ),
    }
    for logger in trainer.loggers:
        logger.log_hyperparams({"lightning_adam": config})
        if isinstance(logger, WandbLogger):
            logger.experiment.define_metric("adam_*", step_metric="trainer/global_step")


def _one_or_numbered(settings: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The settings themselves if there is one, else each under its position."""
    numbered = {str(index): each for index, each in enumerate(settings)}
    return numbered["0"] if len(numbered) == 1 else numbered or None
