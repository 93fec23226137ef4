"""The learning rate of every step when the length of a run changes, in a real Trainer."""

import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Timer,
)
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import build_adam, build_scheduler
from tests.support.tables import each_row
from tests.support.training import LR, LearningRates, Lit, loader, loss_of, network, trainer

TORCH = "torch.optim.lr_scheduler"
LINEAR = {"name": "linear", "warmup_steps": 3}
ONE_CYCLE = {
    "_target_": f"{TORCH}.OneCycleLR",
    "max_lr": LR,
    "total_steps": "total_steps",
    "cycle_momentum": False,
}
SCHEDULES: list[dict[str, Any]] = [
    LINEAR,
    {"name": "cosine", "warmup_ratio": 0.25, "min_lr": LR / 10},
    {"name": "cosine_restarts", "num_cycles": 2},
    {"name": "polynomial", "power": 2.0, "warmup_epochs": 0.5},
    {"name": "multistep"},
    {"name": "one_cycle"},
    {"name": "wsd", "decay_ratio": 0.5, "warmup_steps": 1},
    {"name": "exponential", "gamma": 0.5},
    {"name": "inverse_sqrt", "warmup_steps": 2},
    ONE_CYCLE,
    {"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": "total_steps"},
    {"_target_": f"{TORCH}.PolynomialLR", "total_iters": "total_steps", "power": 2.0},
    {
        "_target_": f"{TORCH}.SequentialLR",
        "schedulers": [
            {"_target_": f"{TORCH}.LinearLR", "_partial_": True, "total_iters": 3},
            {"_target_": f"{TORCH}.CosineAnnealingLR", "_partial_": True, "T_max": "total_steps"},
        ],
        "milestones": [3],
    },
]


def curve(
    scheduler: dict[str, Any], total_steps: int, first: int, last: int, epoch_steps: float = 4
) -> list[float]:
    """Returns the learning rates of the steps from `first` to before `last`."""
    adam = Adam([torch.zeros(1, requires_grad=True)], lr=LR)
    built = build_scheduler(adam, scheduler, total_steps, epoch_steps)
    seen = []
    for _ in range(last):
        seen.append(adam.param_groups[0]["lr"])
        adam.step()
        built.step()
    return seen[first:]


class Epochs(Lit):
    """Data whose epochs have different numbers of batches."""

    def __init__(self, scheduler: Any, batches: list[int]) -> None:
        super().__init__({"lr": LR}, scheduler)
        self.batches = batches

    def train_dataloader(self) -> Any:
        return loader(self.batches[min(self.trainer.current_epoch, len(self.batches) - 1)])

    def val_dataloader(self) -> Any:
        return loader(1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0)


def fitted(
    scheduler: Any,
    batches: int | list[int] = 4,
    *,
    ckpt_path: Any = None,
    callbacks: Any = (),
    **flags: Any,
) -> list[float]:
    """Returns the learning rates of a run."""
    recorder = LearningRates()
    fit = trainer(
        callbacks=[recorder, *callbacks],
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **{"max_epochs": 2, **flags},
    )
    module = Epochs(scheduler, [batches] if isinstance(batches, int) else batches)
    fit.fit(module, ckpt_path=ckpt_path, weights_only=False)
    return recorder.seen


def test_second_fit_with_more_epochs_continues_the_schedule() -> None:
    with each_row() as row:
        for scheduler in SCHEDULES:
            with row(scheduler):
                recorder = LearningRates()
                fit = trainer(max_epochs=2, callbacks=[recorder])
                module = Epochs(scheduler, [4])
                fit.fit(module)
                assert fit.fit_loop.max_epochs == 2
                fit.fit_loop.max_epochs = 4
                fit.fit(module)
                expected = curve(scheduler, 8, 0, 8) + curve(scheduler, 16, 8, 16)
                assert recorder.seen == pytest.approx(expected)
                assert min(recorder.seen) > 0


def checkpoint(folder: Path, when: str) -> ModelCheckpoint:
    """Saves after each epoch, each validation or each step."""
    settings: dict[str, dict[str, Any]] = {
        "epoch": {"save_on_train_epoch_end": True},
        "validation": {"save_on_train_epoch_end": False},
        "step": {"every_n_train_steps": 1},
    }
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, **settings[when])


RESUMED: list[tuple[dict[str, Any], int]] = [
    ({"max_epochs": 4}, 16),
    ({"max_epochs": 3}, 12),
    ({"max_epochs": 6}, 24),
    # Like twice the number of devices.
    ({"max_epochs": 4, "batches": 2}, 8 + 4),
    ({"max_epochs": 4, "accumulate_grad_batches": 2}, 8 + 4),
    ({"max_epochs": None, "max_steps": 11}, 11),
]
"""Flags of the resumed run, and its total number of steps."""
MORE: dict[str, list[tuple[dict[str, Any], int]]] = {
    "epoch": [
        ({"max_epochs": 4, "batches": 8}, 8 + 16),
        ({"max_epochs": 4, "batches": 7, "accumulate_grad_batches": 3}, 8 + 6),
    ],
    # A validation comes before the end of its epoch, which Lightning trains to its new end.
    "validation": [
        ({"max_epochs": 4, "batches": 8}, 8 + 4 + 16),
        ({"max_epochs": 4, "batches": 7, "accumulate_grad_batches": 3}, 8 + 2 + 6),
        ({"max_epochs": 4, "max_steps": 13}, 13),
        ({"max_epochs": 4, "max_steps": 1000}, 16),
    ],
}


@pytest.mark.parametrize("when", ["epoch", "validation"])
def test_resumed_run_of_another_length_follows_the_curve_of_its_length(
    when: str, tmp_path: Path
) -> None:
    with each_row() as row:
        for scheduler in (LINEAR, ONE_CYCLE):
            folder = tmp_path / str(scheduler.get("name", "custom"))
            fitted(scheduler, max_epochs=4, callbacks=[checkpoint(folder, when)])
            for flags, total in RESUMED + MORE[when]:
                with row((scheduler, flags)):
                    seen = fitted(scheduler, ckpt_path=folder / "step=8.ckpt", **flags)
                    assert seen == pytest.approx(curve(scheduler, total, 8, total))


def test_each_schedule_can_be_resumed_longer(tmp_path: Path) -> None:
    with each_row() as row:
        for index, scheduler in enumerate(SCHEDULES):
            folder = tmp_path / str(index)
            fitted(scheduler, max_epochs=2, callbacks=[checkpoint(folder, "epoch")])
            with row(scheduler):
                seen = fitted(scheduler, ckpt_path=folder / "step=8.ckpt", max_epochs=3)
                assert seen == pytest.approx(curve(scheduler, 12, 8, 12))


def test_run_can_be_resumed_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    table: list[tuple[dict[str, Any], dict[str, Any], int, int]] = [
        # Flags of the two runs, the steps of the checkpoint, and those of the run.
        ({}, {}, 5, 8),
        ({}, {"max_epochs": 4}, 5, 16),
        ({}, {"max_epochs": 4}, 6, 16),
        ({}, {"max_epochs": 4}, 4, 16),
        ({}, {"max_epochs": 3, "batches": 6}, 5, 5 + 5 + 6),
        ({}, {"max_epochs": 3, "batches": 2}, 5, 5 + 1 + 2),
        ({}, {"max_epochs": 3, "accumulate_grad_batches": 2}, 6, 6 + 1 + 2),
        ({"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 2, "max_epochs": 3}, 3, 6),
        ({"accumulate_grad_batches": 3}, {"accumulate_grad_batches": 3, "max_epochs": 3}, 3, 6),
        ({"batches": 5, "accumulate_grad_batches": 2}, {"batches": 5, "max_epochs": 2}, 4, 4 + 3),
    ]
    with each_row() as row, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended")
        for index, (first, second, steps, total) in enumerate(table):
            folder = tmp_path / str(index)
            fitted(LINEAR, callbacks=[checkpoint(folder, "step")], **first)
            with row((first, second, steps)):
                seen = fitted(LINEAR, ckpt_path=folder / f"step={steps}.ckpt", **second)
                assert seen == pytest.approx(curve(LINEAR, total, steps, total))


def test_epochs_that_grow_and_shrink_keep_the_learning_rate_above_0() -> None:
    table: list[tuple[list[int], dict[str, Any], list[tuple[int, int]]]] = [
        # Batches of each epoch, flags, and for each epoch the steps of the run and its last one.
        ([2, 4, 6], {}, [(6, 2), (10, 6), (12, 12)]),
        ([6, 4, 2], {}, [(18, 6), (14, 10), (12, 12)]),
        ([6, 1, 6], {}, [(18, 6), (8, 7), (13, 13)]),
        ([4, 8, 3], {"accumulate_grad_batches": 2}, [(6, 2), (10, 6), (8, 8)]),
        ([2, 4, 6], {"max_steps": 9}, [(6, 2), (9, 6), (9, 9)]),
        ([2, 2, 5, 5], {"reload_dataloaders_every_n_epochs": 2}, [(8, 4), (14, 14)]),
    ]
    with each_row() as row:
        for scheduler, (batches, flags, lengths) in itertools.product((LINEAR, ONE_CYCLE), table):
            with row((scheduler, batches, flags)):
                flags = {"reload_dataloaders_every_n_epochs": 1, **flags}
                seen = fitted(scheduler, batches, max_epochs=len(batches), **flags)
                expected: list[float] = []
                for total, last in lengths:
                    expected += curve(scheduler, total, len(expected), last)
                assert seen == pytest.approx(expected)
                assert min(seen) > 0


def growing() -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})


def test_accumulation_that_grows_is_counted_once(tmp_path: Path) -> None:
    # 8 batches: 8, 4, 2, 2, ... steps.
    saving = checkpoint(tmp_path, "epoch")
    whole = fitted(LINEAR, 8, max_epochs=4, callbacks=[growing(), saving])
    assert whole == pytest.approx(curve(LINEAR, 16, 0, 16))
    for steps, epochs, total in [(8, 4, 16), (12, 4, 16), (12, 6, 20), (14, 3, 14), (8, 3, 14)]:
        path = tmp_path / f"step={steps}.ckpt"
        seen = fitted(LINEAR, 8, max_epochs=epochs, callbacks=[growing()], ckpt_path=path)
        assert seen == pytest.approx(curve(LINEAR, total, steps, total))


def test_warmup_in_epochs_follows_the_accumulation() -> None:
    scheduler = {"name": "constant", "warmup_epochs": 2.5}
    seen = fitted(scheduler, 8, max_epochs=4, callbacks=[growing()])
    expected = curve({"name": "constant", "warmup_steps": 8 + 4 + 1}, 16, 0, 16)
    assert seen == pytest.approx(expected)


def test_warmup_in_epochs_stays_when_epochs_change_their_length(tmp_path: Path) -> None:
    scheduler = {"name": "linear", "warmup_epochs": 1}
    fitted(scheduler, 4, max_epochs=4, callbacks=[checkpoint(tmp_path, "epoch")])
    seen = fitted(scheduler, 2, max_epochs=4, ckpt_path=tmp_path / "step=8.ckpt")
    assert seen == pytest.approx(curve({"name": "linear", "warmup_steps": 4}, 12, 8, 12))


def test_run_continues_after_an_error_in_the_middle_of_an_epoch() -> None:
    class Failing(Epochs):
        fails = True

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            if self.fails and self.trainer.global_step == 6:
                raise RuntimeError
            return super().training_step(batch, batch_idx)

    recorder = LearningRates()
    fit = trainer(max_epochs=3, callbacks=[recorder])
    module = Failing(LINEAR, [4])
    with pytest.raises(RuntimeError):
        fit.fit(module)
    module.fails = False
    fit.fit(module)
    # Lightning trains the epoch again.
    expected = curve(LINEAR, 12, 0, 6) + curve(LINEAR, 14, 6, 14)
    assert recorder.seen == pytest.approx(expected)


def test_epoch_that_a_hook_ends_shortens_the_run() -> None:
    class Skipping(Epochs):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    recorder = LearningRates()
    trainer(max_epochs=3, callbacks=[recorder]).fit(Skipping(LINEAR, [4]))
    expected = curve(LINEAR, 12, 0, 2) + curve(LINEAR, 10, 2, 4) + curve(LINEAR, 8, 4, 6)
    assert recorder.seen == pytest.approx(expected)


def test_exponential_falls_by_gamma_in_the_mean_epoch() -> None:
    scheduler = {"name": "exponential", "gamma": 0.5}
    seen = fitted(scheduler, 8, max_epochs=4, callbacks=[growing()])
    assert seen == pytest.approx([LR * 0.5 ** (step / 4) for step in range(16)])


def test_total_steps_of_the_config_stays_when_the_run_is_longer(tmp_path: Path) -> None:
    custom = {**ONE_CYCLE, "total_steps": 10, "interval": "step"}
    with each_row() as row:
        for index, scheduler in enumerate([{**LINEAR, "total_steps": 10}, custom]):
            with row(scheduler), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* has ended after 10 steps")
                folder = tmp_path / str(index)
                seen = fitted(scheduler, max_epochs=2, callbacks=[checkpoint(folder, "epoch")])
                expected = curve(scheduler, 10, 0, 12)
                assert seen == pytest.approx(expected[:8])
                resumed = fitted(scheduler, max_epochs=3, ckpt_path=folder / "step=8.ckpt")
                assert resumed == pytest.approx(expected[8:])


def test_run_longer_than_a_schedule_of_torch_trains_to_its_end() -> None:
    with pytest.warns(UserWarning, match=r"OneCycleLR.* has ended after 5 steps"):
        seen = fitted({**ONE_CYCLE, "total_steps": 5, "interval": "step"})
    assert len(seen) == 8
    assert len({*seen[4:]}) == 1


def test_schedule_in_epochs_continues_in_a_second_fit() -> None:
    table: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [1, 0.5, 0.25, 0.125, 0.0625]),
        ({"frequency": 2}, [1, 1, 0.5, 0.5, 0.25]),
        ({"interval": "step", "frequency": 4}, [1, 0.5, 0.25, 0.125, 0.0625]),
    ]
    with each_row() as row:
        for options, expected in table:
            scheduler = {"_target_": f"{TORCH}.ExponentialLR", "gamma": 0.5, **options}
            with row(options):
                recorder = LearningRates()
                fit = trainer(max_epochs=3, callbacks=[recorder])
                module = Epochs(scheduler, [4])
                fit.fit(module)
                fit.fit_loop.max_epochs = 5
                fit.fit(module)
                assert [each / LR for each in recorder.seen[::4]] == pytest.approx(expected)


def test_longer_run_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with each_row() as row:
        for when in ("epoch", "validation"):
            folder = tmp_path / when
            fitted(LINEAR, callbacks=[checkpoint(folder, when)])
            for flags, expected in [({}, []), ({"max_epochs": 3}, ["12 optimizer steps, not 8"])]:
                with row((when, flags)), caplog.at_level(logging.INFO):
                    caplog.clear()
                    fitted(LINEAR, ckpt_path=folder / "step=4.ckpt", **flags)
                    lines = [each.message for each in caplog.records]
                    said = [each for each in lines if "schedule follows" in each]
                    assert len(said) == 0, said
                    changed = [each for each in lines if "replaces the checkpoint's" in each]
                    assert len(changed) == len(expected), lines


class ByHand(L.LightningModule):
    """Steps its optimizer and schedule in manual optimization."""

    automatic_optimization = False

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.net = network()
        self.scheduler = scheduler
        self.rates: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()

    def configure_optimizers(self) -> Any:
        return build_adam(self, {"lr": LR}, self.scheduler)


def test_manual_optimization_continues_in_a_second_fit_and_when_resumed(tmp_path: Path) -> None:
    with each_row() as row:
        for index, scheduler in enumerate((LINEAR, ONE_CYCLE)):
            module = ByHand(scheduler)
            fit = trainer(max_epochs=2)
            fit.fit(module, loader(4))
            path = tmp_path / f"{index}.ckpt"
            fit.save_checkpoint(path)
            expected = curve(scheduler, 8, 0, 8), curve(scheduler, 16, 8, 16)
            with row((scheduler, "second fit")):
                fit.fit_loop.max_epochs = 4
                fit.fit(module, loader(4))
                assert module.rates == pytest.approx(expected[0] + expected[1])
            with row((scheduler, "resumed")):
                resumed = ByHand(scheduler)
                trainer(max_epochs=4).fit(resumed, loader(4), ckpt_path=path)
                assert resumed.rates == pytest.approx(expected[1])


def test_checkpoint_can_be_resumed_on_a_trainer_that_has_trained(tmp_path: Path) -> None:
    fitted(LINEAR, callbacks=[checkpoint(tmp_path, "epoch")])
    recorder = LearningRates()
    fit = trainer(max_epochs=2, callbacks=[recorder])
    module = Epochs(LINEAR, [4])
    fit.fit(module)
    fit.fit(module, ckpt_path=tmp_path / "step=4.ckpt", weights_only=False)
    fit.fit_loop.max_epochs = 3
    fit.fit(module, ckpt_path=tmp_path / "step=4.ckpt", weights_only=False)
    expected = curve(LINEAR, 8, 0, 8) + curve(LINEAR, 8, 4, 8) + curve(LINEAR, 12, 4, 12)
    assert recorder.seen == pytest.approx(expected)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((torch.randn(6), torch.randn(1)) for _ in range(16))


OTHERS: list[tuple[dict[str, Any], int, int]] = [
    ({"limit_train_batches": 0.5}, 4, 4),
    ({"limit_train_batches": 3}, 6, 6),
    ({"overfit_batches": 2}, 4, 4),
    ({"max_time": {"hours": 1}}, 8, 8),
    ({"callbacks": [Timer({"hours": 1})]}, 8, 8),
    (
        {"min_epochs": 1, "max_epochs": 4, "callbacks": [EarlyStopping("val/loss", patience=1)]},
        16,
        8,
    ),
    (
        {"min_epochs": 3, "max_epochs": 4, "callbacks": [EarlyStopping("val/loss", patience=1)]},
        16,
        12,
    ),
    ({"max_steps": 3}, 3, 3),
    ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 8, 8),
    ({"barebones": True}, 8, 8),
]
"""Flags, the steps of the schedule, and the steps that are trained."""


def test_epochs_without_a_limit_have_a_length() -> None:
    scheduler = {"name": "constant", "warmup_epochs": 1.5}
    seen = fitted(scheduler, max_epochs=-1, max_steps=8)
    assert seen == pytest.approx(curve({"name": "constant", "warmup_steps": 6}, 8, 0, 8))


def test_smoke_test_accepts_each_schedule() -> None:
    with each_row() as row:
        for scheduler, flags in itertools.product(
            SCHEDULES, [{"fast_dev_run": True}, {"limit_train_batches": 0}]
        ):
            with row((scheduler, flags)):
                assert len(fitted(scheduler, **flags)) == ("fast_dev_run" in flags)


def test_other_ends_of_a_run() -> None:
    with each_row() as row, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*barebones|.*overfit_batches")
        for flags, total, trained in OTHERS:
            with row(flags):
                recorder = LearningRates()
                callbacks = [recorder, *flags.get("callbacks", ())]
                fit = trainer(**{"max_epochs": 2, **flags, "callbacks": callbacks})
                fit.fit(Epochs(LINEAR, [4]))
                assert recorder.seen == pytest.approx(curve(LINEAR, total, 0, trained))


def test_stream_without_a_length_ends_with_max_steps(tmp_path: Path) -> None:
    data = DataLoader(Stream(), batch_size=4)
    recorder = LearningRates()
    fit = trainer(max_steps=6, callbacks=[recorder])
    module = Lit({"lr": LR}, LINEAR)
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "6.ckpt")
    assert recorder.seen == pytest.approx(curve(LINEAR, 6, 0, 6))
    second = LearningRates()
    fit = trainer(max_steps=11, callbacks=[second])
    fit.fit(module, data, ckpt_path=tmp_path / "6.ckpt")
    assert second.seen == pytest.approx(curve(LINEAR, 11, 6, 11))
