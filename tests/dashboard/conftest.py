"""A training of which everything was logged, to W&B and to Lightning's CSVLogger."""

from pathlib import Path
from typing import NamedTuple

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.schema import Scope
from tests.dashboard.written import wait_for_end
from tests.support.commands import offline_runs
from tests.support.training import ADAMW, Lit, loader, loss_of, trainer

UNDEFINED = {"amsgrad_gap", "decay_to_grad"}
"""The statistics that AdamW without amsgrad has none of."""
Batch = tuple[Tensor, Tensor]


class Judged(Lit):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.net, batch))


class Trained(NamedTuple):
    wandb: Path
    csv: Path
    """The folder of each logger's run."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    monitor = AdamMonitor(
        every_n_steps=1,
        scopes=list(Scope),
        statistics="all",
        histograms_every_n_steps=2,
        layer_table=True,
    )
    csv = CSVLogger(folder)
    loggers = [WandbLogger(offline=True, save_dir=folder, name="trained"), csv]
    groups = [{"name": "net.head", "match": "net.3.*", "lr_scale": 2.0}]
    module = Judged({**ADAMW, "groups": groups}, {"name": "cosine", "warmup_steps": 3})
    fit = trainer(max_epochs=1, callbacks=[monitor], logger=loggers, log_every_n_steps=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("WANDB_DATA_DIR", str(folder))
        try:
            fit.fit(module, loader(12), loader(1))
        finally:
            wandb.finish()
    (offline_run,) = offline_runs(folder)
    (file,) = offline_run.glob("*.wandb")
    wait_for_end(file)
    return Trained(offline_run, Path(csv.log_dir))
