"""A small module and its data, for real training runs."""

from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adam import AdamMixin
from tests.support.memory_logger import MemoryLogger

BATCH = 8
LR = 1e-2
ADAMW = {"lr": LR, "weight_decay": 0.1, "decoupled_weight_decay": True}


class Lit(AdamMixin, L.LightningModule):
    """Regression with matrices, a norm and biases; takes configs like users' modules."""

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


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    """Fails unless two modules have the same parameters, bit by bit."""
    pairs = list(zip(parameters(one), parameters(other), strict=True))
    assert pairs
    assert all(torch.equal(*pair) for pair in pairs)


class LearningRates(L.Callback):
    """Records the learning rate of the first group before each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


class TrainingRun(NamedTuple):
    """A completed training run with its logged values."""

    trainer: L.Trainer
    module: L.LightningModule
    logger: MemoryLogger

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.logger.rows if key in metrics]

    def steps_of(self, key: str) -> list[int | None]:
        """Returns the x values under which a key was logged."""
        return self.logger.steps_of(key)


def run_training(
    module: L.LightningModule,
    *callbacks: L.Callback | None,
    data: Any = 6,
    validation: Any = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = False,
    **flags: Any,
) -> TrainingRun:
    """Trains a module for an epoch, with a MemoryLogger.

    Args:
        module: The module.
        *callbacks: The trainer's callbacks. None stands for no callback.
        data: The training data, or the number of batches of the module's own data.
        validation: The validation data.
        ckpt_path: The checkpoint to resume from.
        weights_only: How the checkpoint is loaded; None for the default of Lightning.
        **flags: Flags of the trainer.
    """
    given = flags.get("logger")
    recorder = given if isinstance(given, MemoryLogger) else MemoryLogger()
    settings = {"max_epochs": 1, "logger": recorder, **flags}
    runner = trainer(callbacks=[each for each in callbacks if each is not None], **settings)
    batches = loader(data) if isinstance(data, int) else data
    runner.fit(module, batches, validation, ckpt_path=ckpt_path, weights_only=weights_only)
    return TrainingRun(runner, module, recorder)
