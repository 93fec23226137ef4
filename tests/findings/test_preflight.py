"""Findings before the first step of real training runs."""

from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_adam import AdamMonitor
from lightning_adam.findings import RULES
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.preflight import Plan, PlannedGroup, preflight
from lightning_adam.findings.rule import Training
from lightning_adam.statistics.dtypes import dtype_name
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer


class Plain(L.LightningModule):
    """A module without the mixin: the settings of torch's Adam are not validated."""

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


class StopAfterOneStep(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        trainer.should_stop = True


def foreseen(
    module: L.LightningModule, steps: int = 1, every_n_steps: int = 1, **flags: Any
) -> dict[str, Finding]:
    monitor = AdamMonitor(every_n_steps=every_n_steps)
    fit = trainer(callbacks=[monitor, StopAfterOneStep()], **{"max_steps": steps, **flags})
    fit.fit(module, loader(8))
    return {each.code: each for each in monitor.findings if each.step == 0}


def test_sound_settings_raise_nothing_above_info() -> None:
    scheduler = {"name": "cosine", "warmup_steps": 2}
    found = foreseen(Lit(ADAMW, scheduler), max_epochs=1, steps=-1)
    assert {each.severity.value for each in found.values()} <= {"info"}


def test_eps_that_rounds_to_zero_in_the_dtype_is_found() -> None:
    found = foreseen(Plain(eps=1e-8), precision="16-true")
    assert found["eps_vanishes"].remedy == ("trainer.precision=16-mixed",)
    assert "eps_vanishes" not in foreseen(Plain(eps=1e-4), precision="16-true")
    assert "eps_vanishes" not in foreseen(Plain(eps=1e-8), precision="bf16-true")


def test_schedule_of_another_length_than_the_run_is_found() -> None:
    with each_row() as row:
        for total_steps, is_found in [(4, True), (8, False), (16, True), (None, False)]:
            with row(total_steps):
                scheduler = {"name": "cosine", "total_steps": total_steps}
                found = foreseen(Lit(ADAMW, scheduler), max_epochs=1, steps=-1)
                remedies = [found[code].remedy for code in found if code == "schedule_exhausted"]
                assert remedies == ([("scheduler.total_steps=8",)] if is_found else [])


def test_warmup_shorter_than_the_memory_of_the_second_moment_is_found() -> None:
    def of(**scheduler: Any) -> dict[str, Finding]:
        return foreseen(Lit(ADAMW, {"name": "cosine", **scheduler}), max_epochs=20, steps=-1)

    assert of()["warmup_short"].remedy == ("scheduler.warmup_steps=16",)
    assert "warmup_short" not in of(warmup_steps=16)


def test_decay_too_weak_or_too_strong_for_the_length_of_the_run_is_found() -> None:
    weak = foreseen(Plain(lr=1e-3, weight_decay=0.01), max_epochs=1, steps=-1)
    assert "100,000 steps" in weak["decay_timescale"].sentence
    (override,) = weak["decay_timescale"].remedy
    cured = Plain(lr=1e-3, weight_decay=float(override.partition("=")[2]))
    assert "decay_timescale" not in foreseen(cured, max_epochs=1, steps=-1)
    strong = foreseen(Plain(lr=1.0, weight_decay=5.0), max_epochs=1, steps=-1)
    assert "an epoch takes 8" in strong["decay_timescale"].sentence


def test_measuring_too_seldom_to_see_single_steps_is_found() -> None:
    (override,) = foreseen(Plain(), every_n_steps=10)["exp_avg_sq_lags"].remedy
    assert override == "adam_monitor.every_n_steps=1"
    assert "exp_avg_sq_lags" not in foreseen(Plain(), every_n_steps=1)


def test_trainable_parameters_without_an_optimizer_are_found() -> None:
    module = Plain()
    module.head = nn.Linear(2, 2)
    found = foreseen(module)["parameters_left_out"]
    assert "2 parameters" in found.sentence
    assert "head.weight" in found.sentence
    module = Plain()
    module.head = nn.Linear(2, 2).requires_grad_(False)
    assert "parameters_left_out" not in foreseen(module)


def test_second_moment_that_cannot_decrease_in_bfloat16_is_found() -> None:
    rows = [("bf16-true", 0.999, True), ("bf16-true", 0.99, False), ("32-true", 0.999, False)]
    with each_row() as row:
        for precision, beta2, is_found in rows:
            with row((precision, beta2)):
                found = foreseen(Plain(betas=(0.9, beta2)), precision=precision)
                assert ("exp_avg_sq_stalled" in found) == is_found


def test_second_moment_is_stuck_only_if_no_value_of_its_dtype_can_decrease() -> None:
    stuck = []
    with each_row() as row:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            resolution = torch.finfo(dtype).eps
            # All values from 1 to 2; those of other octaves are rounded alike.
            octave = torch.arange(1, 2, max(resolution, 2.0**-12)).to(dtype)
            for beta2 in (0.99, 0.997, 0.999, 0.9997, 0.9999):
                with row((dtype, beta2)):
                    settings = {"lr": 1e-3, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
                    name = dtype_name(dtype)
                    group = PlannedGroup("all", settings, {name: 1e-8}, {name: resolution})
                    found = preflight(Plan(Training(), [group], {}), RULES)
                    is_found = "exp_avg_sq_stalled" in {each.code for each in found}
                    assert is_found == torch.equal(octave * beta2, octave)
                    stuck += [(name, beta2)] if is_found else []
    assert stuck == [
        *(("bfloat16", beta2) for beta2 in (0.999, 0.9997, 0.9999)),
        ("float16", 0.9999),
    ]
