"""The part `training`: segments of a real training, with and without the monitor, in turns."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.monitor_cost.results import NONE, NONE_AGAIN, Segments
from benchmarks.quiet import progress, silence
from benchmarks.small_gpt import SmallGPT, text_loader
from lightning_adam import AdamMonitor
from recipes._common import mnist_loaders
from recipes.char_gpt import LitGPT
from recipes.mnist import LitClassifier, small_cnn

INTERVALS: dict[str, int | None] = {
    NONE: None,
    NONE_AGAIN: None,
    "every 50": 50,
    "every 10": 10,
    "every step": 1,
}
"""The `every_n_steps` of the monitor, by arm; None: there is none."""


@dataclass
class Training:
    """What is trained: a new module for each segment, on the same data."""

    module: Callable[[], L.LightningModule]
    loader: DataLoader[Any]


def cnn(width: int) -> L.LightningModule:
    return LitClassifier(small_cnn(width), fused(2e-3), None)


def noise_loader() -> DataLoader[Any]:
    """In the place of MNIST, which takes seconds to be read."""
    images, labels = torch.rand(64, 1, 28, 28), torch.randint(10, (64,))
    return DataLoader(TensorDataset(images, labels), batch_size=8)


TRAININGS: dict[str, Callable[[], Training]] = {
    "mnist": lambda: Training(lambda: cnn(32), mnist_loaders(batch_size=64)[0]),
    "gpt": lambda: Training(
        lambda: LitGPT(SmallGPT(), fused(3e-4), None), text_loader(batch_size=8)
    ),
    "tiny": lambda: Training(lambda: cnn(1), noise_loader()),
}


def fused(lr: float) -> Any:
    return OmegaConf.create({"lr": lr, "fused": True})


class Clock(L.Callback):
    """Takes the time at the beginning of each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *others: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def train(name: str, device: str, rounds: int, batches: int, logger: Logger) -> dict[str, Segments]:
    """Segments with and without the monitor, in turns; each begins anew, with the same weights."""
    chance, training = random.Random(0), TRAININGS[name]()
    for arm in progress(INTERVALS, f"{name}: compiling, warming up"):
        segment(training, arm, device, 2, logger)
    segments = {
        arm: Segments(milliseconds=[], medians=[], totals=[], measurement_ms=[])
        for arm in INTERVALS
    }
    for _ in progress(range(rounds), f"{name}: rounds"):
        order = [*INTERVALS]
        chance.shuffle(order)
        here = {arm: segment(training, arm, device, batches, logger) for arm in order}
        for arm, steps in here.items():
            into, bare = segments[arm], here[NONE]
            into["milliseconds"].append(1e3 * median(steps))
            into["medians"].append(median(steps) / median(bare))
            into["totals"].append(sum(steps) / sum(bare))
            interval = INTERVALS[arm]
            # The first of these batches is the second step.
            measured = 0 if interval is None else (batches + 1) // interval - 1 // interval
            if measured:
                into["measurement_ms"].append(1e3 * (sum(steps) - sum(bare)) / measured)
    return segments


def segment(training: Training, arm: str, device: str, batches: int, logger: Logger) -> list[float]:
    """Seconds of each batch, without the first, which is always measured, and the last."""
    clock, interval = Clock(), INTERVALS[arm]
    monitors = [] if interval is None else [AdamMonitor(every_n_steps=interval)]
    with silence():
        L.seed_everything(0)
        fit = trainer(logger, [clock, *monitors], batches + 2, device).fit
        fit(training.module(), training.loader)
    return [later - sooner for sooner, later in pairwise(clock.times)][1:]


def trainer(logger: Logger, callbacks: list[L.Callback], steps: int, device: str) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def logger_of(kind: str, folder: str) -> Logger:
    """One logger for all segments: to begin a run takes longer than a segment."""
    if kind == "csv":
        return CSVLogger(folder)
    return WandbLogger(project="benchmark", save_dir=folder, offline=True)
