"""Preflight notices of real runs."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_adam import AdamMonitor
from lightning_adam.cli import main
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES
from lightning_adam.findings.context import GroupFacts, RunFacts
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.preflight import NOTICES, preflight
from lightning_adam.statistics.dtypes import dtype_name
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer


class PlainModule(L.LightningModule):
    """A module without the mixin, so that its optimizer settings are not validated."""

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


def notices_of(
    module: L.LightningModule, steps: int = 1, every_n_steps: int = 1, **flags: Any
) -> dict[str, Finding]:
    monitor = AdamMonitor(every_n_steps=every_n_steps)
    fit = trainer(callbacks=[monitor, StopAfterOneStep()], **{"max_steps": steps, **flags})
    fit.fit(module, loader(8))
    return {each.code: each for each in monitor.findings if each.is_notice}


def test_notices_and_rules_have_different_codes() -> None:
    assert not NOTICES.keys() & RULES.keys()


def test_each_notice_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with each_row() as row:
        for code, notice in NOTICES.items():
            with row(code):
                assert notice.meaning.endswith(".")
                assert notice.suggest.__doc__
                main(["explain", code])
                printed = " ".join(capsys.readouterr().out.split())
                assert printed.startswith(f"{code} (a preflight notice: {notice.severity}, ")
                assert notice.meaning in printed
                assert "@notice" not in printed


def test_valid_settings_raise_nothing_above_info() -> None:
    scheduler = {"name": "cosine", "warmup_steps": 2}
    found = notices_of(Lit(ADAMW, scheduler), max_epochs=1, steps=-1)
    assert {each.severity.value for each in found.values()} <= {"info"}


def test_eps_that_rounds_to_zero_in_the_dtype_is_found() -> None:
    found = notices_of(PlainModule(eps=1e-8), precision="16-true")
    assert found["eps_vanishes"].remedy == ("trainer.precision=16-mixed",)
    assert "eps_vanishes" not in notices_of(PlainModule(eps=1e-4), precision="16-true")
    assert "eps_vanishes" not in notices_of(PlainModule(eps=1e-8), precision="bf16-true")


def test_schedule_of_another_length_than_the_run_is_found() -> None:
    with each_row() as row:
        for total_steps, is_found in [(4, True), (8, False), (16, True), (None, False)]:
            with row(total_steps):
                scheduler = {"name": "cosine", "total_steps": total_steps}
                found = notices_of(Lit(ADAMW, scheduler), max_epochs=1, steps=-1)
                remedies = [found[code].remedy for code in found if code == "schedule_length"]
                assert remedies == ([("scheduler.total_steps=8",)] if is_found else [])


def test_warmup_shorter_than_the_average_of_the_second_moment_is_found() -> None:
    def of(**scheduler: Any) -> dict[str, Finding]:
        return notices_of(Lit(ADAMW, {"name": "cosine", **scheduler}), max_epochs=20, steps=-1)

    (suggestion,) = of()["warmup_short"].suggestions
    assert (suggestion.overrides, suggestion.is_lead) == (("scheduler.warmup_steps=16",), True)
    assert "warmup_short" not in of(warmup_steps=16)


def test_settings_of_a_schedule_are_suggested_only_where_there_is_one() -> None:
    one_cycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1}
    custom = {
        "_target_": f"{__name__}.{UserSchedule.__name__}",
        "_partial_": True,
        "warmup_steps": 1,
    }
    rows = [None, custom, {**one_cycle, "_partial_": True, "total_steps": 400}]
    with each_row() as row:
        for scheduler in rows:
            with row(scheduler):
                found = notices_of(Lit(ADAMW, scheduler), max_epochs=20, steps=-1)
                suggested = [str(one) for each in found.values() for one in each.suggestions]
                assert not [each for each in suggested if "scheduler" in each]


class UserSchedule(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that is not of this package."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps))


def test_decay_too_weak_or_too_strong_for_the_length_of_the_run_is_found() -> None:
    def of(**settings: float) -> list[Finding]:
        found = notices_of(PlainModule(**settings), max_epochs=1, steps=-1).values()
        return [each for each in found if each.code == "decay_timescale"]

    (weak,), (strong,) = of(lr=1e-3, weight_decay=0.01), of(lr=1.0, weight_decay=5.0)
    assert "100,000 steps" in weak.sentence
    assert "the run takes 8" in weak.sentence
    assert "an epoch takes 8" in strong.sentence
    assert of(lr=1.0, weight_decay=0.2) == []
    # Neither case suggests another weight decay.
    assert weak.suggestions == strong.suggestions == ()


def test_interval_of_more_than_one_step_is_found() -> None:
    (override,) = notices_of(PlainModule(), every_n_steps=10)["measured_rarely"].remedy
    assert override == "adam_monitor.every_n_steps=1"
    assert "measured_rarely" not in notices_of(PlainModule(), every_n_steps=1)


def test_trainable_parameters_without_an_optimizer_are_found() -> None:
    module = PlainModule()
    module.head = nn.Linear(2, 2)
    found = notices_of(module)["parameters_left_out"]
    assert found.sentence.endswith("are never trained: head.weight and 1 more.")
    module = PlainModule()
    module.head = nn.Linear(2, 2).requires_grad_(False)
    assert "parameters_left_out" not in notices_of(module)


def test_second_moment_that_cannot_decrease_in_bfloat16_is_found() -> None:
    rows = [("bf16-true", 0.999, True), ("bf16-true", 0.99, False), ("32-true", 0.999, False)]
    with each_row() as row:
        for precision, beta2, is_found in rows:
            with row((precision, beta2)):
                found = notices_of(PlainModule(betas=(0.9, beta2)), precision=precision)
                assert ("exp_avg_sq_cannot_decay" in found) == is_found


def test_second_moment_cannot_decay_only_if_no_value_of_its_dtype_can_decrease() -> None:
    unable_to_decay = []
    with each_row() as row:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            resolution = torch.finfo(dtype).eps
            # All values from 1 to 2; other octaves round in the same way.
            octave = torch.arange(1, 2, max(resolution, 2.0**-12)).to(dtype)
            for beta2 in (0.99, 0.997, 0.999, 0.9997, 0.9999):
                with row((dtype, beta2)):
                    settings = {"lr": 1e-3, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
                    name = dtype_name(dtype)
                    group = GroupFacts("all", settings, {}, {name: 1e-8}, {name: resolution})
                    found = preflight(RunFacts(groups=[group]))
                    is_found = "exp_avg_sq_cannot_decay" in {each.code for each in found}
                    assert is_found == torch.equal(octave * beta2, octave)
                    unable_to_decay += [(name, beta2)] if is_found else []
    assert unable_to_decay == [
        *(("bfloat16", beta2) for beta2 in (0.999, 0.9997, 0.9999)),
        ("float16", 0.9999),
    ]


def test_small_batch_with_a_short_half_life_of_beta2_is_found() -> None:
    """The default batches have 8 samples."""
    rows = [((0.9, 0.99), "optimizer.betas=[0.9,0.9945]"), ((0.999, 0.99), None)]
    with each_row() as row:
        for betas, expected in rows:
            with row(betas):
                found = notices_of(PlainModule(betas=betas))["beta2_short_memory"]
                overrides = [each for one in found.suggestions for each in one.overrides]
                assert overrides == ([] if expected is None else [expected])
    assert "beta2_short_memory" not in notices_of(PlainModule(betas=(0.9, 0.999)))


def test_beta1_above_the_root_of_beta2_is_found() -> None:
    for beta1, is_found in [(0.96, True), (0.9, False)]:
        assert ("beta1_above_root_beta2" in notices_of(PlainModule(betas=(beta1, 0.9)))) == is_found


def test_epoch_that_ends_within_an_accumulation_is_found() -> None:
    found = notices_of(PlainModule(), accumulate_grad_batches=3)["partial_accumulation"]
    assert "accumulates 2 of 3 batches" in found.sentence
    assert "partial_accumulation" not in notices_of(PlainModule(), accumulate_grad_batches=4)


def test_severity_of_a_notice_is_a_setting() -> None:
    run = RunFacts(every_n_steps=10)
    assert [each.severity for each in preflight(run)] == [Severity.info]
    for severity, expected in [("warning", [Severity.warning]), ("off", [])]:
        found = preflight(run, {"measured_rarely": {"severity": severity}})
        assert [each.severity for each in found] == expected
