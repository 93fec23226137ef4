"""Published results about Adam, reproduced with this package."""

import math

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.small_gpt import SmallGPT, text_loader
from lightning_adam import (
    AdamMixin,
    AdamMonitor,
    AdamStatistics,
    build_adam,
    build_optimizer,
)
from tests.support.memory_logger import MemoryLogger
from tests.support.tables import each_row
from tests.support.training import trainer

IMPLEMENTATIONS = [{"fused": True}, {"foreach": True}, {"fused": False}]


class Scalar(nn.Module):
    """The module of the online problem of Reddi et al."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))


def online(amsgrad: bool, slope: float, steps: int = 3000) -> tuple[list[float], list[float]]:
    """Values of x in the last round of three steps, and with amsgrad the `amsgrad_gap` there."""
    module = Scalar()
    config = {"lr": 0.1, "betas": [0.0, 1 / (1 + slope**2)], "amsgrad": amsgrad}
    # The learning rate of step t is 0.1/sqrt(t).
    built = build_adam(module, config, {"name": "inverse_sqrt", "timescale": 1}, steps)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    statistics = AdamStatistics(["amsgrad_gap"], scopes=["model"])
    ends, gaps = list[float](), list[float]()
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
def test_adam_converges_to_the_worst_point_and_amsgrad_to_the_best(slope: float) -> None:
    """Reddi et al. 2018, arXiv 1904.09237, theorem 1: every third gradient is large."""
    *_, end = online(False, slope)[0]
    assert end == 1.0
    ends, gaps = online(True, slope)
    assert sum(ends) / 3 <= -0.999
    # v has decayed by the second small gradient, the largest has not.
    assert gaps[-1] > 2


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


def train_gpt(eps: float, loss_scale: float = 1.0, steps: int = 250) -> tuple[float, float]:
    """Returns the mean loss of the last steps, and the mean `eps_energy_loss` of the run."""
    module, recorder = Bytes(eps, loss_scale), MemoryLogger()
    monitor = AdamMonitor(10, statistics=["eps_energy_loss"], scopes=["model"])
    torch.manual_seed(1)
    fit = trainer(max_steps=steps, max_epochs=-1, callbacks=[monitor], logger=recorder)
    fit.fit(module, text_loader(8))
    lost = [row["adam_underflow/eps_energy_loss"] for _, row in recorder.rows]
    return sum(module.losses[-25:]) / 25, sum(lost) / len(lost)


@pytest.mark.nightly
def test_only_a_large_eps_raises_the_loss() -> None:
    """Wortsman et al. 2023, arXiv 2309.14322, section 3.4.1: eps and small gradients."""
    losses, lost = zip(*map(train_gpt, (1e-15, 1e-8, 1e-5, 1e-3, 1e-2, 1e-1)), strict=True)
    assert losses[:3] == pytest.approx([losses[1]] * 3, abs=0.01)
    assert losses[2] + 0.02 < losses[3] < losses[4] - 0.05 < losses[5] - 0.1
    assert list(lost) == sorted(lost)
    assert lost[0] < 1e-6
    assert lost[-1] > 0.9
    # With a loss a million times smaller the usual eps is a large one.
    scaled, lost_of_scaled = train_gpt(1e-8, loss_scale=1e-6)
    assert scaled == pytest.approx(losses[4], rel=1e-3)
    assert lost_of_scaled == pytest.approx(lost[4], rel=1e-3)


def test_gradients_and_eps_scale_together() -> None:
    """Exactly for a power of two, because the moments scale without rounding."""

    def final_parameters(scale: float, **settings: bool) -> Tensor:
        torch.manual_seed(2)
        net = nn.Linear(40, 30)
        optimizer = build_optimizer(net, {"lr": 1e-2, "eps": 1e-3 * scale, **settings})
        for _ in range(30):
            for parameter in net.parameters():
                parameter.grad = 1e-2 * scale * torch.randn(parameter.shape)
            optimizer.step()
        return torch.cat([each.detach().flatten() for each in net.parameters()])

    with each_row() as row:
        for implementation in IMPLEMENTATIONS:
            for amsgrad in (False, True):
                with row((implementation, amsgrad)):
                    settings = {"amsgrad": amsgrad, **implementation}
                    expected = final_parameters(1.0, **settings)
                    assert torch.equal(final_parameters(2.0**-20, **settings), expected)
                    assert torch.equal(final_parameters(2.0**10, **settings), expected)


def test_decay_and_noise_reach_the_equilibrium_norm_and_rotation() -> None:
    """Kosson et al. 2023, arXiv 2305.17212: rotational equilibrium under random gradients."""
    lr, weight_decay, beta1 = 1e-2, 0.1, 0.9
    net = nn.Linear(64, 64, bias=False)
    config = {"lr": lr, "weight_decay": weight_decay, "decoupled_weight_decay": True}
    optimizer = build_optimizer(net, config)
    statistics = AdamStatistics(["weight_rms", "equilibrium_ratio"], scopes=["model"])
    sizes, ratios, angles = [], [], []
    # Five times the 1000 steps in which the decay forgets.
    for step in range(1, 6001):
        net.weight.grad = torch.randn(net.weight.shape)
        before = net.weight.detach().flatten().double()
        optimizer.step()
        if step > 5000 and step % 20 == 0:
            after = net.weight.detach().flatten().double()
            angles.append(math.acos(after @ before / (after.norm() * before.norm())))
            statistics.update(optimizer)
            values = statistics.compute()
            sizes.append(values["adam_weight_decay/weight_rms"])
            ratios.append(values["adam_weight_decay/equilibrium_ratio"])
    size = math.sqrt(lr / (2 * weight_decay))
    angle = math.sqrt(2 * lr * weight_decay) * math.sqrt((1 - beta1) / (1 + beta1))
    assert sum(sizes) / len(sizes) == pytest.approx(size, rel=0.03)
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.03)
    assert ratios[-1] == pytest.approx(sizes[-1] / size)
    assert sum(angles) / len(angles) == pytest.approx(angle, rel=0.03)
