"""A run of which everything was logged, to W&B and to Lightning's CSVLogger."""

from pathlib import Path
from typing import NamedTuple

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.schema import Scope
from tests.dashboard.run_files import wait_for_end
from tests.support.commands import offline_runs
from tests.support.shared import shared
from tests.support.training import ADAMW, Lit, loader, loss_of, trainer

UNDEFINED = {"amsgrad_gap", "decay_to_grad"}
"""The statistics that are undefined for AdamW without amsgrad."""
Batch = tuple[Tensor, Tensor]


class Validated(Lit):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.net, batch))


class LoggedRun(NamedTuple):
    """The folder that each logger has left."""

    wandb: Path
    csv: Path


@pytest.fixture(scope="session")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> LoggedRun:
    folder = shared(tmp_path_factory, "logged_run", run_training)
    (offline_run,) = offline_runs(folder)
    return LoggedRun(offline_run, folder / "lightning_logs/version_0")


def run_training(folder: Path) -> None:
    monitor = AdamMonitor(
        every_n_steps=1,
        scopes=list(Scope),
        statistics="all",
        histograms_every_n_steps=2,
        layer_table=True,
    )
    loggers = [WandbLogger(offline=True, save_dir=folder, name="trained"), CSVLogger(folder)]
    groups = [{"name": "net.head", "match": "net.3.*", "lr_scale": 2.0}]
    module = Validated({**ADAMW, "groups": groups}, {"name": "cosine", "warmup_steps": 3})
    fit = trainer(max_epochs=1, callbacks=[monitor], logger=loggers, log_every_n_steps=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("WANDB_DATA_DIR", str(folder))
        try:
            fit.fit(module, loader(12), loader(1))
        finally:
            wandb.finish()
    (file,) = folder.rglob("offline-run-*/*.wandb")
    wait_for_end(file)
