"""What Lightning does for a trial, with a real Trainer: it tells, it stops, it never harms."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam.environment import TRIAL
from lightning_adam.tune.archive import Archive, Record
from lightning_adam.tune.job import Identity
from lightning_adam.tune.trial_callback import TrialCallback
from tests.support.training import ADAMW, Lit, loader, loss_of, parameters, trainer
from tests.tune.searching import DEFAULT

PLACE = "journal:trials.journal"
EPOCHS, BATCHES = 4, 3


class Judged(Lit):
    """Its metric is what is told: one value an epoch, the last one for all after it."""

    def __init__(self, told: Any = (0.5,), name: str = "val/loss") -> None:
        super().__init__(ADAMW)
        self.told, self.name = told, name
        self.judged: list[int] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.judged.append(self.trainer.global_step)
        place = min(self.trainer.current_epoch, len(self.told) - 1)
        self.log(self.name, float(self.told[place]))


@pytest.fixture
def archive() -> Archive:
    return Archive(PLACE, "search", "minimize")


def begin(archive: Archive, monkeypatch: pytest.MonkeyPatch, monitor: str | None) -> int:
    number = archive.begin("lr", DEFAULT, 0, 0, {}, {}, "host/1/a", 1)
    who = Identity(PLACE, "search", "minimize", "lr", number, monitor)
    monkeypatch.setenv(TRIAL, who.as_variable())
    return number


def fit(module: L.LightningModule, **settings: Any) -> L.Trainer:
    """Lightning attaches the callback by itself, as it does in a user's app."""
    fitting = trainer(max_epochs=EPOCHS, **settings)
    fitting.fit(module, loader(BATCHES), loader(1))
    return fitting


def record(archive: Archive, number: int) -> Record:
    return next(each for each in archive.records("lr") if each.trial.number == number)


def healthy(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four trainings to be compared with."""
    for value in (0.1, 0.2, 0.3, 0.4):
        number = begin(archive, monkeypatch, "val/loss")
        assert fit(Judged([value])).global_step == EPOCHS * BATCHES
        archive.finish("lr", number, value)


def test_hopeless_trainings_are_stopped_and_others_are_not(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy(archive, monkeypatch)
    number = begin(archive, monkeypatch, "val/loss")
    module = Judged([0.9, 0.1])
    assert fit(module).global_step == BATCHES
    archive.finish("lr", number, 0.9)
    assert record(archive, number).trial.outcome == "stopped"
    assert module.judged == [BATCHES]
    # One that has been good is given time.
    begin(archive, monkeypatch, "val/loss")
    assert fit(Judged([0.25, 0.9])).global_step == EPOCHS * BATCHES
    # The same that was stopped, where nothing may be.
    begin(archive, monkeypatch, None)
    assert fit(Judged([0.9])).global_step == EPOCHS * BATCHES


def test_a_metric_that_is_not_finite_ends_the_training(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(archive, monkeypatch, "val/loss")
    assert fit(Judged([0.5, math.nan])).global_step == 2 * BATCHES


def test_a_metric_that_is_not_logged_is_said_once_and_nothing_is_stopped(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(archive, monkeypatch, "val/los")
    with pytest.warns(UserWarning, match=r"hydra\.sweeper\.monitor=val/los: .*val/loss") as warned:
        assert fit(Judged()).global_step == EPOCHS * BATCHES
    assert len([each for each in warned if "hydra.sweeper.monitor" in str(each.message)]) == 1


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", "32-true float32"),
        ("bf16-true", "bf16-true bfloat16"),
        ("bf16-mixed", "bf16-mixed float32"),
    ],
)
def test_the_precision_is_told_before_the_first_step(
    precision: Any, expected: str, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = begin(archive, monkeypatch, None)

    class Looking(Judged):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.seen = record(Archive(PLACE, "search", "minimize"), number).precision
            inputs, targets = batch
            dtype = next(self.parameters()).dtype
            return loss_of(self.net, (inputs.to(dtype), targets.to(dtype)))

    module = Looking()
    fit(module, precision=precision)
    assert module.seen == expected


@pytest.mark.slow
def test_findings_are_told(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    number = begin(archive, monkeypatch, None)
    module = Lit({**ADAMW, "eps": 1.0})
    fitting = trainer(max_epochs=EPOCHS, callbacks=[AdamMonitor(every_n_steps=1)])
    fitting.fit(module, loader(10))
    assert "eps_dominates" in record(archive, number).trial.findings
    number = begin(archive, monkeypatch, None)
    fit(Judged())
    assert record(archive, number).trial.findings == ()


def test_the_training_is_the_same_with_and_without_it(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> list[Tensor]:
        torch.manual_seed(5)
        module = Judged()
        fit(module)
        return parameters(module)

    alone = trained()
    begin(archive, monkeypatch, "val/loss")
    assert all(torch.equal(a, b) for a, b in zip(alone, trained(), strict=True))


def test_a_search_that_has_ended_meanwhile_is_said_once_and_the_training_goes_on(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = begin(archive, monkeypatch, "val/loss")
    archive.lose("lr", number)
    with pytest.warns(UserWarning, match="nothing more is told to the search") as warned:
        assert fit(Judged()).global_step == EPOCHS * BATCHES
    assert len([each for each in warned if "nothing more is told" in str(each.message)]) == 1


def test_it_is_attached_in_a_trial_alone_and_judges_fits_alone(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attached(fitting: L.Trainer) -> int:
        callbacks = fitting.callbacks  # type: ignore[attr-defined]
        return len([each for each in callbacks if isinstance(each, TrialCallback)])

    assert attached(trainer()) == 0
    number = begin(archive, monkeypatch, "val/loss")
    fitting = trainer()
    assert attached(fitting) == 1
    fitting.validate(Judged([math.nan]), loader(1), verbose=False)
    assert record(archive, number).precision == ""
