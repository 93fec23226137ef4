"""`lightning.pytorch` and `pytorch_lightning`, which have different class objects."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adam import AdamMixin
from lightning_adam.config.optimizer import AdamConfig
from tests.support.training import LR, loss_of, network

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "log_every_n_steps": 1,
}


def trainer(package: str, **flags: Any) -> Any:
    """Returns a Trainer of a package."""
    return import_module(package).Trainer(**{**QUIET, **flags})


def plain_module(package: str, nan_at: int | None = None) -> Any:
    """Returns a module of a package, without the mixin; the loss of one batch may be NaN."""
    kind: Any = import_module(package).LightningModule

    class Plain(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net: nn.Module = network()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=LR)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = loss_of(self.net, batch)
            self.log("loss", loss)
            return loss * torch.nan if batch_idx == nan_at else loss

    return Plain()


def mixin_module(package: str) -> Any:
    """Returns a class of a package with the mixin, which records the learning rates of steps."""
    base: Any = import_module(package).LightningModule

    class Lit(AdamMixin, base):  # type: ignore[misc]
        def __init__(self, optimizer: AdamConfig, scheduler: dict[str, Any] | None = None) -> None:
            super().__init__(optimizer=optimizer, scheduler=scheduler)
            net = network()
            self.backbone, self.head = net[:3], net[3]
            self.rates: list[list[float]] = []

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            groups = self.trainer.optimizers[0].param_groups
            self.rates.append([float(group["lr"]) for group in groups])
            return loss_of(nn.Sequential(self.backbone, self.head), batch)

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("val/loss", loss_of(nn.Sequential(self.backbone, self.head), batch))

    return Lit
