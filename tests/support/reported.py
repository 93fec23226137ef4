"""Runs of modules with any optimizer, with AdamMonitor's logs and warnings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import pytest
from torch import nn
from torch.optim import Optimizer

from lightning_adam import AdamMonitor
from tests.support.training import Lit, TrainingRun, run_training

Build = Callable[[nn.Sequential], Optimizer]


class WithoutMixin(Lit):
    """A module that builds its optimizer without the mixin."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build

    def configure_optimizers(self) -> Any:
        return self.build(self.net)


class Fit(NamedTuple):
    run: TrainingRun
    values: dict[str, float]
    """The last values logged."""
    lines: list[str]
    warnings: list[str]

    @property
    def optimizers(self) -> list[Optimizer]:
        return self.run.trainer.optimizers


def fit(module: L.LightningModule, monitor: AdamMonitor | None = None, **flags: Any) -> Fit:
    lines, warnings = list[str](), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_adam.monitor.preconditions.log_info", lines.append)
        patch.setattr("lightning_adam.monitor.preconditions.rank_zero_warn", warnings.append)
        run = run_training(module, monitor, **flags)
    values = {key: float(value) for key, value in run.trainer.callback_metrics.items()}
    return Fit(run, values, lines, warnings)


def not_measured(line: str) -> set[str]:
    """Returns the statistics that the monitor's line says it cannot measure."""
    return set(line.rstrip(".").partition("state does not provide ")[2].split(", "))
