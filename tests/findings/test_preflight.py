"""What is said before the first step, of real trainings."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_adam import AdamMonitor
from lightning_adam.findings.finding import Finding
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer


class Plain(L.LightningModule):
    """Without the mixin: torch's own Adam, which nobody has checked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = network()
        self.settings = settings

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        dtype = self.net[0].weight.dtype
        return loss_of(self.net, (inputs.to(dtype), targets.to(dtype)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), **self.settings)


def foreseen(
    module: L.LightningModule, steps: int = 1, every_n_steps: int = 1, **flags: Any
) -> dict[str, Finding]:
    monitor = AdamMonitor(every_n_steps=every_n_steps)
    fit = trainer(callbacks=[monitor], **{"max_steps": steps, **flags})
    fit.fit(module, loader(8))
    return {each.code: each for each in monitor.findings if each.step == 0}


def test_nothing_above_info_is_said_of_a_sound_plan() -> None:
    scheduler = {"name": "cosine", "warmup_steps": 2}
    found = foreseen(Lit(ADAMW, scheduler), max_epochs=1, steps=-1)
    assert {each.severity.value for each in found.values()} <= {"info"}


def test_an_eps_that_is_0_in_the_parameters_dtype() -> None:
    found = foreseen(Plain(eps=1e-8), precision="16-true")
    assert found["eps_vanishes"].remedy == ("trainer.precision=16-mixed",)
    assert "eps_vanishes" not in foreseen(Plain(eps=1e-4), precision="16-true")
    assert "eps_vanishes" not in foreseen(Plain(eps=1e-8), precision="bf16-true")


@pytest.mark.parametrize(
    ("total_steps", "is_said"), [(4, True), (8, False), (16, True), (None, False)]
)
def test_a_schedule_of_another_length_than_the_training(
    total_steps: int | None, is_said: bool
) -> None:
    scheduler = {"name": "cosine", "total_steps": total_steps}
    found = foreseen(Lit(ADAMW, scheduler), max_epochs=1, steps=-1)
    assert ("schedule_exhausted" in found) == is_said
    if is_said:
        assert found["schedule_exhausted"].remedy == ("scheduler.total_steps=8",)


def test_a_warmup_beside_the_memory_of_the_second_moment() -> None:
    def of(**scheduler: Any) -> dict[str, Finding]:
        return foreseen(Lit(ADAMW, {"name": "cosine", **scheduler}), max_epochs=20, steps=-1)

    assert of()["warmup_short"].remedy == ("scheduler.warmup_steps=16",)
    assert "warmup_short" not in of(warmup_steps=16)


def test_a_decay_beside_the_length_of_the_run() -> None:
    weak = foreseen(Plain(lr=1e-3, weight_decay=0.01), max_epochs=1, steps=-1)
    assert "100,000 steps" in weak["decay_timescale"].sentence
    (override,) = weak["decay_timescale"].remedy
    cured = Plain(lr=1e-3, weight_decay=float(override.partition("=")[2]))
    assert "decay_timescale" not in foreseen(cured, max_epochs=1, steps=-1)
    strong = foreseen(Plain(lr=1.0, weight_decay=5.0), max_epochs=1, steps=-1)
    assert "an epoch takes 8" in strong["decay_timescale"].sentence


def test_measuring_too_seldom_to_see_what_lasts_a_step() -> None:
    (override,) = foreseen(Plain(), every_n_steps=10)["exp_avg_sq_lags"].remedy
    assert override == "adam_monitor.every_n_steps=1"
    assert "exp_avg_sq_lags" not in foreseen(Plain(), every_n_steps=1)


def test_parameters_that_no_optimizer_has() -> None:
    module = Plain()
    module.head = nn.Linear(2, 2)
    found = foreseen(module)["parameters_left_out"]
    assert "2 parameters" in found.sentence
    assert "head.weight" in found.sentence
    module = Plain()
    module.head = nn.Linear(2, 2).requires_grad_(False)
    assert "parameters_left_out" not in foreseen(module)


@pytest.mark.parametrize(
    ("precision", "beta2", "is_said"),
    [("bf16-true", 0.999, True), ("bf16-true", 0.99, False), ("32-true", 0.999, False)],
)
def test_a_second_moment_that_will_not_fall(precision: str, beta2: float, is_said: bool) -> None:
    found = foreseen(Plain(betas=(0.9, beta2)), precision=precision)
    assert ("exp_avg_sq_stalled" in found) == is_said
