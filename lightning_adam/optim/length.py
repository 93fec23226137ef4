"""Computes the length of a Trainer's run in optimizer steps."""

import itertools
import math
from typing import Any

from lightning.pytorch import Trainer

from lightning_adam._compat.lightning import either, is_smoke_test
from lightning_adam.optim.shapes import RunLength


def run_length(trainer: Trainer, earlier: RunLength | None = None) -> RunLength:
    """Returns the number of optimizer steps of a run and of its epochs.

    Completed steps count as they were taken, so the length is also right for a resumed run, and
    after the number of batches per epoch has changed.

    Args:
        trainer: The trainer. Its data is set up if it is not yet.
        earlier: The previous result, for the lengths of completed epochs (default: None).
    """
    if is_smoke_test(trainer) or trainer.limit_train_batches == 0:
        # A smoke test (fast_dev_run) must accept the schedule of the whole run.
        return RunLength(10**9, 10**6)
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    epochs, batches = trainer.max_epochs or 1, trainer.num_training_batches
    max_steps = None if trainer.max_steps == -1 else trainer.max_steps
    if not math.isfinite(batches):
        return RunLength(max_steps)
    accumulations = _accumulations(trainer)
    planned = [math.ceil(batches / each) for each in accumulations]
    if epochs == -1:
        return RunLength(max_steps, planned[0])
    first = min(trainer.current_epoch, epochs)
    begin = sum(planned[:first])
    if trainer.lightning_module.automatic_optimization:
        # In manual optimization, global_step counts the steps of all optimizers.
        begin = trainer.global_step
        in_epoch = _batches_done(trainer)
        if in_epoch and first < epochs:
            is_over = in_epoch >= batches
            begin -= planned[first] if is_over else in_epoch // accumulations[first]
    ends = list(itertools.accumulate(planned[:first]))
    if earlier is not None and earlier.epoch_ends[first - 1 : first] == (begin,):
        ends = list(earlier.epoch_ends[:first])
    elif ends:
        # A checkpoint does not contain the number of steps of each epoch.
        ends = [round(begin * each / ends[-1]) for each in ends]
    ends += [begin + each for each in itertools.accumulate(planned[first:])]
    total = ends[-1]
    return RunLength(min(total, max_steps or total), total / epochs, tuple(ends))


def _batches_done(trainer: Trainer) -> int:
    """Returns the completed batches of the epoch in which the loaded checkpoint was saved."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    is_within = trainer.fit_loop.restarting and epochs.started > epochs.processed
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready if is_within else 0


def _accumulations(trainer: Trainer) -> list[int]:
    """Returns the number of batches per optimizer step, for each epoch."""
    epochs = range(max(trainer.max_epochs or 1, 1))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, either("callbacks.GradientAccumulationScheduler")):
            return [callback.get_accumulate_grad_batches(epoch) for epoch in epochs]
    return [trainer.accumulate_grad_batches] * len(epochs)
