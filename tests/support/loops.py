"""A table of training loops: modules, data and flags of the Trainer."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import build_adam
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.training import (
    ADAMW,
    BATCH,
    Lit,
    TrainingRun,
    loader,
    loss_of,
    network,
    run_training,
)

LINEAR = {"name": "linear"}
STEP = STATISTICS["step"].key
COMPARED = ("grad_norm", "exp_avg_rms", "update_norm", "lr", "step")
MAX_NORM = 1e-3
"""Far below the norm of any gradient."""
Batch = tuple[Tensor, Tensor]


class Clock:
    """The clock of the Trainer's timer, which advances with the batches."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


class Timed(Lit):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        Clock.now += 0.3
        return super().training_step(batch, batch_idx)


class Validating(Lit):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.net, batch))


class Skipping(Lit):
    """`training_step` returns None for some batches, counted from the run's first."""

    skipped: tuple[int, ...] = (1, 4)
    batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.batches += 1
        return None if self.batches - 1 in self.skipped else super().training_step(batch, batch_idx)


class SkippingFirst(Skipping):
    skipped = (0,)


class SkippingSecondOfTwo(Skipping):
    skipped = (1, 3, 5)


class ZeroGradients(Skipping):
    """With gradients of 0 instead of None, a batch without a loss still takes a step."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class StepEverySecondBatch(Lit):
    def optimizer_step(  # type: ignore[override]
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        if batch_idx % 2:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()


class OwnClipping(Lit):
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, MAX_NORM, "norm")


class Compiled(Lit):
    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


class WithoutLog(Lit):
    """Lightning's `log` cannot be compiled."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


def compiled_whole(optimizer: Any = None, scheduler: Any = None) -> L.LightningModule:
    compiled: Any = torch.compile(WithoutLog(optimizer, scheduler), backend="eager")
    return compiled  # type: ignore[no-any-return]


class Manual(Lit):
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
                self.before_step(optimizer)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()

    def before_step(self, optimizer: Any) -> None:
        pass


class ManualTwoSteps(Manual):
    steps_a_batch = 2


class ManualEverySecondBatch(Manual):
    batches_a_step = 2


class ManualRawOptimizer(Manual):
    raw = True


class ManualClosure(Manual):
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
    """Two optimizers. That of the discriminator steps at every second batch only."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.configs = optimizer, scheduler
        # `network` seeds both.
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


def stream() -> DataLoader[Batch]:
    return DataLoader(Stream(), batch_size=BATCH)


@dataclass(frozen=True)
class Loop:
    """A training run: by default 1 epoch of 6 batches."""

    name: str
    steps: int
    """The optimizer steps it takes."""
    length: int | None = None
    """The length of its schedule, if the run does not come to the schedule's end."""
    kind: Callable[..., L.LightningModule] = Lit
    flags: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[L.Callback]] = list
    data: Callable[[], Any] = lambda: loader(6)
    scheduler: dict[str, Any] = field(default_factory=lambda: LINEAR)
    measured: list[int] | None = None
    """The steps at which measurements are logged, if not all."""
    is_logged: bool = True
    optimizer: str = ""
    """The name in the keys, of the first of several optimizers."""

    def key_of(self, name: str) -> str:
        """Returns the key of a statistic of the model."""
        return STATISTICS[name].key_of(f"optimizer/{self.optimizer}/" if self.optimizer else "")


def growing() -> list[L.Callback]:
    return [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]


def shrinking() -> list[L.Callback]:
    return [GradientAccumulationScheduler({0: 4, 1: 1})]


LOOPS = [
    Loop("plain", 6),
    Loop(
        "accumulation with a partial last step",
        4,
        flags={"accumulate_grad_batches": 4, "max_epochs": 2},
    ),
    Loop(
        "accumulation over more than an epoch",
        2,
        flags={"accumulate_grad_batches": 10, "max_epochs": 2},
    ),
    Loop("accumulation and max_steps", 3, flags={"accumulate_grad_batches": 2, "max_steps": 3}),
    Loop("growing accumulation", 6 + 3 + 2, flags={"max_epochs": 3}, callbacks=growing),
    Loop(
        "growing accumulation with max_steps",
        8,
        flags={"max_epochs": 3, "max_steps": 8},
        callbacks=growing,
    ),
    Loop(
        "shrinking accumulation with max_steps beyond the end",
        2 + 6 + 6,
        flags={"max_epochs": 3, "max_steps": 30},
        callbacks=shrinking,
    ),
    Loop(
        "changing accumulation with max_epochs=-1",
        8,
        flags={"max_epochs": -1, "max_steps": 8},
        callbacks=shrinking,
    ),
    Loop(
        "changing accumulation over data without a length",
        5,
        flags={"max_epochs": 3, "max_steps": 5},
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 1})],
        data=stream,
    ),
    Loop("clipping by norm", 6, flags={"gradient_clip_val": MAX_NORM}),
    Loop("configure_gradient_clipping", 6, kind=OwnClipping),
    Loop("manual optimization with a closure", 6, kind=ManualClosure),
    Loop(
        "manual optimization, two steps a batch, max_steps",
        8,
        kind=ManualTwoSteps,
        flags={"max_steps": 8},
        measured=[2, 4, 6, 8],
    ),
    Loop("manual optimization, two batches a step", 3, 6, kind=ManualEverySecondBatch),
    Loop("manual optimization with the raw optimizer", 6, kind=ManualRawOptimizer),
    Loop("two optimizers", 6, kind=Gan, optimizer="generator"),
    Loop("None for some batches", 4, 6, kind=Skipping),
    Loop("None for the first batch", 5, 6, kind=SkippingFirst),
    Loop(
        "None for the second of two accumulated batches",
        3,
        kind=SkippingSecondOfTwo,
        flags={"accumulate_grad_batches": 2},
    ),
    Loop("None, with gradients of 0", 6, kind=ZeroGradients),
    Loop("optimizer_step at every second batch", 3, 6, kind=StepEverySecondBatch),
    Loop("max_steps", 4, flags={"max_steps": 4}),
    Loop("max_steps alone", 13, flags={"max_epochs": None, "max_steps": 13}),
    Loop(
        "max_time before the end",
        4,
        12,
        kind=Timed,
        flags={"max_epochs": 2, "max_time": {"seconds": 1}},
    ),
    Loop(
        "data without a length",
        7,
        flags={"max_epochs": -1, "max_steps": 7},
        data=stream,
    ),
    Loop(
        "validation across epochs",
        12,
        kind=Validating,
        flags={"val_check_interval": 8, "check_val_every_n_epoch": None, "max_epochs": 2},
    ),
    Loop("limit_train_batches", 8, flags={"limit_train_batches": 4, "max_epochs": 2}),
    Loop("fast_dev_run", 1, 10**9, kind=Validating, flags={"fast_dev_run": True}, is_logged=False),
    Loop("compiled module", 6, kind=compiled_whole),
    Loop(
        "mean of the weights with checkpoints",
        12,
        kind=Validating,
        flags={"max_epochs": 2, "enable_checkpointing": True},
        callbacks=lambda: [WeightAveraging(), ModelCheckpoint(".", save_top_k=-1)],
    ),
]

DISTINCT_LOOPS = (
    "plain",
    "accumulation with a partial last step",
    "clipping by norm",
    "manual optimization with a closure",
    "manual optimization, two steps a batch, max_steps",
    "manual optimization with the raw optimizer",
    "two optimizers",
    "None for some batches",
    "compiled module",
)
"""Loops that differ in how and when the optimizer's step is called."""


def each_of(names: Collection[str]) -> pytest.MarkDecorator:
    loops = [pytest.param(loop, id=loop.name) for loop in LOOPS if loop.name in names]
    assert len(loops) == len(names)
    return pytest.mark.parametrize("loop", loops)


each_loop = each_of([loop.name for loop in LOOPS])
each_distinct_loop = each_of(DISTINCT_LOOPS)


def run_loop(loop: Loop, *callbacks: L.Callback, scheduler: Any = None) -> TrainingRun:
    """Runs a loop with additional callbacks."""
    module = loop.kind(ADAMW, scheduler or loop.scheduler)
    flags = {"num_sanity_val_steps": 0, **loop.flags}
    validation = loader(2) if isinstance(module, Validating) else None
    added = (*loop.callbacks(), *callbacks)
    return run_training(module, *added, data=loop.data(), validation=validation, **flags)


@cache
def baseline_fit(name: str) -> TrainingRun:
    """Runs a loop of the table without the monitor."""
    return run_loop(next(loop for loop in LOOPS if loop.name == name))
