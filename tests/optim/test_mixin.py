"""AdamMixin in a real Trainer: the optimizer and the schedule, their configs and errors."""

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.tuner.tuning import Tuner
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import AdamMixin, ConfigError, build_adam, build_scheduler
from lightning_adam.optim.schedulers import scheduler_settings
from tests.support.tables import each_row
from tests.support.training import ADAMW, LearningRates, Lit, loader, loss_of, network, trainer

COSINE = {"name": "cosine", "warmup_steps": 5}
TORCH = "torch.optim.lr_scheduler"


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(6), torch.randn(1)


def endless() -> DataLoader[Any]:
    return DataLoader(Endless(), batch_size=4)


GROWING = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
LENGTHS: dict[str, tuple[int, dict[str, Any], Any]] = {
    "accumulation": (10, {"max_epochs": 2, "accumulate_grad_batches": 2}, loader(10)),
    "growing accumulation": (7 + 4 + 2, {"max_epochs": 3, "callbacks": [GROWING]}, loader(7)),
    "growing accumulation and max_steps": (
        12,
        {"max_epochs": 3, "max_steps": 12, "callbacks": [GROWING]},
        loader(7),
    ),
    "max_steps without a last epoch": (7, {"max_epochs": -1, "max_steps": 7}, endless()),
    "max_steps alone": (7, {"max_steps": 7}, endless()),
}
"""Optimizer steps, flags and data. An epoch of 7 batches ends with an incomplete accumulation."""


def test_schedule_is_as_long_as_the_run() -> None:
    with each_row() as row:
        for name, (steps, flags, data) in LENGTHS.items():
            with row(name):
                fit = trainer(**flags)
                fit.fit(Lit(ADAMW, {"name": "linear"}), data)
                assert fit.global_step == steps
                scheduler = fit.lr_scheduler_configs[0].scheduler
                assert scheduler_settings(scheduler)["total_steps"] == steps
                assert scheduler.get_last_lr() == [0.0, 0.0]


def test_run_without_an_end_is_an_error_unless_total_steps_is_set() -> None:
    endless_runs: list[tuple[dict[str, Any], Any]] = [
        ({"max_epochs": -1}, loader(4)),
        ({"max_epochs": 3}, endless()),
    ]
    with each_row() as row:
        for flags, data in endless_runs:
            with row(flags):
                fit = trainer(**flags)
                with pytest.raises(
                    ConfigError, match=r"^name='cosine' needs .*Set total_steps=N, "
                ):
                    fit.fit(Lit(ADAMW, COSINE), data)
                assert fit.global_step == 0
    fit = trainer(max_epochs=1, limit_train_batches=6)
    fit.fit(Lit(ADAMW, {"name": "linear", "total_steps": 5}), endless())
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0, 0.0]


def test_warmup_longer_than_the_run_ends_with_it() -> None:
    fit = trainer(max_epochs=3, limit_train_batches=1)
    with pytest.warns(UserWarning, match=r"^warmup_steps=5 is longer than the run: .* which 3 "):
        fit.fit(Lit(ADAMW, {"name": "cosine", "warmup_steps": 5}), loader(4))
    assert fit.global_step == 3


def test_fast_dev_run_accepts_the_schedule_of_the_whole_run() -> None:
    schedules: list[dict[str, Any]] = [
        {"name": "constant", "warmup_steps": 500},
        {"name": "wsd", "warmup_steps": 500, "decay_steps": 500},
        {"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": "total_steps"},
    ]
    with each_row() as row, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is longer than the run")
        for scheduler in schedules:
            with row(scheduler):
                fit = trainer(fast_dev_run=True)
                fit.fit(Lit(ADAMW, scheduler), loader(4))
                assert fit.global_step == 1


def test_lr_is_constant_without_a_scheduler() -> None:
    fit = trainer(max_epochs=1)
    fit.fit(Lit(ADAMW), loader(4))
    assert fit.lr_scheduler_configs == []
    assert fit.optimizers[0].param_groups[0]["lr"] == 1e-2


class FromHparams(AdamMixin, L.LightningModule):
    def __init__(self, width: int, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(6, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


@pytest.mark.parametrize("form", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_configs_in_hparams_are_used_and_restored_from_a_checkpoint(
    form: Any, tmp_path: Path
) -> None:
    module = FromHparams(3, form({"lr": 0.5}), form({"name": "linear"}))
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(4))
    assert fit.optimizers[0].defaults["lr"] == 0.5
    assert len(fit.lr_scheduler_configs) == 1
    fit.save_checkpoint(tmp_path / "last.ckpt")
    loaded = FromHparams.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert loaded.hparams["optimizer"]["lr"] == 0.5


class Counting:
    """Another mixin, with its constructor and keyword argument."""

    def __init__(self, *args: Any, start: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = start


class Cooperative(AdamMixin, Counting, L.LightningModule):
    def __init__(self) -> None:
        super().__init__(optimizer=ADAMW, start=3)
        self.net = nn.Linear(6, 1)


class CooperativeTheOtherWay(Counting, AdamMixin, L.LightningModule):
    def __init__(self) -> None:
        super().__init__(optimizer=ADAMW, start=3)
        self.net = nn.Linear(6, 1)


@pytest.mark.parametrize("kind", [Cooperative, CooperativeTheOtherWay])
def test_cooperates_with_other_mixins(kind: type[Any]) -> None:
    module = kind()
    assert module.count == 3
    assert module.configure_optimizers()["optimizer"].defaults["lr"] == 1e-2


def test_wrong_order_of_bases_raises_when_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"class Wrong\(AdamMixin, LightningModule\)"):

        class Wrong(L.LightningModule, AdamMixin):  # type: ignore[misc]
            pass


def test_invalid_config_raises_when_the_module_is_built() -> None:
    with pytest.raises(ConfigError, match=r"^lr=-1 must be above 0\. .*lr=0\.001$"):
        Lit({"lr": -1})
    with pytest.raises(ConfigError, match=r"^name='step' must be one of constant, "):
        Lit(ADAMW, {"name": "step"})


def test_missing_config_raises_before_training() -> None:
    fit = trainer(max_epochs=1)
    with pytest.raises(ConfigError, match="Lit has no optimizer config"):
        fit.fit(Lit(), loader(2))


def test_fused_is_chosen_with_clipping_and_every_precision() -> None:
    flags: list[dict[str, Any]] = [
        {},
        {"gradient_clip_val": 1.0},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-mixed", "gradient_clip_val": 1.0},
        {"precision": "bf16-true", "gradient_clip_val": 1.0},
        {"precision": "64-true"},
    ]
    with each_row() as row:
        for each in flags:
            with row(each):
                fit = trainer(max_epochs=1, **each)
                fit.fit(Lit(ADAMW), loader(3))
                assert fit.global_step == 3
                assert fit.optimizers[0].param_groups[0]["fused"] is True


def test_groups_and_schedule_are_logged_once_when_fit_starts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        trainer(max_epochs=2).fit(Lit(ADAMW, COSINE), loader(4))
    lines = [record.message for record in caplog.records]
    (groups,) = [line for line in lines if "no_decay" in line]
    assert groups.startswith("AdamW, fused: float32 on cpu\ngroup ")
    (schedule,) = [line for line in lines if line.startswith("schedule")]
    assert schedule == (
        "schedule  name=cosine, warmup_steps=5, total_steps=8, min_lr_ratio=0.0, interval=step,"
        " frequency=1"
    )


class Stepping(Lit):
    """Counts the steps of its scheduler."""

    stepped = 0

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped += 1
        super().lr_scheduler_step(scheduler, metric)


STEPPING: list[tuple[Any, str, int]] = [
    ({"_target_": f"{TORCH}.StepLR", "step_size": 1}, "epoch", 2),
    ({"_target_": f"{TORCH}.StepLR", "step_size": 1, "interval": "step"}, "step", 12),
    ({"_target_": f"{TORCH}.StepLR", "step_size": 1, "frequency": 2}, "epoch", 1),
    ({"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": "total_steps"}, "step", 12),
    ({"_target_": f"{TORCH}.LinearLR", "total_iters": "total_steps"}, "step", 12),
    (functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1), "epoch", 2),
    (
        functools.partial(
            torch.optim.lr_scheduler.CosineAnnealingLR,
            T_max="total_steps",  # type: ignore[arg-type]
        ),
        "step",
        12,
    ),
]
"""Schedulers of torch, the interval each is stepped in, and how often in two epochs."""


def test_custom_scheduler_is_stepped_as_in_lightning() -> None:
    with each_row() as row:
        for scheduler, interval, steps in STEPPING:
            with row(scheduler):
                module = Stepping(ADAMW, scheduler)
                fit = trainer(max_epochs=2)
                fit.fit(module, loader(6))
                assert fit.lr_scheduler_configs[0].interval == interval
                assert module.stepped == steps


def test_frequency_above_the_batches_of_an_epoch_is_an_error() -> None:
    """Without this error, Lightning would silently never step the scheduler."""
    scheduler = {"_target_": f"{TORCH}.StepLR", "step_size": 1, "interval": "step"}
    with pytest.raises(ConfigError, match=r"^frequency=10 is more than the 8 batches"):
        trainer(max_epochs=2).fit(Lit(ADAMW, {**scheduler, "frequency": 10}), loader(8))
    fit = trainer(max_epochs=2)
    fit.fit(Lit(ADAMW, {**scheduler, "frequency": 8}), loader(8))
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_custom_plateau_has_a_metric_and_no_frequency() -> None:
    plateau = {"_target_": f"{TORCH}.ReduceLROnPlateau", "monitor": "loss"}
    with pytest.raises(ConfigError, match=r"^frequency=2 must be 1 .*validation\. .*=1$"):
        trainer(max_epochs=1).fit(Lit(ADAMW, {**plateau, "frequency": 2}), loader(4))
    options = build_adam(network(), ADAMW, {**plateau, "frequency": 2})["lr_scheduler"]
    assert (options["monitor"], options["frequency"]) == ("loss", 2)
    stepwise = {"_target_": f"{TORCH}.StepLR", "step_size": 1, "interval": "step"}
    assert "monitor" not in build_adam(network(), ADAMW, stepwise)["lr_scheduler"]


class FitLearningRates(LearningRates):
    """Records only the last fit, without the steps of `lr_find`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = []


def curve(scheduler: dict[str, Any], peak: float, steps: int) -> list[float]:
    """Returns the learning rates of a schedule with the given peak."""
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=peak)
    built = build_scheduler(adam, scheduler, steps)
    seen = []
    for _ in range(steps):
        seen.append(adam.param_groups[0]["lr"])
        adam.step()
        built.step()
    return seen


ONE_CYCLE = {
    "_target_": f"{TORCH}.OneCycleLR",
    "max_lr": 1e-2,
    "total_steps": "total_steps",
    "cycle_momentum": False,
}
CYCLIC = {
    "_target_": f"{TORCH}.CyclicLR",
    "base_lr": 1e-3,
    "max_lr": 1e-2,
    "step_size_up": 3,
    "cycle_momentum": False,
    "interval": "step",
}
FINDABLE: list[tuple[dict[str, Any], Callable[[float], dict[str, Any]]]] = [
    (ONE_CYCLE, lambda peak: {**ONE_CYCLE, "max_lr": peak}),
    (CYCLIC, lambda peak: {**CYCLIC, "max_lr": peak, "base_lr": peak / 10}),
    ({"name": "one_cycle"}, lambda _: {"name": "one_cycle"}),
    (COSINE, lambda _: COSINE),
]
"""A schedule, and the same one with another peak."""


class Finder(LearningRateFinder):
    def __init__(self) -> None:
        super().__init__(1e-4, 1e-1, 20, attr_name="optimizer_lr", early_stop_threshold=None)


def test_optimizer_lr_moves_the_whole_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with each_row() as row:
        for scheduler, with_peak in FINDABLE:
            for way in ("by hand", "tuner", "callback"):
                rates = FitLearningRates()
                callbacks = [rates, *([Finder()] if way == "callback" else [])]
                fit = trainer(max_epochs=1, callbacks=callbacks)
                module = Lit(ADAMW, scheduler)
                with row((scheduler, way)):
                    if way == "by hand":
                        module.optimizer_lr = 0.05
                    elif way == "tuner":
                        Tuner(fit).lr_find(
                            module,
                            loader(20),
                            num_training=20,
                            attr_name="optimizer_lr",
                            early_stop_threshold=None,
                        )
                    fit.fit(module, loader(20))
                    assert module.optimizer_lr != 1e-2
                    expected = curve(with_peak(module.optimizer_lr), module.optimizer_lr, 20)
                    assert rates.seen == pytest.approx(expected)


def test_total_steps_argument_of_a_custom_scheduler_is_the_length_of_the_run() -> None:
    fit = trainer(max_epochs=2)
    scheduler = {"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": "total_steps"}
    fit.fit(Lit(ADAMW, scheduler), loader(6))
    built = fit.lr_scheduler_configs[0].scheduler
    assert isinstance(built, torch.optim.lr_scheduler.CosineAnnealingLR)
    assert built.T_max == 12
    assert built.get_last_lr() == [0.0, 0.0]


def test_build_adam_builds_two_optimizers() -> None:
    class Two(L.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator = nn.Linear(6, 1), nn.Linear(6, 1)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            for optimizer, net in zip(
                self.optimizers(), (self.generator, self.discriminator), strict=True
            ):
                optimizer.zero_grad()
                self.manual_backward(loss_of(net, batch))
                optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]

        def configure_optimizers(self) -> Any:
            return (
                build_adam(self.generator, ADAMW, {"name": "linear"}, 4, trainer=self.trainer),
                build_adam(self.discriminator, {"lr": 0.5}, trainer=self.trainer),
            )

    fit = trainer(max_epochs=1)
    fit.fit(Two(), loader(2))
    assert [type(each).__name__ for each in fit.optimizers] == ["AdamW", "Adam"]
    assert [each.param_groups[0]["lr"] for each in fit.optimizers] == [1e-2 / 2, 0.5]
