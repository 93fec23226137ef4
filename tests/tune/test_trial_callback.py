"""The callback shortens a run and changes nothing else, with real Trainers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import AdamMonitor
from lightning_adam.config.variables import STORAGE_VARIABLE, TRIAL_VARIABLE
from lightning_adam.tune.history import History
from lightning_adam.tune.job import Trial
from lightning_adam.tune.runs import Request, Run, Stage
from lightning_adam.tune.trial_callback import TrialCallback
from tests.support import packages
from tests.support.packages import PACKAGES, plain_module
from tests.support.tables import each_row
from tests.support.training import LR, Lit, loader, loss_of, network, parameters, trainer
from tests.tune.simulation import START

BATCHES, EPOCHS = 9, 8
FULL = BATCHES * EPOCHS
COSINE = {"name": "cosine", "warmup_ratio": 0.1}
BeginTrial = Callable[..., Callable[[], Run]]


class Tuned(Lit):
    """Trains with AdamMixin; records its learning rates and validations."""

    def __init__(self, lr: float = LR) -> None:
        super().__init__({"lr": lr}, COSINE)
        self.validated_at: list[int] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.trainer.global_step)
        self.log("val/loss", loss_of(self.net, batch))


class Partial(L.LightningModule):
    """Trains with a `_partial_` node of torch, and a schedule over the steps of the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.optimizer = partial(torch.optim.AdamW, lr=LR)
        self.validated_at: list[int] = []

    training_step, validation_step = Tuned.training_step, Tuned.validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(6), torch.ones(1)


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> BeginTrial:
    """Adds a run of a search, to which the Trainers of this process then belong."""
    history = History("journal:trials.journal", "search", "minimize")
    monkeypatch.setenv(STORAGE_VARIABLE, history.url)

    def begun(length: float = 1.0, lr: float = LR) -> Callable[[], Run]:
        number = history.begin(Request(Stage.ladder, START, length, len(history.runs())), "owner")
        assert number is not None
        trial = Trial("search", "minimize", "ladder", number, length, {"lr": lr})
        monkeypatch.setenv(TRIAL_VARIABLE, trial.as_variable())
        return lambda: history.runs()[number]

    return begun


def fit(module: L.LightningModule, data: Any = None, **flags: Any) -> L.Trainer:
    """Trains; Lightning attaches the callback, like in a user's app."""
    fitting = trainer(**{"max_epochs": EPOCHS, **flags})
    fitting.fit(module, loader(BATCHES) if data is None else data, loader(1))
    return fitting


SETTINGS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": FULL},
    "a part of the batches": {"data": loader(20), "limit_train_batches": BATCHES},
    "accumulated gradients": {"data": loader(2 * BATCHES), "accumulate_grad_batches": 2},
    "validation within an epoch": {"val_check_interval": 4},
    "validation after 5 epochs": {"check_val_every_n_epoch": 5},
    "no validation": {"limit_val_batches": 0},
    "a smallest number of epochs": {"min_epochs": EPOCHS},
    "a smallest number of steps": {"min_steps": FULL},
    "a stream of batches": {
        "data": DataLoader(Endless(), batch_size=8),
        "max_steps": FULL,
        "val_check_interval": 50,
        "check_val_every_n_epoch": None,
    },
}


def test_short_run_equals_a_run_with_that_many_max_steps(
    begin: BeginTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-identically, including a complete schedule."""
    with each_row() as row:
        for number, (name, flags) in enumerate(SETTINGS.items()):
            with row(name):
                kind: Any = (Tuned, Partial)[number % 2]
                length = (1 / 8, 1 / 3)[number % 2]
                run, last = begin(length), round(FULL * length)
                short, native = kind(), kind()
                fitting = fit(short, **flags)
                assert fitting.global_step == last
                has_validation = flags.get("limit_val_batches") != 0
                assert short.validated_at[-1:] == ([last] if has_validation else [])
                assert (run().steps, run().fixed_length) == (FULL, "")
                monkeypatch.delenv(TRIAL_VARIABLE)
                whole = {"min_epochs": None, "min_steps": None, "max_epochs": -1}
                end = fit(native, **{**flags, **whole, "max_steps": last})
                assert all(map(torch.equal, parameters(short), parameters(native)))
                rates = [each.optimizers[0].param_groups[0]["lr"] for each in (fitting, end)]
                assert rates[0] == rates[1] < 0.01 * LR


def test_callback_does_not_change_a_full_run(
    begin: BeginTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [Tuned(), Tuned()]
    begin()
    assert fit(modules[0]).global_step == FULL
    monkeypatch.delenv(TRIAL_VARIABLE)
    fit(modules[1])
    assert all(map(torch.equal, *(parameters(each) for each in modules)))
    assert modules[0].validated_at == modules[1].validated_at


def test_checkpoint_of_a_short_run_has_its_last_metric(begin: BeginTrial) -> None:
    begin(1 / 8)
    best = ModelCheckpoint("saved", monitor="val/loss", save_top_k=-1)
    stop = EarlyStopping("val/loss", patience=1, min_delta=-9.0)
    fitting = fit(Tuned(), enable_checkpointing=True, callbacks=[best, stop])
    assert fitting.global_step == 9
    assert best.best_model_path.endswith("step=9.ckpt")
    assert best.best_model_score == fitting.callback_metrics["val/loss"]


def test_baseline_is_neither_shortened_nor_recorded(begin: BeginTrial) -> None:
    run = begin(1 / 8)
    baseline = Tuned(lr=0.5)
    fitting = fit(baseline)
    assert fitting.global_step == FULL
    assert fitting.optimizers[0].param_groups[0]["lr"] < 1e-3
    assert baseline.validated_at[-1] == FULL
    assert run().steps is None
    assert fit(Tuned()).global_step == 9
    assert run().steps == FULL


def test_trainer_length_is_restored_after_a_short_run(begin: BeginTrial) -> None:
    begin(1 / 8)
    flags = {"min_epochs": 2, "min_steps": 3, "max_steps": FULL, "check_val_every_n_epoch": 5}
    fitting = fit(Tuned(), **flags)
    assert fitting.global_step == 9
    assert {name: getattr(fitting, name) for name in flags} == flags
    # The next module that the app trains with it is not tuned.
    fitting.fit(Tuned(lr=0.5), loader(BATCHES))
    assert fitting.global_step == FULL


def test_run_of_unknown_or_few_steps_is_not_shortened(begin: BeginTrial) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 20

    class Constant(Tuned):
        def __init__(self) -> None:
            Lit.__init__(self, {"lr": LR})
            self.validated_at = []

    stream = DataLoader(Endless(), batch_size=8)
    rows: list[tuple[dict[str, Any], int, str]] = [
        ({"max_epochs": -1, "callbacks": [Stop()]}, 20, "the Trainer does not know its"),
        ({"data": stream, "callbacks": [Stop()]}, 20, "the Trainer does not know its number"),
        ({"max_epochs": 7}, 63, "a run has only 63 steps"),
    ]
    with each_row() as row:
        for flags, steps, reason in rows:
            with row(reason):
                run = begin(1 / 8)
                assert fit(Constant(), **flags).global_step == steps
                assert run().fixed_length.startswith(reason)
                assert run().steps == (63 if steps == 63 else None)


def test_module_with_two_optimizers_is_shortened_if_one_of_them_is_tuned(begin: BeginTrial) -> None:
    class Pair(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.nets = torch.nn.ModuleList([network(), network()])
            self.count = 0

        def configure_optimizers(self) -> Any:
            rates = (LR, 0.5)
            pairs = zip(self.nets, rates, strict=True)
            return [torch.optim.Adam(net.parameters(), lr=lr) for net, lr in pairs], []

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.count += 1
            optimizers: Any = self.optimizers()
            for net, optimizer in zip(self.nets, optimizers, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss_of(net, batch))
                optimizer.step()

    run = begin(1 / 8)
    module = Pair()
    fit(module)
    assert module.count == 9
    assert run().steps == FULL


@pytest.mark.parametrize("package", PACKAGES)
def test_runs_of_both_packages_are_shortened(package: str, begin: BeginTrial) -> None:
    run = begin(1 / 8)
    fitting = packages.trainer(package, max_epochs=EPOCHS)
    fitting.fit(plain_module(package), loader(BATCHES))
    assert fitting.global_step == 9
    assert run().state_dtypes == ("float32",)


def test_dtypes_of_the_states_and_findings_are_recorded(begin: BeginTrial) -> None:
    class Casting(Tuned):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = (each.to(next(self.parameters()).dtype) for each in batch)
            return loss_of(self.net, (inputs, targets))

    for precision, dtype in (("bf16-true", "bfloat16"), ("bf16-mixed", "float32")):
        run = begin()
        fit(Casting(), loader(1), precision=precision, max_epochs=1, limit_val_batches=0)
        assert run().state_dtypes == (dtype,)
        assert run().findings == ()
    run = begin()
    module = Lit({"lr": LR, "eps": 1.0})
    fit(module, max_epochs=4, callbacks=[AdamMonitor(every_n_steps=1)], limit_val_batches=0)
    assert "eps_dominates" in run().findings


def test_unavailable_history_warns_and_the_run_continues(
    begin: BeginTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(1 / 8)
    monkeypatch.setenv(STORAGE_VARIABLE, "journal:gone.journal")
    with pytest.warns(UserWarning, match="the record of the run is incomplete"):
        assert fit(Tuned()).global_step == 9


def test_callback_is_attached_in_runs_only_and_acts_in_fits_only(begin: BeginTrial) -> None:
    def attached(fitting: Any) -> int:
        return sum(isinstance(each, TrialCallback) for each in fitting.callbacks)

    assert attached(trainer()) == 0
    run = begin(1 / 8)
    fitting = trainer()
    assert attached(fitting) == 1
    fitting.validate(Tuned(), loader(1), verbose=False)
    assert run().steps is None
