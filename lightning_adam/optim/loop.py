"""Connects schedules to a Trainer: validations, the length of the run, found learning rates.

It uses a callback instead of hooks of the module, which users may override without `super()`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_adam._compat.lightning import (
    AnyCallback,
    either,
    is_lr_find_scheduler,
    loaded_checkpoint,
    logged_metrics,
    restore_loaders,
    swa_lr,
)
from lightning_adam.config.errors import ConfigError, ConfigPath, nearest
from lightning_adam.config.schedule import Mode
from lightning_adam.optim import resume
from lightning_adam.optim.console import log_info
from lightning_adam.optim.hyperparameters import make_plain
from lightning_adam.optim.length import run_length
from lightning_adam.optim.param_groups import LR_SCALE, peak_lr
from lightning_adam.optim.schedulers import AnySchedule, set_peak

MINIMIZED_METRICS = r"loss|err|mae|mse|rmse|perplexity|ppl|nll|bpb|wer|cer|fid"
MAXIMIZED_METRICS = r"acc|f1|auc|auroc|precision|recall|score|iou|bleu|rouge|psnr|ssim|map"
"""Parts of the names of metrics that improve by falling, and by rising."""


class ScheduledOptimizer:
    """An optimizer and its schedule in a Trainer.

    Args:
        trainer: The trainer.
        optimizer: The optimizer.
        schedule: Its schedule; None if the learning rate is constant.
        path: The path of the schedule's config.
        monitor: The metric to compare after each validation; None for a schedule without one.
        strict: Whether a metric that is not logged is an error.
        has_length_of_run: Whether the schedule has the length of the trainer's run.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        schedule: AnySchedule | None,
        path: ConfigPath,
        monitor: str | None,
        strict: bool,
        has_length_of_run: bool,
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.path = path
        self.monitor = monitor
        self.strict = strict
        self.is_logged = False
        """Whether the metric has been logged."""
        self.is_validated = False
        """Whether validation logs the metric."""
        self.is_compared = False
        """Whether the metric has been compared in this epoch."""
        self.has_epoch = False
        """Whether an epoch has ended since the fit began."""
        self.has_validated = False
        """Whether a validation has run since the fit began."""
        self.has_length_of_run = has_length_of_run
        self._trainer = trainer
        self._found_lr: float | None = None
        before_step = torch.compiler.disable(lambda *_: self._before_step())  # type: ignore[no-untyped-call]
        optimizer.register_step_pre_hook(before_step)

    @property
    def is_scheduled(self) -> bool:
        """Whether the trainer uses the schedule, which callbacks may replace."""
        configs = self._trainer.lr_scheduler_configs
        return self.schedule is not None and any(
            each.scheduler is self.schedule for each in configs
        )

    def set_peak(self, lr: float) -> None:
        """Sets the optimizer's peak learning rate, and scales those of the groups with it.

        Afterwards `lr_find` sets the same rate for all groups. The next step restores the scales.
        """
        self._found_lr = lr
        set_peak(self.optimizer, self.schedule, lr)

    def _before_step(self) -> None:
        configs = self._trainer.lr_scheduler_configs
        lr_find_config = next(
            (each for each in configs if is_lr_find_scheduler(each.scheduler)), None
        )
        if lr_find_config is not None:
            # `lr_find` tries the same learning rate for all groups.
            lrs = lr_find_config.scheduler.get_last_lr()
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * group.get(LR_SCALE, 1.0)
        elif self._found_lr is not None:
            set_peak(self.optimizer, self.schedule, self._found_lr)
            self._found_lr = None


class ScheduleCallback(AnyCallback):
    """Updates the schedules of a Trainer from its loop."""

    def __init__(self) -> None:
        self._entries: list[ScheduledOptimizer] = []
        self._handles: list[RemovableHandle] = []

    @classmethod
    def add(cls, trainer: Trainer, entry: ScheduledOptimizer) -> None:
        """Adds an optimizer with its schedule to the trainer's callback."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callback = next((each for each in callbacks if isinstance(each, cls)), None)
        if callback is None:
            callback = cls()
            # Before callbacks that save checkpoints, which then contain the new learning rate.
            callbacks.insert(0, callback)
        callback._entries.append(entry)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._entries = list(self._in_use(trainer))
        states = loaded_checkpoint(trainer).get("optimizer_states")
        if states is not None and len(states) != len(trainer.optimizers):
            raise ConfigError(
                f"Cannot resume {len(trainer.optimizers)} optimizers from a checkpoint of"
                f" {len(states)}",
                "Resume it with the module that saved it",
            )
        for entry in self._entries:
            _warn_about_swa_lr(trainer, entry)
        if trainer.strategy.restore_checkpoint_after_setup:
            self._handles = [
                resume.load_saved_groups(
                    optimizer, lambda: Path(trainer.ckpt_path or ""), f"optimizer_{index}"
                )
                for index, optimizer in enumerate(trainer.optimizers)
            ]

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        make_plain(checkpoint)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        restore_loaders(trainer)
        self._update_lengths(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for entry in self._in_use(trainer):
            if entry.monitor is None or not entry.has_epoch:
                continue
            # The module's own hook at the end of an epoch runs after the callback's.
            if not (entry.is_validated or entry.is_compared):
                self._compare_metric(trainer, entry, trainer.callback_metrics)
            has_validated = entry.has_validated or not trainer.enable_validation
            if entry.strict and not entry.is_logged and has_validated:
                raise _not_logged(entry, list(trainer.callback_metrics))
            entry.is_compared = False
        self._update_lengths(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        for entry in self._in_use(trainer):
            if entry.monitor is None:
                continue
            metrics = logged_metrics(trainer)
            if not trainer.sanity_checking:
                entry.has_validated = True
                entry.is_validated |= entry.monitor in metrics
                self._compare_metric(trainer, entry, metrics)
            elif (
                entry.strict
                and entry.monitor not in metrics
                # Without a similar name, training may still log it.
                and nearest(entry.monitor, metrics, 1, cutoff=0.85)
            ):
                raise _not_logged(entry, list(metrics))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for entry in self._in_use(trainer):
            entry.has_epoch = True
            if entry.monitor is not None and not entry.is_validated:
                self._compare_metric(trainer, entry, logged_metrics(trainer))

    def _compare_metric(self, trainer: Trainer, entry: ScheduledOptimizer, metrics: Any) -> None:
        """Passes the metric to the schedule, if it has been logged."""
        if entry.monitor in metrics and entry.schedule is not None:
            entry.is_logged = entry.is_compared = True
            entry.schedule.step(metrics[entry.monitor])

    def _in_use(self, trainer: Trainer) -> Iterator[ScheduledOptimizer]:
        """Yields the entries that neither a strategy nor a later fit has replaced."""
        for entry in self._entries:
            is_kept = entry.schedule is None or entry.is_scheduled
            if any(each is entry.optimizer for each in trainer.optimizers) and is_kept:
                yield entry

    def _update_lengths(self, trainer: Trainer) -> None:
        """Updates the schedules if the length of the run has changed."""
        if any(_weight_averaging_callbacks(trainer)):
            # Weight averaging adds an epoch without optimizer steps.
            return
        for entry in self._in_use(trainer):
            schedule = entry.schedule
            if schedule is None or not entry.has_length_of_run:
                continue
            length = run_length(trainer, schedule.length)
            if length != schedule.length:
                was = schedule.length.total_steps
                schedule.set_length(length)
                if was != length.total_steps:
                    log_info(
                        f"{entry.path.name}: the run has {length.total_steps} optimizer steps,"
                        f" not {was}, and the schedule follows"
                    )


def _not_logged(entry: ScheduledOptimizer, available: list[str]) -> ConfigError:
    mode = str(getattr(entry.schedule and entry.schedule.plateau, "mode", Mode.min))
    excluded = MAXIMIZED_METRICS if mode == Mode.min.value else MINIMIZED_METRICS
    path, monitor = entry.path / "monitor", str(entry.monitor)
    candidates = [name for name in available if not re.search(excluded, name.lower())]
    logged = ", ".join(available) or "nothing"
    problem = f"is not logged. The module logs {logged}"
    return path.invalid(monitor, problem, *nearest(monitor, candidates, 1, cutoff=0.0))


def _warn_about_swa_lr(trainer: Trainer, entry: ScheduledOptimizer) -> None:
    """Warns if weight averaging sets one learning rate for groups with different ones."""
    peaks = [float(peak_lr(group)) for group in entry.optimizer.param_groups]
    for callback in _weight_averaging_callbacks(trainer):
        lr = swa_lr(callback)
        if lr is not None and len(set(peaks)) > 1:
            lrs = [float(f"{lr * each / max(peaks):.3g}") for each in peaks]
            rank_zero_warn(
                f"StochasticWeightAveraging sets swa_lrs={lr:g} for all groups, which discards"
                f" their learning rates. To keep the ratios, use swa_lrs={lrs}"
            )


def _weight_averaging_callbacks(trainer: Trainer) -> list[Any]:
    """Returns the trainer's callbacks that average weights, and then replace the schedule."""
    kinds = either("callbacks.StochasticWeightAveraging")
    return [each for each in trainer.callbacks if isinstance(each, kinds)]  # type: ignore[attr-defined]
