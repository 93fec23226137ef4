"""A Trainer → the length of its run in optimizer steps."""

import math

from lightning.pytorch import Trainer

from lightning_adam._compat.lightning import either, is_smoke_test
from lightning_adam.optim.shapes import RunLength


def run_length(trainer: Trainer) -> RunLength:
    """Returns the number of optimizer steps of a run and of an epoch.

    Args:
        trainer: The trainer, whose data is set up if it is not yet.
    """
    total_steps = steps_of(trainer)
    batches = trainer.num_training_batches / _accumulations(trainer)[0]
    return RunLength(total_steps, math.ceil(batches) if math.isfinite(batches) else None)


def steps_of(trainer: Trainer) -> int | None:
    """Returns the number of optimizer steps of a run; None if it has no end or is not known.

    Those that are done count, so that a run that goes on after a checkpoint, or with another number
    of batches in an epoch, has the length that it will have.

    Args:
        trainer: The trainer, whose data is set up if it is not yet.
    """
    if is_smoke_test(trainer):
        # A smoke test of one batch must accept the schedule of the whole run.
        return 10**9
    # Sets up the data.
    estimate = trainer.estimated_stepping_batches
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs == -1 or not math.isfinite(batches):
        return int(estimate) if math.isfinite(estimate) and estimate >= 0 else None
    accumulations = _accumulations(trainer)
    done, first, in_epoch = 0, 0, 0
    if trainer.lightning_module.automatic_optimization:
        # Otherwise the steps are those of all optimizers.
        done, first, in_epoch = trainer.global_step, trainer.current_epoch, _batches_done(trainer)
    remaining = sum(math.ceil(batches / each) for each in accumulations[first:])
    if first < len(accumulations):
        remaining -= in_epoch // accumulations[first]
    total = done + remaining
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def _batches_done(trainer: Trainer) -> int:
    """The batches of the epoch in whose middle a checkpoint was saved."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else progress.current.ready


def _accumulations(trainer: Trainer) -> list[int]:
    """The number of batches per optimizer step, by epoch."""
    epochs = range(max(trainer.max_epochs or 1, 1))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, either("callbacks.GradientAccumulationScheduler")):
            return [callback.get_accumulate_grad_batches(epoch) for epoch in epochs]
    return [trainer.accumulate_grad_batches] * len(epochs)
