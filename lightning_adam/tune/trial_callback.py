"""Shortens the run of a tuned module, and records its facts for the search."""

import math
from collections.abc import Callable as Function
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adam._compat.lightning import AnyCallback
from lightning_adam.monitor.callback import AdamMonitor
from lightning_adam.monitor.failsafe import warn_only
from lightning_adam.tune.job import Trial, current_trial, format_error
from lightning_adam.tune.runs import MIN_LENGTH

MIN_STEPS = 8
"""Minimum number of steps of the shortest run."""


def trial_callbacks() -> list[Callback]:
    """Returns the callback of the run that this process trains; an empty list outside a search."""
    trial = current_trial()
    return [] if trial is None else [TrialCallback(trial)]


class TrialCallback(AnyCallback):
    """Shortens the Trainer that trains the tuned optimizer; added to every Trainer of a job.

    The Trainer ends after the run's fraction of its steps, with a validation. A schedule that
    reads the number of steps from the Trainer has that length.

    Args:
        trial: The run.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._is_tuned = False
        self._last_step: int | None = None
        self._counts_batches = False
        self._restore: Function[[], None] = lambda: None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps `configure_optimizers`, which shows whether the module has the tuned optimizer."""
        if stage != "fit":
            return
        original = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            del pl_module.configure_optimizers
            steps, fixed_length = _full_steps(trainer)
            if not fixed_length and self.trial.length < 1:
                self._shorten(trainer, max(1, round(steps * self.trial.length)))
            result = original()
            if self._counts_batches:
                trainer.fit_loop.epoch_loop.max_steps = -1
            tuned = [each for each in _optimizers(result) if self._is_tuned_by(each)]
            if not tuned:
                if self._last_step is None:
                    return result
                self._restore_length()
                return original()
            self._is_tuned = True
            groups = [group for each in tuned for group in each.param_groups]
            dtypes = {str(each.dtype) for group in groups for each in group["params"]}
            self._set_attributes(
                trainer,
                steps=steps if math.isfinite(steps) else None,
                fixed_length=fixed_length,
                state_dtypes=sorted(each.removeprefix("torch.") for each in dtypes),
            )
            return result

        pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a shortened run; Lightning then validates."""
        loop = trainer.fit_loop
        done = loop.total_batch_idx + 1 if self._counts_batches else trainer.global_step
        if self._last_step is not None and done >= self._last_step:
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the findings of the monitors."""
        if self._is_tuned:
            monitors = [each for each in trainer.callbacks if isinstance(each, AdamMonitor)]  # type: ignore[attr-defined]
            found = [each for monitor in monitors for each in monitor.findings]
            codes = sorted({each.code for each in found if each.is_above_info})
            self._set_attributes(trainer, findings=codes)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the length of the Trainer, because an app may continue with it."""
        self._restore_length()

    def _shorten(self, trainer: Trainer, steps: int) -> None:
        loop = trainer.fit_loop
        before = loop.epoch_loop.max_steps, loop.min_epochs, loop.epoch_loop.min_steps
        every = trainer.check_val_every_n_epoch

        def restore() -> None:
            loop.epoch_loop.max_steps, loop.min_epochs, loop.epoch_loop.min_steps = before
            trainer.check_val_every_n_epoch = every

        self._last_step, self._restore = steps, restore
        # In manual optimization, Lightning counts the steps of all optimizers, but estimates one
        # step per batch.
        is_manual = not trainer.lightning_module.automatic_optimization
        self._counts_batches = is_manual and before[0] == -1
        loop.epoch_loop.max_steps, loop.min_epochs, loop.epoch_loop.min_steps = steps, None, None
        if every is not None:
            trainer.check_val_every_n_epoch = 1

    def _restore_length(self) -> None:
        self._restore()
        self._last_step, self._restore, self._counts_batches = None, lambda: None, False

    def _is_tuned_by(self, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer has the hyperparameters of the run."""
        wanted = {name: _to_plain(value) for name, value in self.trial.hyperparameters.items()}
        defaults = {name: _to_plain(optimizer.defaults.get(name)) for name in wanted}
        return defaults == wanted

    def _set_attributes(self, trainer: Trainer, **attributes: Any) -> None:
        if not trainer.is_global_zero:
            return
        try:
            self.trial.history().set_attributes(self.trial.number, **attributes)
        except Exception as error:
            warn_only(f"the record of the run is incomplete ({format_error(error)}).")


def _full_steps(trainer: Trainer) -> tuple[float, str]:
    """Returns the steps of a full run, and why it cannot be shortened, or an empty string."""
    try:
        steps = trainer.estimated_stepping_batches
    except Exception as error:
        return math.inf, f"the number of steps is not known ({format_error(error)})"
    # It is -1 if the data have no length.
    if not 0 <= steps < math.inf:
        return math.inf, "the Trainer does not know its number of steps"
    if steps * MIN_LENGTH < MIN_STEPS:
        return steps, f"a run has only {steps} steps"
    return steps, ""


def _optimizers(configured: Any) -> Iterator[Optimizer]:
    """Yields the optimizers in what `configure_optimizers` returns."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _optimizers(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for each in configured:
            yield from _optimizers(each)


def _to_plain(value: Any) -> Any:
    """Converts a hyperparameter to lists and floats, to compare it after JSON."""
    if isinstance(value, list | tuple):
        return [_to_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | str) else float(value)
