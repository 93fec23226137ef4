"""A step in between: what one that is not measured gets longer by."""

import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.monitor_cost.timing import Work
from benchmarks.monitor_cost.training import trainer
from benchmarks.quiet import progress, silence
from lightning_adam import AdamMonitor


def in_between(rounds: int, folder: str) -> dict[str, list[float]]:
    monitor = AdamMonitor(every_n_steps=10**9)
    taken = InBetween(monitor, rounds)
    with silence():
        trainer(CSVLogger(folder), [monitor, taken], steps=2, device="cpu").fit(
            LitStill(),
            DataLoader([torch.ones(4) for _ in range(2)]),  # type: ignore[arg-type]
        )
    return taken.microseconds


class Still(torch.optim.AdamW):
    """Its steps change nothing: what they take is what the hooks take."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()


class LitStill(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Still(self.parameters())


@dataclass
class InBetween(L.Callback):
    """Takes many steps, with and without an AdamMonitor that is not due."""

    monitor: AdamMonitor
    rounds: int
    steps: int = 1000
    microseconds: dict[str, list[float]] = field(default_factory=dict)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, *others: Any
    ) -> None:
        # The first step is measured.
        if not trainer.fit_loop.epoch_loop.batch_idx:
            return
        (watched,) = trainer.optimizers
        bare = Still(module.parameters())

        def with_callback() -> None:
            self.monitor.on_before_optimizer_step(trainer, module, watched)
            watched.step()
            self.monitor.on_train_batch_end(trainer, module, *others)

        kinds: dict[str, Work] = {
            "without a monitor": bare.step,
            "without a monitor, again": bare.step,
            "the optimizer's hooks": watched.step,
            "and the callback's": with_callback,
        }
        for _ in progress(range(self.rounds), "in between"):
            here = {name: self._one_of(work) for name, work in kinds.items()}
            least, *rest = here
            for name in rest:
                self.microseconds.setdefault(name, []).append(here[name] - here[least])

    def _one_of(self, work: Work) -> float:
        begin = time.perf_counter()
        for _ in range(self.steps):
            work()
        return 1e6 * (time.perf_counter() - begin) / self.steps
