"""The `plateau` schedule in a real Trainer."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_adam import ConfigError, build_adam
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    LR,
    LearningRates,
    Lit,
    assert_same_parameters,
    loader,
    loss_of,
    network,
    trainer,
)

PLATEAU = {"name": "plateau", "patience": 0, "factor": 0.5}
TORCH_PLATEAU = {
    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "patience": 0,
    "factor": 0.5,
}
BATCHES = 4
EPOCHS = 3


class Stalled(Lit):
    """Logs constant metrics, so each comparison after the first reduces the learning rate."""

    def __init__(
        self,
        scheduler: Any,
        *,
        validation: tuple[str, ...] = ("val/loss", "val/acc"),
        training: tuple[str, ...] = (),
        at_epoch_end: tuple[str, ...] = (),
    ) -> None:
        super().__init__(ADAMW, scheduler)
        self.keys = validation, training, at_epoch_end

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        for key in self.keys[1]:
            self.log(key, 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for key in self.keys[0]:
            self.log(key, 1.0)

    def on_train_epoch_end(self) -> None:
        for key in self.keys[2]:
            self.log(key, 1.0)


def rates(
    module: L.LightningModule,
    *,
    validation: Any = "two",
    ckpt_path: Any = None,
    callbacks: Any = (),
    **flags: Any,
) -> list[float]:
    """Returns the learning rate of each step, in units of the peak."""
    recorder = LearningRates()
    fit = trainer(callbacks=[recorder, *callbacks], **{"max_epochs": EPOCHS, **flags})
    batches = loader(2) if validation == "two" else validation
    fit.fit(module, loader(BATCHES), batches, ckpt_path=ckpt_path, weights_only=False)
    return [lr / LR for lr in recorder.seen]


VALIDATION_INTERVALS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [1] * 8 + [0.5] * 4),
    ({"check_val_every_n_epoch": 2, "max_epochs": 5}, [1] * 16 + [0.5] * 4),
    ({"val_check_interval": 0.5}, [1] * 4 + [0.5] * 2 + [0.25] * 2 + [0.125] * 2 + [0.0625] * 2),
    (
        {"val_check_interval": 2, "check_val_every_n_epoch": 2, "max_epochs": 5},
        [1] * 8 + [0.5] * 6 + [0.25] * 2 + [0.125] * 4,
    ),
    (
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        [1] * 6 + [0.5] * 3 + [0.25] * 3,
    ),
    (
        # Optimizer steps after batches 2 and 4, validation after batch 3.
        {"val_check_interval": 3, "accumulate_grad_batches": 2},
        [1, 1, 1, 0.5, 0.5, 0.25],
    ),
    (
        # Validation after batches 3, 6, 9 and 12 of the run.
        {
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "accumulate_grad_batches": 2,
        },
        [1, 1, 1, 0.5, 0.25, 0.25],
    ),
    (
        {"val_check_interval": timedelta(microseconds=1), "max_epochs": 1},
        [1, 1, 0.5, 0.25],
    ),
    ({"max_steps": 6, "max_epochs": None, "val_check_interval": 2}, [1] * 4 + [0.5] * 2),
    ({"num_sanity_val_steps": 0}, [1] * 8 + [0.5] * 4),
    ({"limit_train_batches": 0.5}, [1] * 4 + [0.5] * 2),
    ({"overfit_batches": 2}, [1] * 4 + [0.5] * 2),
    ({"fast_dev_run": 4}, [1] * 4),
]
"""Flags of the Trainer, and the learning rates of all steps."""


@pytest.mark.parametrize("scheduler", [PLATEAU, TORCH_PLATEAU], ids=["ours", "torch's"])
def test_metric_is_compared_after_each_validation(scheduler: Any) -> None:
    with each_row() as row:
        for flags, expected in VALIDATION_INTERVALS:
            with row(flags):
                assert rates(Stalled(scheduler), **flags) == pytest.approx(expected)


def test_warmup_comes_before_the_first_comparison() -> None:
    module = Stalled({**PLATEAU, "warmup_steps": 4})
    # Validation during the warm-up is not compared.
    expected = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert rates(module, val_check_interval=0.5) == pytest.approx(expected)


def test_metric_of_training_and_validation_is_compared_after_validation() -> None:
    module = Stalled(PLATEAU, training=("val/loss",))
    assert rates(module) == pytest.approx([1] * 8 + [0.5] * 4)


class Plain(Stalled):
    """Uses torch's scheduler as documented by Lightning."""

    def __init__(self, options: dict[str, Any], **keys: Any) -> None:
        super().__init__(None, **keys)
        self.options = options

    def configure_optimizers(self) -> Any:
        adam = torch.optim.AdamW(self.parameters(), lr=LR)
        scheduler = ReduceLROnPlateau(adam, factor=0.5, patience=0)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": scheduler, **self.options}}


IN_TRAINING: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"training": ("train/loss",)}, {}, {"max_epochs": 4}),
    ({"training": ("train/loss",)}, {}, {"max_epochs": 4, "validation": None}),
    ({"training": ("train/loss",)}, {}, {"max_epochs": 4, "limit_val_batches": 0}),
    ({"training": ("train/loss",)}, {}, {"max_epochs": 4, "check_val_every_n_epoch": 2}),
    ({"training": ("train/loss",)}, {}, {"max_epochs": 4, "val_check_interval": 0.5}),
    ({"training": ("train/loss",)}, {}, {"max_epochs": 4, "accumulate_grad_batches": 3}),
    ({"training": ("train/loss",)}, {}, {"max_steps": 10, "max_epochs": None}),
    ({"training": ("train/loss",)}, {}, {"fast_dev_run": 3}),
    ({"at_epoch_end": ("train/loss",)}, {}, {"max_epochs": 4}),
    ({"at_epoch_end": ("train/loss",)}, {}, {"max_epochs": 4, "validation": None}),
    ({"at_epoch_end": ("train/loss",)}, {}, {"max_epochs": 4, "val_check_interval": 0.5}),
    ({"training": ("train/acc",)}, {"strict": False}, {"max_epochs": 4}),
    ({}, {"strict": False}, {"max_epochs": 2}),
    ({}, {"strict": False}, {"max_epochs": 2, "validation": None}),
]
"""The metrics that the module logs, options of the schedule, and flags of the Trainer."""


def test_metric_of_training_is_compared_as_in_lightning() -> None:
    with each_row() as row, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ReduceLROnPlateau conditioned on metric")
        for keys, options, flags in IN_TRAINING:
            for scheduler in (PLATEAU, TORCH_PLATEAU):
                with row((scheduler.get("name"), keys, options, flags)):
                    options = {"monitor": "train/loss", **options}
                    expected = rates(Plain(options, **keys), **flags)
                    assert rates(Stalled({**scheduler, **options}, **keys), **flags) == expected
                    is_logged = any("train/loss" in each for each in keys.values())
                    is_reduced = is_logged and "fast_dev_run" not in flags
                    assert (len(set(expected)) > 1) == is_reduced


def test_explicit_interval_works_as_in_lightning() -> None:
    table: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"interval": "step"}, {"training": ("train/loss",)}),
        ({"interval": "step", "frequency": 2}, {"training": ("train/loss",)}),
        ({"interval": "epoch"}, {"training": ("train/loss",)}),
        ({"interval": "epoch", "frequency": 2}, {"training": ("train/loss",)}),
        ({"interval": "epoch", "monitor": "val/loss"}, {}),
        ({"interval": "step", "monitor": "val/loss"}, {}),
    ]
    with each_row() as row:
        for given, keys in table:
            options = {"monitor": "train/loss", "strict": False, **given}
            with row(options), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="ReduceLROnPlateau conditioned on")
                flags = {"max_epochs": 5, "val_check_interval": 0.5}
                expected = rates(Plain(options, **keys), **flags)
                assert rates(Stalled({**TORCH_PLATEAU, **options}, **keys), **flags) == expected
                assert len(set(expected)) > 1


@pytest.mark.parametrize("scheduler", [PLATEAU, TORCH_PLATEAU], ids=["ours", "torch's"])
def test_checkpoint_of_a_validation_has_the_reduced_rate(scheduler: Any, tmp_path: Path) -> None:
    def saved() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val/loss")

    whole = Stalled(scheduler)
    expected = rates(whole, max_epochs=5, callbacks=[saved()], enable_checkpointing=True)
    assert expected == pytest.approx([1] * 8 + [0.5] * 4 + [0.25] * 4 + [0.125] * 4)
    for steps in (4, 8, 12, 16):
        path = tmp_path / f"step={steps}.ckpt"
        state = torch.load(path, weights_only=True)["optimizer_states"][0]
        assert state["param_groups"][0]["lr"] / LR == pytest.approx(expected[steps])
        resumed = Stalled(scheduler)
        seen = rates(resumed, max_epochs=5, ckpt_path=path)
        assert seen == expected[steps:]
        assert_same_parameters(resumed, whole)


@pytest.mark.parametrize("scheduler", [PLATEAU, TORCH_PLATEAU], ids=["ours", "torch's"])
def test_checkpoint_within_an_epoch_continues_the_comparisons(
    scheduler: Any, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val/loss")
    flags: dict[str, Any] = {"val_check_interval": 0.5, "max_epochs": 3}
    expected = rates(Stalled(scheduler), callbacks=[saving], enable_checkpointing=True, **flags)
    with each_row() as row:
        for steps in range(2, 12, 2):
            with row(steps), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="You're resuming from a checkpoint")
                path = tmp_path / f"step={steps}.ckpt"
                seen = rates(Stalled(scheduler), ckpt_path=path, **flags)
                assert seen == expected[steps:]


class FromLateMetric(Stalled):
    """Logs nothing in the sanity check."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


MISSING: list[tuple[type[Stalled], dict[str, Any], dict[str, Any], dict[str, Any], str, int]] = [
    # A misspelt name, at the sanity check.
    (Stalled, {"monitor": "val/los"}, {}, {}, "val/loss", 0),
    (Stalled, {"monitor": "val_loss"}, {}, {}, "val/loss", 0),
    (Stalled, {"monitor": "val/accc", "mode": "max"}, {}, {}, "val/acc", 0),
    (Stalled, {"monitor": "val/los"}, {}, {"val_check_interval": 2}, "val/loss", 0),
    # Without it, at the end of the first epoch.
    (FromLateMetric, {"monitor": "val/los"}, {}, {}, "val/loss", 4),
    (Stalled, {"monitor": "val/los"}, {}, {"num_sanity_val_steps": 0}, "val/loss", 4),
    # Training might have logged it.
    (Stalled, {"monitor": "metric"}, {}, {}, "val/loss", 4),
    (Stalled, {"monitor": "metric"}, {}, {"validation": None}, "loss", 4),
    (Stalled, {"monitor": "metric"}, {}, {"limit_val_batches": 0}, "loss", 4),
    # A metric of the right direction.
    (Stalled, {"monitor": "val/f1", "mode": "max"}, {}, {}, "val/acc", 4),
    (Stalled, {"monitor": "val/mae"}, {}, {}, "val/loss", 4),
    (Stalled, {"monitor": "val/ac"}, {"validation": ("val/acc", "val/nll")}, {}, "val/nll", 0),
]
"""The module, its schedule, its metrics, flags, the suggested metric, and the steps taken."""


@pytest.mark.parametrize("scheduler", [PLATEAU, TORCH_PLATEAU], ids=["ours", "torch's"])
def test_metric_that_is_not_logged_raises_one_sentence(scheduler: dict[str, Any]) -> None:
    with each_row() as row:
        for module, options, keys, flags, suggested, steps in MISSING:
            with row((options, keys, flags)):
                seen = LearningRates()
                with pytest.raises(ConfigError) as raised:
                    rates(
                        module({**scheduler, **options}, **keys),
                        callbacks=[seen],
                        **{"max_epochs": 2, **flags},
                    )
                message = str(raised.value)
                assert message.startswith(f"monitor={options['monitor']!r} is not logged. The mod")
                assert message.endswith(f". Use for example monitor={suggested!r}")
                assert len(seen.seen) == steps


def test_metric_of_the_wrong_direction_is_not_suggested() -> None:
    module = Stalled({**PLATEAU, "monitor": "val/accu"}, validation=("val/acc",))
    with pytest.raises(ConfigError) as raised:
        rates(module, max_epochs=2)
    assert "Use" not in str(raised.value)


def test_error_of_a_missing_metric_names_its_config_path() -> None:
    root = OmegaConf.create({"model": {"scheduler": {**PLATEAU, "monitor": "loss/val"}}})
    with pytest.raises(ConfigError, match=r"^cfg\.model\.scheduler\.monitor='loss/val' is not lo"):
        rates(Stalled(root.model.scheduler), max_epochs=2)


def test_validate_after_fit_does_not_check_the_metric() -> None:
    module = Stalled(PLATEAU)
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(BATCHES), loader(2))
    module.keys = ("test/loss",), (), ()
    assert "test/loss" in fit.validate(module, loader(2), verbose=False)[0]


def test_overridden_hooks_do_not_stop_the_comparisons() -> None:
    class Own(Stalled):
        def on_fit_start(self) -> None: ...

        def on_train_start(self) -> None: ...

        def on_validation_end(self) -> None: ...

        def on_validation_epoch_end(self) -> None: ...

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    assert rates(Own(PLATEAU)) == pytest.approx([1] * 8 + [0.5] * 4)


def test_two_optimizers_compare_by_hand() -> None:
    class Two(L.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([network(), network()])
            self.rates: list[list[float]] = []

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            optimizers: Any = self.optimizers()
            for optimizer, net in zip(optimizers, self.nets, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss_of(net, batch))
                optimizer.step()

        def on_train_epoch_end(self) -> None:
            schedules: Any = self.lr_schedulers()
            schedules.step(1.0)
            self.rates.append([each.param_groups[0]["lr"] for each in self.trainer.optimizers])

        def configure_optimizers(self) -> Any:
            return [
                build_adam(self.nets[0], ADAMW, PLATEAU, trainer=self.trainer),
                build_adam(self.nets[1], ADAMW, trainer=self.trainer),
            ]

    module = Two()
    trainer(max_epochs=3).fit(module, loader(2))
    assert module.rates == [[LR, LR], [LR / 2, LR], [LR / 4, LR]]
