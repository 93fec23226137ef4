"""The callback of a trial, with a real Trainer: it reports, prunes and changes nothing else."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.config.variables import TRIAL_VARIABLE
from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.job import Identity
from lightning_adam.tune.trial_callback import TrialCallback
from tests.support import packages
from tests.support.packages import PACKAGES, plain_module
from tests.support.training import ADAMW, Lit, loader, loss_of, parameters, trainer
from tests.tune.searching import DEFAULT

PLACE = "journal:trials.journal"
EPOCHS, BATCHES = 4, 3


class Validated(Lit):
    """Logs one given metric an epoch; the last one stands for all later epochs."""

    def __init__(self, metrics: Any = (0.5,), name: str = "val/loss") -> None:
        super().__init__(ADAMW)
        self.metrics, self.name = metrics, name
        self.validated_at: list[int] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.trainer.global_step)
        place = min(self.trainer.current_epoch, len(self.metrics) - 1)
        self.log(self.name, float(self.metrics[place]))


@pytest.fixture
def archive() -> Archive:
    return Archive(PLACE, "search", "minimize")


def begin(archive: Archive, monkeypatch: pytest.MonkeyPatch, monitor: str | None) -> int:
    number = archive.begin("lr", DEFAULT, 0, 0, {}, {}, "host/1/a", 1)
    who = Identity(PLACE, "search", "minimize", "lr", number, monitor)
    monkeypatch.setenv(TRIAL_VARIABLE, who.as_variable())
    return number


def fit(module: L.LightningModule, **settings: Any) -> L.Trainer:
    """Lightning attaches the callback by itself, as it does in a user's app."""
    fitting = trainer(max_epochs=EPOCHS, **settings)
    fitting.fit(module, loader(BATCHES), loader(1))
    return fitting


def record(archive: Archive, number: int) -> Record:
    return next(each for each in archive.records("lr") if each.trial.number == number)


def test_only_underperforming_runs_are_pruned(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0.1, 0.2, 0.3, 0.4):
        number = begin(archive, monkeypatch, "val/loss")
        assert fit(Validated([value])).global_step == EPOCHS * BATCHES
        archive.finish("lr", number, value)
    number = begin(archive, monkeypatch, "val/loss")
    module = Validated([0.9, 0.1])
    assert fit(module).global_step == BATCHES
    archive.finish("lr", number, 0.9)
    assert record(archive, number).trial.outcome == "stopped"
    assert module.validated_at == [BATCHES]
    # One that has been good is given time.
    begin(archive, monkeypatch, "val/loss")
    assert fit(Validated([0.25, 0.9])).global_step == EPOCHS * BATCHES
    # The same that was stopped, where nothing may be.
    begin(archive, monkeypatch, None)
    assert fit(Validated([0.9])).global_step == EPOCHS * BATCHES


def test_metric_that_is_not_finite_ends_the_run(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(archive, monkeypatch, "val/loss")
    assert fit(Validated([0.5, math.nan])).global_step == 2 * BATCHES


def test_missing_metric_warns_once_and_prunes_nothing(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(archive, monkeypatch, "val/los")
    with pytest.warns(
        UserWarning, match=r"hydra\.sweeper\.monitor=val/los is not logged .*val/loss"
    ) as warned:
        assert fit(Validated()).global_step == EPOCHS * BATCHES
    assert len([each for each in warned if "hydra.sweeper.monitor" in str(each.message)]) == 1


@pytest.mark.parametrize("package", PACKAGES)
def test_trials_of_both_packages_are_noted_and_pruned(
    package: str, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = iter([0.0, 0.5, math.nan])  # The first is that of the sanity check.

    def validation_step(module: Any, batch: Any, batch_idx: int) -> None:
        module.log("val/loss", next(metrics))

    number = begin(archive, monkeypatch, "val/loss")
    module = plain_module(package)
    type(module).validation_step = validation_step
    fitting = packages.trainer(package, max_epochs=EPOCHS)
    fitting.fit(module, loader(BATCHES), loader(1))
    assert fitting.global_step == 2 * BATCHES
    assert record(archive, number).precision == "32-true float32"


PRECISIONS = {
    "32-true": "32-true float32",
    "bf16-true": "bf16-true bfloat16",
    "bf16-mixed": "bf16-mixed float32",
}


def test_precision_is_stored_before_the_first_step(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looking(Validated):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.seen = record(Archive(PLACE, "search", "minimize"), number).precision
            inputs, targets = batch
            dtype = next(self.parameters()).dtype
            return loss_of(self.net, (inputs.to(dtype), targets.to(dtype)))

    found = {}
    for precision in PRECISIONS:
        number = begin(archive, monkeypatch, None)
        module = Looking()
        fit(module, precision=precision)
        found[precision] = module.seen
    assert found == PRECISIONS


@pytest.mark.slow
def test_findings_are_stored(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    number = begin(archive, monkeypatch, None)
    module = Lit({**ADAMW, "eps": 1.0})
    fitting = trainer(max_epochs=EPOCHS, callbacks=[AdamMonitor(every_n_steps=1)])
    fitting.fit(module, loader(10))
    assert "eps_dominates" in record(archive, number).trial.findings
    number = begin(archive, monkeypatch, None)
    fit(Validated())
    assert record(archive, number).trial.findings == ()


def test_callback_does_not_change_the_run(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_training() -> list[Tensor]:
        torch.manual_seed(5)
        module = Validated()
        fit(module)
        return parameters(module)

    alone = run_training()
    begin(archive, monkeypatch, "val/loss")
    assert all(torch.equal(a, b) for a, b in zip(alone, run_training(), strict=True))


def test_search_that_has_ended_warns_once_and_the_run_continues(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = begin(archive, monkeypatch, "val/loss")
    archive.lose("lr", number)
    with pytest.warns(UserWarning, match="nothing more is told to the search") as warned:
        assert fit(Validated()).global_step == EPOCHS * BATCHES
    assert len([each for each in warned if "nothing more is told" in str(each.message)]) == 1


def test_callback_is_attached_in_trials_only_and_acts_in_fits_only(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attached(fitting: L.Trainer) -> int:
        callbacks = fitting.callbacks  # type: ignore[attr-defined]
        return len([each for each in callbacks if isinstance(each, TrialCallback)])

    assert attached(trainer()) == 0
    number = begin(archive, monkeypatch, "val/loss")
    fitting = trainer()
    assert attached(fitting) == 1
    fitting.validate(Validated([math.nan]), loader(1), verbose=False)
    assert record(archive, number).precision == ""
