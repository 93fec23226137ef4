"""Runs with AdamMonitor, and modules with unusual optimizer steps."""

from collections.abc import Collection
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam._compat.torch import configure_amp_unscaling
from lightning_adam.monitor.pending import PendingMeasurement
from lightning_adam.statistics.measurement import Measurement
from tests.support.precision import IMPLEMENTATIONS, precision_flags
from tests.support.training import ADAMW, Lit, TrainingRun, loss_of, network, run_training

KEY = "adam_update/update_norm"
"""A statistic that is defined at every step."""


def scoped(scope: str, key: str = KEY) -> str:
    """Returns the key of a statistic in a scope, such as `group/decay`."""
    family, name = key.split("/")
    return f"{family}/{scope}/{name}" if scope else key


def full_monitor(**settings: Any) -> AdamMonitor:
    """Measures all statistics of all scopes at every step, and exponents at every second step."""
    scopes = ["model", "group", "layer", "tensor"]
    return AdamMonitor(1, scopes, "all", histograms_every_n_steps=2, **settings)


def fit_monitored(
    monitor: AdamMonitor | None, module: Any = None, data: Any = 25, **flags: Any
) -> TrainingRun:
    """Trains for an epoch with a cosine schedule, logging every 10 steps."""
    settings = {"log_every_n_steps": 10, **flags}
    return run_training(module or Lit(ADAMW, {"name": "cosine"}), monitor, data=data, **settings)


class DelayedArrival(PendingMeasurement):
    """A copy that arrives after several polls, like from a device that is behind."""

    asked_for = 3
    must_not_wait = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked = 0

    def has_arrived(self) -> bool:
        self.asked += 1
        return self.asked > self.asked_for

    def measurement(self) -> Measurement:
        assert not self.must_not_wait or self.asked > self.asked_for
        return super().measurement()


SELF_SCALING = "fused, as torch leaves it"
"""An optimizer step that unscales and skips on the device. The mixin does not use it."""


class BadBatches(Lit):
    """The loss of some batches is infinite, or `training_step` returns None for them."""

    def __init__(
        self,
        implementation: str,
        scheduler: Any = None,
        bad_batches: Collection[int] = (),
        has_loss: bool = True,
    ) -> None:
        self.is_self_scaling = implementation == SELF_SCALING
        flags = IMPLEMENTATIONS["fused" if self.is_self_scaling else implementation]
        super().__init__({**ADAMW, **flags}, scheduler)
        self.bad_batches = bad_batches
        self.has_loss = has_loss

    def configure_optimizers(self) -> Any:
        built: Any = super().configure_optimizers()
        if self.is_self_scaling:
            configure_amp_unscaling(built["optimizer"], by_optimizer=True)
        return built

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx not in self.bad_batches:
            return loss
        return loss * torch.inf if self.has_loss else None


ATTEMPTS = 10
BAD_STEPS = (0, 4, 5)
"""The attempts at a step that are skipped, counted from 0."""


def fit_with_scaler(
    module: L.LightningModule,
    monitor: AdamMonitor | None = None,
    data: Any = ATTEMPTS,
    **flags: Any,
) -> TrainingRun:
    """Trains in float16 with a GradScaler, unless another precision is given."""
    precision = precision_flags(flags.pop("precision", "16-mixed"))
    return run_training(module, monitor, data=data, **precision, **flags)


def step_hooks(optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns the names of the hooks around an optimizer's step."""
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return [hook.__qualname__ for each in hooks for hook in each.values()]


def steps_logged(run: TrainingRun) -> list[tuple[int | None, float, float]]:
    """Returns the x value, the optimizer step and the number of skipped steps of each row."""
    keys = ("adam_schedule/step", "adam_schedule/skipped_steps")
    return [(x, row[keys[0]], row[keys[1]]) for x, row in run.logger.rows if keys[0] in row]


def step_counts(bad: Collection[int], every_n_steps: int) -> list[tuple[int, float, float]]:
    """Returns the rows that `steps_logged` should find if some attempts are skipped."""
    taken = [attempt for attempt in range(ATTEMPTS) if attempt not in bad]
    return [
        (attempt, step, attempt + 1 - step)
        for step, attempt in enumerate(taken, 1)
        if step == 1 or step % every_n_steps == 0
    ]


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
