"""Ways to be trained: a table of modules, data and flags of the Trainer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import build_adam
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.training import BATCH, Lit, loader, loss_of, network

LINEAR = {"name": "linear"}
STEP = STATISTICS["step"].key
COMPARED = ("grad_norm", "exp_avg_rms", "update_norm", "lr", "step")
Batch = tuple[Tensor, Tensor]


class Clock:
    """What the Trainer's timer reads: it goes on with the batches."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


class Timed(Lit):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        Clock.now += 0.3
        return super().training_step(batch, batch_idx)


class Judged(Lit):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.net, batch))


class Skipping(Lit):
    """`training_step` returns None for some batches, counted from the run's first."""

    skipped: tuple[int, ...] = (1, 4)
    batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.batches += 1
        return None if self.batches - 1 in self.skipped else super().training_step(batch, batch_idx)


class SkippingTheFirst(Skipping):
    skipped = (0,)


class SkippingAnEpoch(Skipping):
    skipped = (6, 7, 8, 9, 10, 11)


class SkippingTheSecondOfTwo(Skipping):
    skipped = (1, 3, 5)


class KeepingZeroGradients(Skipping):
    """With gradients of 0 in place of none, a batch without a loss is a step all the same."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class SteppingEverySecond(Lit):
    def optimizer_step(  # type: ignore[override]
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        if batch_idx % 2:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()


class ClippingItself(Lit):
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, 1e-3, "norm")


class Checkpointed(Lit):
    """Keeps no activations."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        def forward(inputs: Tensor) -> Tensor:
            return checkpoint(self.net, inputs, use_reentrant=False)  # type: ignore[no-any-return]

        return nn.functional.mse_loss(forward(batch[0]), batch[1])


class Compiled(Lit):
    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


class Silent(Lit):
    """Lightning's `log` cannot be compiled."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


def compiled_whole(optimizer: Any = None, scheduler: Any = None) -> L.LightningModule:
    compiled: Any = torch.compile(Silent(optimizer, scheduler), backend="eager")
    return compiled  # type: ignore[no-any-return]


class ByHand(Lit):
    """Manual optimization."""

    steps_a_batch = 1
    batches_a_step = 1
    raw = False

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.raw)
        scheduler: Any = self.lr_schedulers()
        for _ in range(self.steps_a_batch):
            if batch_idx % self.batches_a_step == 0:
                optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            if (batch_idx + 1) % self.batches_a_step == 0:
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()


class ByHandTwice(ByHand):
    steps_a_batch = 2


class ByHandEverySecond(ByHand):
    batches_a_step = 2


class ByHandPastLightning(ByHand):
    raw = True


class ByHandWithClosure(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(self.net, batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        if self.lr_schedulers() is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]


class Gan(L.LightningModule):
    """Two optimizers, that of the discriminator stepping at every second batch only."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.configs = optimizer, scheduler
        # The network's own seed is for both.
        self.discriminator, self.generator = network(), nn.Linear(6, 6)

    def configure_optimizers(self) -> Any:
        parts = ((self.generator, 6), (self.discriminator, 3))
        return [
            build_adam(part, *self.configs, total_steps, trainer=self.trainer)
            for part, total_steps in parts
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        schedulers: Any = self.lr_schedulers() or [None, None]
        for index, optimizer in enumerate(self.optimizers()):
            if index == 1 and batch_idx % 2 == 0:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            score = self.discriminator(self.generator(batch[0])).mean()
            self.manual_backward(score if index else -score)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            if schedulers[index] is not None:
                schedulers[index].step()


class Stream(IterableDataset[Batch]):
    """Without a length."""

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(4)
        while True:
            inputs = torch.randn(6, generator=generator)
            yield inputs, inputs[:1].sin()


class Finite(Stream):
    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in zip(super().__iter__(), range(len(self)), strict=False))

    def __len__(self) -> int:
        return 5 * BATCH


def stream(kind: type[Stream]) -> DataLoader[Batch]:
    return DataLoader(kind(), batch_size=BATCH)


def six_batches() -> DataLoader[tuple[Tensor, ...]]:
    return loader(6)


@dataclass(frozen=True)
class Loop:
    """A training: 6 batches an epoch, 1 epoch, unless it says otherwise."""

    name: str
    steps: int
    """Optimizer steps that it takes."""
    length: int | None = None
    """Those that its schedule is long, if it does not come to the end of it."""
    kind: Callable[..., L.LightningModule] = Lit
    flags: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[L.Callback]] = list
    data: Callable[[], Any] = six_batches
    scheduler: dict[str, Any] = field(default_factory=lambda: LINEAR)
    measured: list[int] | None = None
    """The steps whose measurements are logged, if these are not all."""
    is_logged: bool = True
    suffix: str = ""
    """What stands at the end of its keys."""


LOOPS = [
    Loop("plain", 6),
    Loop("three epochs", 18, flags={"max_epochs": 3}),
    Loop(
        "accumulation, an epoch's last one partial",
        4,
        flags={"accumulate_grad_batches": 4} | {"max_epochs": 2},
    ),
    Loop(
        "accumulation of more than an epoch has",
        2,
        flags={"accumulate_grad_batches": 10} | {"max_epochs": 2},
    ),
    Loop("accumulation and max_steps", 3, flags={"accumulate_grad_batches": 2, "max_steps": 3}),
    Loop(
        "accumulation that grows",
        6 + 3 + 2,
        flags={"max_epochs": 3},
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})],
    ),
    Loop(
        "accumulation that grows, and max_steps",
        8,
        flags={"max_epochs": 3, "max_steps": 8},
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})],
    ),
    Loop(
        "accumulation that shrinks, and max_steps beyond the end",
        2 + 6 + 6,
        flags={"max_epochs": 3, "max_steps": 30},
        callbacks=lambda: [GradientAccumulationScheduler({0: 4, 1: 1})],
    ),
    Loop(
        "accumulation that changes in infinite training",
        8,
        flags={"max_epochs": -1, "max_steps": 8},
        callbacks=lambda: [GradientAccumulationScheduler({0: 4, 1: 1})],
    ),
    Loop(
        "accumulation that changes over data without a length",
        5,
        flags={"max_epochs": 3, "max_steps": 5},
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 1})],
        data=partial(stream, Stream),
    ),
    Loop("clipping by norm", 6, flags={"gradient_clip_val": 1e-3}),
    Loop(
        "clipping by value",
        6,
        flags={"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
    ),
    Loop("clipping of its own", 6, kind=ClippingItself),
    Loop("by hand", 6, kind=ByHand),
    Loop("by hand, with a closure", 6, kind=ByHandWithClosure),
    Loop(
        "by hand, two steps a batch",
        12,
        kind=ByHandTwice,
        scheduler={"name": "linear", "total_steps": 12},
        measured=[2, 4, 6, 8, 10, 12],
    ),
    Loop(
        "by hand, two steps a batch, and max_steps",
        8,
        kind=ByHandTwice,
        flags={"max_steps": 8},
        measured=[2, 4, 6, 8],
    ),
    Loop("by hand, two batches a step", 3, 6, kind=ByHandEverySecond),
    Loop("by hand, past Lightning", 6, kind=ByHandPastLightning),
    Loop("two optimizers", 6, kind=Gan, suffix="/optimizer/generator"),
    Loop("no loss of some batches", 4, 6, kind=Skipping),
    Loop("no loss of the first batch", 5, 6, kind=SkippingTheFirst),
    Loop("no loss in an epoch", 12, 18, kind=SkippingAnEpoch, flags={"max_epochs": 3}),
    Loop(
        "no loss of the second of two that accumulate",
        3,
        kind=SkippingTheSecondOfTwo,
        flags={"accumulate_grad_batches": 2},
    ),
    Loop("no loss, and gradients of 0", 6, kind=KeepingZeroGradients),
    Loop("a step at every second batch", 3, 6, kind=SteppingEverySecond),
    Loop("max_steps", 4, flags={"max_steps": 4}),
    Loop("max_steps beyond the end", 12, flags={"max_epochs": 2, "max_steps": 100}),
    Loop("max_steps, without an end of epochs", 13, flags={"max_epochs": -1, "max_steps": 13}),
    Loop("max_steps alone", 13, flags={"max_epochs": None, "max_steps": 13}),
    Loop(
        "max_time before the end",
        4,
        12,
        kind=Timed,
        flags={"max_epochs": 2, "max_time": {"seconds": 1}},
    ),
    Loop(
        "max_time alone",
        4,
        10,
        kind=Timed,
        flags={"max_epochs": -1, "max_time": {"seconds": 1}},
        scheduler={"name": "linear", "total_steps": 10},
        data=partial(loader, 2),
    ),
    Loop("data with a length", 10, flags={"max_epochs": 2}, data=partial(stream, Finite)),
    Loop(
        "data without a length",
        7,
        flags={"max_epochs": -1, "max_steps": 7},
        data=partial(stream, Stream),
    ),
    Loop(
        "validation in the middle",
        12,
        kind=Judged,
        flags={"val_check_interval": 0.5} | {"max_epochs": 2},
    ),
    Loop("validation every 4 batches", 6, kind=Judged, flags={"val_check_interval": 4}),
    Loop(
        "validation across epochs",
        12,
        kind=Judged,
        flags={"val_check_interval": 8, "check_val_every_n_epoch": None, "max_epochs": 2},
    ),
    Loop(
        "early stopping",
        6,
        18,
        kind=Judged,
        flags={"max_epochs": 3},
        callbacks=lambda: [EarlyStopping("val/loss", stopping_threshold=math.inf)],
    ),
    Loop("overfit_batches", 4, kind=Judged, flags={"overfit_batches": 2, "max_epochs": 2}),
    Loop("overfit_batches, a share", 3, kind=Judged, flags={"overfit_batches": 0.5}),
    Loop("limit_train_batches", 8, flags={"limit_train_batches": 4, "max_epochs": 2}),
    Loop("limit_train_batches, a share", 3, flags={"limit_train_batches": 0.5}),
    Loop("fast_dev_run", 1, 10**9, kind=Judged, flags={"fast_dev_run": True}, is_logged=False),
    Loop("fast_dev_run, 3 batches", 3, 10**9, flags={"fast_dev_run": 3}, is_logged=False),
    Loop("detect_anomaly", 6, flags={"detect_anomaly": True}),
    Loop("a compiled part", 6, kind=Compiled),
    Loop(
        "compiled as a whole",
        6,
        kind=compiled_whole,
    ),
    Loop("recomputed activations", 6, kind=Checkpointed),
    Loop(
        "a moving average of the weights",
        12,
        kind=Judged,
        flags={"max_epochs": 2},
        callbacks=lambda: [EMAWeightAveraging(decay=0.5)],
    ),
    Loop(
        "an average of the weights, and checkpoints",
        12,
        kind=Judged,
        flags={"max_epochs": 2, "enable_checkpointing": True},
        callbacks=lambda: [WeightAveraging(), ModelCheckpoint(".", save_top_k=-1)],
    ),
]
