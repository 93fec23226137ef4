"""What schedules need from a Trainer's loop: validations, the length of the run, found rates.

A callback rather than hooks of the module, which a user may override without calling `super()`.
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
    averaged_lr,
    either,
    is_of_lr_find,
    loaded_checkpoint,
    logged_metrics,
    restore_loaders,
)
from lightning_adam.config.errors import ConfigError, ConfigPath, nearest
from lightning_adam.config.schedule import Mode
from lightning_adam.optim import resume
from lightning_adam.optim.console import log_info
from lightning_adam.optim.hyperparameters import make_plain
from lightning_adam.optim.length import run_length
from lightning_adam.optim.param_groups import LR_SCALE, peak_lr
from lightning_adam.optim.schedulers import AnySchedule, set_peak

FALLING = r"loss|err|mae|mse|rmse|perplexity|ppl|nll|bpb|wer|cer|fid"
RISING = r"acc|f1|auc|auroc|precision|recall|score|iou|bleu|rouge|psnr|ssim|map"
"""Names of metrics that improve by falling, and by rising."""


class Watched:
    """An optimizer and its schedule in a Trainer.

    Args:
        trainer: The trainer.
        optimizer: The optimizer.
        schedule: Its schedule; None if the learning rate is constant.
        path: The place of the schedule's config.
        monitor: The metric to compare after each validation; None if there is none.
        strict: Whether a metric that is not logged is an error.
        has_length_of_run: Whether the length of the schedule is that of the trainer's run.
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
        """Whether validation logs it."""
        self.is_compared = False
        """Whether it has been compared in this epoch."""
        self.has_epoch = False
        """Whether an epoch has ended since the fit began."""
        self.has_validated = False
        """Whether a validation has run since the fit began, if there is one."""
        self.has_length_of_run = has_length_of_run
        self._trainer = trainer
        self._found_lr: float | None = None
        before_step = torch.compiler.disable(lambda *_: self._before_step())  # type: ignore[no-untyped-call]
        optimizer.register_step_pre_hook(before_step)

    @property
    def is_scheduled(self) -> bool:
        """Whether the schedule is used, which callbacks may replace."""
        entries = self._trainer.lr_scheduler_configs
        return self.schedule is not None and any(
            each.scheduler is self.schedule for each in entries
        )

    def set_peak(self, lr: float) -> None:
        """Sets the optimizer's learning rate, from which those of the groups follow.

        `lr_find` sets the same rate for all groups right after, which the next step undoes.
        """
        self._found_lr = lr
        set_peak(self.optimizer, self.schedule, lr)

    def _before_step(self) -> None:
        entries = self._trainer.lr_scheduler_configs
        searching = next((each for each in entries if is_of_lr_find(each.scheduler)), None)
        if searching is not None:
            # `lr_find` tries one learning rate for all groups.
            lrs = searching.scheduler.get_last_lr()
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * group.get(LR_SCALE, 1.0)
        elif self._found_lr is not None:
            set_peak(self.optimizer, self.schedule, self._found_lr)
            self._found_lr = None


class ScheduleCallback(AnyCallback):
    """Keeps schedules in step with a Trainer; `watch` adds it."""

    def __init__(self) -> None:
        self._all: list[Watched] = []
        self._handles: list[RemovableHandle] = []

    @classmethod
    def watch(cls, trainer: Trainer, watched: Watched) -> None:
        """Adds an optimizer with its schedule to a trainer."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        own = next((each for each in callbacks if isinstance(each, cls)), None)
        if own is None:
            own = cls()
            # Before those that save checkpoints, which then hold the new learning rate.
            callbacks.insert(0, own)
        own._all.append(watched)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._all = list(self._in_use(trainer))
        states = loaded_checkpoint(trainer).get("optimizer_states")
        if states is not None and len(states) != len(trainer.optimizers):
            raise ConfigError(
                f"Cannot resume {len(trainer.optimizers)} optimizers from a checkpoint of"
                f" {len(states)}",
                "Resume it with the module that it was trained with",
            )
        for watched in self._all:
            _warn_of_one_lr(trainer, watched)
        if trainer.strategy.restore_checkpoint_after_setup:
            self._handles = [
                resume.follow_shards(
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
        for watched in self._in_use(trainer):
            if watched.monitor is None or not watched.has_epoch:
                continue
            # What the module logs at the end of an epoch comes after the callback's hook.
            if not (watched.is_validated or watched.is_compared):
                self._compare(trainer, watched, trainer.callback_metrics)
            has_validated = watched.has_validated or not trainer.enable_validation
            if watched.strict and not watched.is_logged and has_validated:
                raise _not_logged(watched, list(trainer.callback_metrics))
            watched.is_compared = False
        self._update_lengths(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        for watched in self._in_use(trainer):
            if watched.monitor is None:
                continue
            metrics = logged_metrics(trainer)
            if not trainer.sanity_checking:
                watched.has_validated = True
                watched.is_validated |= watched.monitor in metrics
                self._compare(trainer, watched, metrics)
            elif (
                watched.strict
                and watched.monitor not in metrics
                # Otherwise training may log it.
                and nearest(watched.monitor, metrics, 1, cutoff=0.85)
            ):
                raise _not_logged(watched, list(metrics))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for watched in self._in_use(trainer):
            watched.has_epoch = True
            if watched.monitor is not None and not watched.is_validated:
                self._compare(trainer, watched, logged_metrics(trainer))

    def _compare(self, trainer: Trainer, watched: Watched, metrics: Any) -> None:
        """Has the schedule compare its metric, if it has been logged."""
        if watched.monitor in metrics and watched.schedule is not None:
            watched.is_logged = watched.is_compared = True
            watched.schedule.step(metrics[watched.monitor])

    def _in_use(self, trainer: Trainer) -> Iterator[Watched]:
        """Those that no strategy and no later fit has replaced."""
        for watched in self._all:
            is_kept = watched.schedule is None or watched.is_scheduled
            if any(each is watched.optimizer for each in trainer.optimizers) and is_kept:
                yield watched

    def _update_lengths(self, trainer: Trainer) -> None:
        """Follows the length of the run, which changes with that of an epoch."""
        if any(_averages(trainer)):
            # It adds an epoch without steps.
            return
        for watched in self._in_use(trainer):
            schedule = watched.schedule
            if schedule is None or not watched.has_length_of_run:
                continue
            length = run_length(trainer, schedule.length)
            if length != schedule.length:
                was = schedule.length.total_steps
                schedule.set_length(length)
                if was != length.total_steps:
                    log_info(
                        f"{watched.path.name}: the run has {length.total_steps} optimizer steps,"
                        f" not {was}, and the schedule follows"
                    )


def _not_logged(watched: Watched, available: list[str]) -> ConfigError:
    mode = str(getattr(watched.schedule and watched.schedule.plateau, "mode", Mode.min))
    wrong = RISING if mode == Mode.min.value else FALLING
    path, monitor = watched.path / "monitor", str(watched.monitor)
    fitting = [name for name in available if not re.search(wrong, name.lower())]
    logged = ", ".join(available) or "nothing"
    problem = f"is not logged. The module logs {logged}"
    return path.invalid(monitor, problem, *nearest(monitor, fitting, 1, cutoff=0.0))


def _warn_of_one_lr(trainer: Trainer, watched: Watched) -> None:
    """Warns that weight averaging sets one learning rate for groups that differ."""
    peaks = [float(peak_lr(group)) for group in watched.optimizer.param_groups]
    for callback in _averages(trainer):
        lr = averaged_lr(callback)
        if lr is not None and len(set(peaks)) > 1:
            lrs = [float(f"{lr * each / max(peaks):.3g}") for each in peaks]
            rank_zero_warn(
                f"StochasticWeightAveraging sets swa_lrs={lr:g} for all groups, which discards"
                f" their learning rates. To keep the ratios, use swa_lrs={lrs}"
            )


def _averages(trainer: Trainer) -> list[Any]:
    """The trainer's callbacks that replace the schedule and average weights."""
    kinds = either("callbacks.StochasticWeightAveraging")
    return [each for each in trainer.callbacks if isinstance(each, kinds)]  # type: ignore[attr-defined]
