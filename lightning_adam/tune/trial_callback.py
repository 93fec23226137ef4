"""What Lightning does for a trial: it tells what was seen, and stops what is hopeless."""

import math
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_adam._compat.lightning import AnyCallback
from lightning_adam.monitor.callback import AdamMonitor
from lightning_adam.monitor.failsafe import warn_only
from lightning_adam.tune.job import Identity, identity, in_one_line

if TYPE_CHECKING:
    from lightning_adam.tune.archive import Archive


def trial_callbacks() -> list[Callback]:
    """Returns the callback of the trial that this process runs; an empty list if it runs none.

    Example:
        >>> trial_callbacks()
        []
    """
    who = identity()
    return [] if who is None else [TrialCallback(who)]


class TrialCallback(AnyCallback):
    """Attached by Lightning to the trainers of a trial; the app does not know of it.

    After each validation it writes down the metric `monitor`, and ends the training where that is
    among the worst of the stage, or not finite. Where the archive cannot be reached, or something
    goes wrong, it does nothing more.

    Args:
        who: The trial.

    Example:
        >>> TrialCallback(Identity("journal:a", "mnist", "minimize", "lr", 3)).who.number
        3
    """

    def __init__(self, who: Identity) -> None:
        self.who = who
        self._archive: Archive | None = None
        self._is_off = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes down the precision, which decides whether eps is looked into."""
        if not trainer.is_global_zero:
            return
        dtypes = {str(each.dtype) for each in pl_module.parameters() if each.requires_grad}
        seen = " ".join([str(trainer.precision), *sorted(dtypes)]).replace("torch.", "")
        self._note(precision=seen)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks whether the training is worth its time; all processes stop together."""
        is_fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.who.monitor is None or not is_fitting:
            return
        stop = trainer.is_global_zero and self._is_hopeless(trainer, self.who.monitor)
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes down what the monitors have found."""
        if not trainer.is_global_zero:
            return
        monitors = [each for each in trainer.callbacks if isinstance(each, AdamMonitor)]  # type: ignore[attr-defined]
        found = [each for monitor in monitors for each in monitor.findings]
        codes = sorted({each.code for each in found if each.is_above_info})
        if codes:
            self._note(findings=codes)

    def _is_hopeless(self, trainer: Trainer, monitor: str) -> bool:
        if self._is_off:
            return False
        if monitor not in trainer.callback_metrics:
            self._is_off = True
            known = ", ".join(sorted(map(str, trainer.callback_metrics))) or "nothing"
            warn_only(
                f"hydra.sweeper.monitor={monitor} is not logged in validation, which logs {known}."
                " No trial is pruned."
            )
            return False
        value, step = float(trainer.callback_metrics[monitor]), trainer.global_step
        if not math.isfinite(value):
            return True
        try:
            archive = self._reached()
            stop = archive.should_stop(self.who.stage, self.who.number, step, value)
            if stop:
                archive.note(self.who.stage, self.who.number, stopped_at=step)
        except Exception as error:
            self._switch_off(error)
            return False
        return stop

    def _note(self, **attributes: object) -> None:
        if self._is_off:
            return
        try:
            self._reached().note(self.who.stage, self.who.number, **attributes)
        except Exception as error:
            self._switch_off(error)

    def _reached(self) -> "Archive":
        if self._archive is None:
            self._archive = self.who.archive()
        return self._archive

    def _switch_off(self, error: Exception) -> None:
        self._is_off = True
        warn_only(f"nothing more is told to the search ({in_one_line(error)}).")
