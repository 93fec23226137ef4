"""Runs with callbacks of Lightning that change the optimizer, its rates or its schedule."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from lightning_adam import build_adam
from tests.support.memory_logger import MemoryLogger
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    Lit,
    assert_same_parameters,
    run_training,
)

LINEAR = {"name": "linear"}
EXPONENTIAL = {
    "_target_": "torch.optim.lr_scheduler.ExponentialLR",
    "gamma": 0.9,
    "interval": "step",
}
HEAD = {**ADAMW, "groups": [{"name": "head", "match": "net.3.*", "lr_scale": 10}]}
EPOCHS, STEPS = 4, 3


def averaging(lrs: Any, annealing: int = 2) -> Callable[[], L.Callback]:
    return lambda: StochasticWeightAveraging(lrs, swa_epoch_start=2, annealing_epochs=annealing)


CALLBACKS: dict[str, Callable[[], L.Callback]] = {
    "none": LambdaCallback,
    "one averaged rate": averaging(1e-3),
    "one averaged rate at once": averaging(1e-3, annealing=0),
    "averaged rates": averaging([1e-3, 1e-3, 1e-2, 1e-2]),
    "moving average": lambda: EMAWeightAveraging(decay=0.9),
    "average": WeightAveraging,
    "accumulation": lambda: GradientAccumulationScheduler({0: 1, 2: 2}),
    "timer": lambda: Timer({"hours": 1}),
    "monitor of rates": LearningRateMonitor,
}


class WithoutMixin(Lit):
    """Builds the optimizer without the mixin."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__()
        self.given = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        return build_adam(self, *self.given)


class Keep(L.Callback):
    """Saves a checkpoint after an epoch, and keeps the rates of the last group and of the first."""

    def __init__(self, epochs: int, file: Path) -> None:
        self.epochs = epochs
        self.file = file
        self.rates = list[tuple[float, float]]()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append((groups[0]["lr"], groups[-1]["lr"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs and not self.file.exists():
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [(Lit, None), (Lit, LINEAR), (WithoutMixin, EXPONENTIAL)],
    ids=["no schedule", "linear", "build_adam, ExponentialLR"],
)
def test_run_with_a_callback_is_resumed_bit_identically(
    kind: type[Lit], scheduler: Any, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"data": STEPS, "max_epochs": EPOCHS, "logger": MemoryLogger()}
    cases = [(name, epochs) for name in CALLBACKS for epochs in (1, 3)]
    with each_row() as row:
        for name, epochs in cases:
            with row((name, epochs)):
                file = tmp_path / f"{name}{epochs}.ckpt"
                whole, rest = Keep(epochs, file), Keep(EPOCHS + 1, file)
                make = CALLBACKS[name]
                uninterrupted = run_training(kind(HEAD, scheduler), make(), whole, **flags)
                resumed = run_training(
                    kind(HEAD, scheduler), make(), rest, ckpt_path=str(file), **flags
                )
                assert_same_parameters(resumed.module, uninterrupted.module)
                assert rest.rates == whole.rates[epochs * STEPS :]


FLATTENED: list[tuple[str, Any, Any, bool]] = [
    ("groups with scales, one rate", HEAD, 1e-3, True),
    ("groups with scales, a rate each", HEAD, [1e-3, 1e-3, 1e-2, 1e-2], False),
    ("groups of one rate", ADAMW, 1e-3, False),
]


@pytest.mark.parametrize("kind", [Lit, WithoutMixin])
def test_averaging_that_discards_lr_ratios_warns(kind: type[Lit]) -> None:
    with each_row() as row:
        for name, config, lrs, is_warned in FLATTENED:
            with row(name), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                module = kind(config, LINEAR)
                run_training(module, averaging(lrs)(), data=2, max_epochs=EPOCHS)
                found = [str(each.message) for each in caught]
                said = [each for each in found if "sets swa_lrs=0.001 for all groups" in each]
                assert len(said) == is_warned
                if is_warned:
                    assert (
                        "To keep the ratios, use swa_lrs=[0.0001, 0.0001, 0.001, 0.001]" in said[0]
                    )


def test_lrs_suggested_by_the_warning_keep_the_ratios(tmp_path: Path) -> None:
    keep = Keep(EPOCHS, tmp_path / "last.ckpt")
    lrs = [1e-4, 1e-4, 1e-3, 1e-3]
    run_training(Lit(HEAD, LINEAR), averaging(lrs, 0)(), keep, data=STEPS, max_epochs=EPOCHS)
    first, last = keep.rates[-1]
    assert last / first == pytest.approx(10)
