"""A run with full logging to W&B and Lightning's CSVLogger."""

from pathlib import Path
from typing import NamedTuple

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_adam.config.monitor import Scope
from tests.reports.logged_training import log_training
from tests.support.commands import offline_runs
from tests.support.shared import shared

UNDEFINED = {
    *("amsgrad_gap", "decay_to_grad"),
    *("grad_norm_before_clip", "clip_coefficient", "loss_scale"),
}
"""The statistics that are undefined for AdamW without amsgrad, clipping and GradScaler."""


class LoggedRun(NamedTuple):
    wandb: Path
    csv: Path


@pytest.fixture(scope="session")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> LoggedRun:
    folder = shared(tmp_path_factory, "logged_run", run_training)
    (offline_run,) = offline_runs(folder)
    return LoggedRun(offline_run, folder / "lightning_logs/version_0")


def run_training(folder: Path) -> None:
    to_wandb = WandbLogger(offline=True, save_dir=folder, name="trained")
    loggers = [to_wandb, CSVLogger(folder)]
    groups = [{"name": "net.head", "match": "net.3.*", "lr_scale": 2.0}]
    scopes = list(Scope)
    log_training(folder, loggers, 12, {"groups": groups}, scopes=scopes, histograms_every_n_steps=2)
