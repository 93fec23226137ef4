"""Training with AdamMonitor, and modules whose steps are unusual to monitor."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_adam import AdamMonitor
from tests.support.memory_logger import MemoryLogger
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer

KEY = "adam_update/update_norm"
"""A statistic that is defined at every step."""


def fit_monitored(
    monitor: AdamMonitor | None, batches: int = 25, module: Any = None, **flags: Any
) -> tuple[L.LightningModule, MemoryLogger]:
    recorder = MemoryLogger()
    module = module or Lit(ADAMW, {"name": "cosine"})
    callbacks = [] if monitor is None else [monitor]
    settings = {"max_epochs": 1, "logger": recorder, "log_every_n_steps": 10, **flags}
    trainer(callbacks=callbacks, **settings).fit(module, loader(batches))
    return module, recorder


class TwoOptimizers(L.LightningModule):
    def __init__(self, second: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(), network()
        self.kind = second

    def configure_optimizers(self) -> Any:
        second = self.kind(self.second.parameters(), lr=1e-3)  # type: ignore[call-arg]
        return torch.optim.AdamW(self.first.parameters()), second

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.first, self.second), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss_of(net, batch))
            optimizer.step()


class TwoSteps(Lit):
    """Two optimizer steps a batch."""

    def __init__(self) -> None:
        super().__init__(ADAMW)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for _ in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()  # type: ignore[union-attr]
