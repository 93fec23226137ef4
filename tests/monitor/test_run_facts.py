"""Facts in the run's config: size, device, precision, strategy, metric and rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_adam import AdamMonitor
from tests.reports.logged_training import Validated
from tests.support.tables import each_row
from tests.support.training import ADAMW, loader, network, trainer

FINDINGS = {"eps_dominates": {"threshold": 0.5}}


def logged_settings(
    tmp_path: Path, *callbacks: Callback, scheduler: Any = None, **flags: Any
) -> dict[str, Any]:
    """Returns the settings that AdamMonitor adds to the hyperparameters of a run."""
    module = Validated(ADAMW, scheduler)
    logger = CSVLogger(tmp_path)
    monitor = AdamMonitor(1, findings=flags.pop("findings", {}))
    fit = trainer(max_epochs=1, callbacks=[monitor, *callbacks], logger=logger, **flags)
    fit.fit(module, loader(2), loader(1))
    ours: dict[str, Any] = logger.experiment.hparams["lightning_adam"]
    return ours


def test_run_is_described_in_its_hyperparameters(tmp_path: Path) -> None:
    ours = logged_settings(tmp_path, precision="bf16-mixed", findings=FINDINGS)
    assert ours["run"] == {
        "parameters": sum(each.numel() for each in network().parameters()),
        "device": "cpu",
        "precision": "bf16-mixed",
        "strategy": "single_device",
        "metric": None,
    }
    assert ours["findings"] == FINDINGS
    assert logged_settings(tmp_path, findings=None)["findings"] is None


def test_metric_is_that_of_a_callback_or_of_a_plateau(tmp_path: Path) -> None:
    loss, accuracy = "val/loss", "val/accuracy"
    keep: dict[str, Any] = {"dirpath": tmp_path / "kept"}
    plateau = {"name": "plateau", "monitor": accuracy, "mode": "max"}
    table: list[tuple[list[Callback], Any, Any]] = [
        ([ModelCheckpoint(**keep)], None, None),
        ([ModelCheckpoint(**keep, monitor=accuracy, mode="max")], None, (accuracy, "max")),
        ([EarlyStopping(loss), ModelCheckpoint(**keep)], plateau, (loss, "min")),
        ([ModelCheckpoint(**keep)], plateau, (accuracy, "max")),
        ([], {"name": "cosine"}, None),
    ]
    with each_row() as row:
        for callbacks, scheduler, expected in table:
            with row((callbacks, scheduler)):
                flags = {"enable_checkpointing": True}
                metric = logged_settings(tmp_path, *callbacks, scheduler=scheduler, **flags)["run"][
                    "metric"
                ]
                assert metric == (expected and dict(zip(("name", "mode"), expected, strict=True)))


def test_metric_is_that_of_a_plateau_of_torch(tmp_path: Path) -> None:
    class Own(Validated):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val/accuracy"},
            }

    logger = CSVLogger(tmp_path)
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1)], logger=logger)
    fit.fit(Own(ADAMW), loader(2), loader(1))
    run = logger.experiment.hparams["lightning_adam"]["run"]
    assert run["metric"] == {"name": "val/accuracy", "mode": "max"}


def test_parameters_that_are_shared_or_frozen_count_once(tmp_path: Path) -> None:
    class Tied(Validated):
        def __init__(self) -> None:
            super().__init__(ADAMW)
            self.tied = self.net[0]
            self.frozen = nn.Linear(3, 1).requires_grad_(False)

    logger = CSVLogger(tmp_path)
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1)], logger=logger)
    fit.fit(Tied(), loader(2))
    expected = sum(each.numel() for each in network().parameters()) + 4
    assert logger.experiment.hparams["lightning_adam"]["run"]["parameters"] == expected


@pytest.mark.parametrize("has_own", [True, False])
def test_hparams_file_of_tensorboard_has_the_settings_of_both(
    has_own: bool, tmp_path: Path
) -> None:
    """The logger writes the file before the monitor adds its settings, and never overwrites it."""

    class Saving(Validated):
        def __init__(self, width: int = 3) -> None:
            super().__init__(ADAMW)
            if has_own:
                self.save_hyperparameters("width")

    logger = TensorBoardLogger(tmp_path)
    trainer(max_epochs=1, callbacks=[AdamMonitor(1)], logger=logger).fit(Saving(), loader(2))
    hparams = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text(encoding="utf-8"))
    assert hparams.pop("lightning_adam")["run"]["device"] == "cpu"
    assert hparams == ({"width": 3} if has_own else {})
