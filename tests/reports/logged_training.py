"""Training runs with full logging."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_adam import AdamMonitor
from tests.reports.run_files import wait_for_end
from tests.support.training import ADAMW, Lit, loader, loss_of, trainer


class Validated(Lit):
    """Logs a loss and two validation metrics."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = loss_of(self.net, batch)
        self.log_dict({"val/accuracy": 1 / (1 + loss), "val/loss": loss})


def log_training(
    folder: Path, loggers: Sequence[Logger], batches: int, settings: Any, **monitored: Any
) -> None:
    """Trains with all statistics at every step, and waits until the W&B runs are complete.

    Adds `settings` to those of ADAMW.
    """
    monitor = AdamMonitor(every_n_steps=1, statistics="all", layer_table=True, **monitored)
    module = Validated({**ADAMW, **settings}, {"name": "cosine", "warmup_steps": 3})
    fit = trainer(max_epochs=1, callbacks=[monitor], logger=loggers, log_every_n_steps=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("WANDB_DATA_DIR", str(folder))
        try:
            fit.fit(module, loader(batches), loader(1))
        finally:
            wandb.finish()
    for file in folder.rglob("offline-run-*/*.wandb"):
        wait_for_end(file)
