"""A small module and its data, to train for real."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin

BATCH = 8
LR = 1e-2
ADAMW = {"lr": LR, "weight_decay": 0.1, "decoupled_weight_decay": True}


class Lit(AdamMixin, L.LightningModule):
    """Regression with matrices, a norm and biases; the configs as users pass them."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.net = network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.log("loss", loss, on_step=True)
        return loss


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(net(inputs), targets)


def loader(batches: int) -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randn(batches * BATCH, 6, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(inputs, inputs[:, :1].sin()), batch_size=BATCH)


def trainer(**settings: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{**quiet, **settings})


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]
