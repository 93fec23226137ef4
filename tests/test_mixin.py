"""AdamMixin in a real Trainer: what is trained with, where configs come from, what is refused."""

import functools
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import AdamMixin, ConfigError, build_adam
from lightning_adam.schema import AdamConfig, CosineConfig
from tests.support.training import ADAMW, Lit, loader, loss_of, network, parameters, trainer

COSINE = {"name": "cosine", "warmup_steps": 5}


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(6), torch.randn(1)


def trained_by_hand(steps: int, warmup: int) -> list[Tensor]:
    """torch alone: groups, AdamW and the cosine written out."""
    net = network()
    matrices = [each for each in net.parameters() if each.ndim == 2]
    vectors = [each for each in net.parameters() if each.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        cosine = torch.tensor((step - warmup) / (steps - warmup) * torch.pi, dtype=torch.float64)
        return (1 + cosine.cos().item()) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, factor)
    for batch in loader(steps):
        adam.zero_grad()
        loss_of(net, (batch[0], batch[1])).backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()
    return parameters(net)


def test_trains_bit_identically_to_torch_by_hand() -> None:
    module = Lit(ADAMW, COSINE)
    trainer(max_epochs=1).fit(module, loader(40))
    expected = trained_by_hand(steps=40, warmup=5)
    assert all(torch.equal(a, b) for a, b in zip(parameters(module), expected, strict=True))


def test_the_schedule_is_as_long_as_the_training() -> None:
    fit = trainer(max_epochs=2, accumulate_grad_batches=2)
    fit.fit(Lit(ADAMW, {"name": "linear"}), loader(10))
    assert fit.global_step == 10
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0, 0.0]


@pytest.mark.parametrize("flags", [{"max_epochs": -1, "max_steps": 7}, {"max_steps": 7}], ids=str)
def test_max_steps_gives_the_length(flags: dict[str, int]) -> None:
    fit = trainer(**flags)
    fit.fit(Lit(ADAMW, {"name": "linear"}), DataLoader(Endless(), batch_size=4))
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        ({"max_epochs": -1}, loader(4)),
        ({"max_epochs": 3}, DataLoader(Endless(), batch_size=4)),
    ],
    ids=["no last epoch", "no length"],
)
def test_a_training_without_an_end_is_refused(flags: dict[str, int], data: Any) -> None:
    fit = trainer(**flags)
    with pytest.raises(ConfigError, match=r"scheduler\.total_steps=N"):
        fit.fit(Lit(ADAMW, COSINE), data)
    assert fit.global_step == 0


def test_a_training_without_an_end_may_name_its_schedules_length() -> None:
    module = Lit(ADAMW, {"name": "linear", "total_steps": 5})
    fit = trainer(max_epochs=1, limit_train_batches=6)
    fit.fit(module, DataLoader(Endless(), batch_size=4))
    assert fit.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0, 0.0]


def test_a_warm_up_longer_than_the_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="within the 4 optimizer steps"):
        trainer(max_epochs=1).fit(Lit(ADAMW, {"name": "constant", "warmup_steps": 5}), loader(4))


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "constant", "warmup_steps": 500},
        {"name": "wsd", "warmup_steps": 500, "decay_steps": 500},
        {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_steps"},
    ],
    ids=str,
)
def test_a_smoke_test_takes_the_schedule_of_the_whole_run(scheduler: dict[str, Any]) -> None:
    fit = trainer(fast_dev_run=True)
    fit.fit(Lit(ADAMW, scheduler), loader(4))
    assert fit.global_step == 1


def test_without_a_scheduler_the_rate_is_constant() -> None:
    fit = trainer(max_epochs=1)
    fit.fit(Lit(ADAMW), loader(4))
    assert fit.lr_scheduler_configs == []
    assert fit.optimizers[0].param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        (ADAMW, COSINE),
        (OmegaConf.create(ADAMW), OmegaConf.create(COSINE)),
        (
            AdamConfig(lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
            CosineConfig(warmup_steps=5),
        ),
    ],
    ids=["dict", "DictConfig", "dataclass"],
)
def test_every_form_trains_the_same(optimizer: Any, scheduler: Any) -> None:
    module = Lit(optimizer, scheduler)
    trainer(max_epochs=1).fit(module, loader(40))
    expected = trained_by_hand(steps=40, warmup=5)
    assert all(torch.equal(a, b) for a, b in zip(parameters(module), expected, strict=True))


class FromHparams(AdamMixin, L.LightningModule):
    def __init__(self, width: int, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(6, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


@pytest.mark.parametrize("form", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_hparams_serve_as_well_and_come_back_from_a_checkpoint(form: Any, tmp_path: Path) -> None:
    module = FromHparams(3, form({"lr": 0.5}), form({"name": "linear"}))
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(4))
    assert fit.optimizers[0].defaults["lr"] == 0.5
    assert len(fit.lr_scheduler_configs) == 1
    fit.save_checkpoint(tmp_path / "last.ckpt")
    loaded = FromHparams.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert loaded.hparams["optimizer"]["lr"] == 0.5


class Counting:
    """Another mixin, with a constructor and a keyword of its own."""

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


def test_the_wrong_order_of_bases_is_refused_when_the_class_is_written() -> None:
    with pytest.raises(TypeError, match=r"class Wrong\(AdamMixin, LightningModule\)"):

        class Wrong(L.LightningModule, AdamMixin):  # type: ignore[misc]
            pass


def test_a_bad_config_is_refused_when_the_module_is_built() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr=-1\.0"):
        Lit({"lr": -1})
    with pytest.raises(ConfigError, match=r"scheduler\.name=step"):
        Lit(ADAMW, {"name": "step"})


def test_no_config_at_all_is_refused_before_training() -> None:
    fit = trainer(max_epochs=1)
    with pytest.raises(ConfigError, match="Lit has no optimizer config"):
        fit.fit(Lit(), loader(2))


@pytest.mark.parametrize(
    ("flags", "fused"),
    [
        ({}, True),
        ({"gradient_clip_val": 1.0}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"precision": "bf16-mixed", "gradient_clip_val": 1.0}, True),
        ({"precision": "bf16-true", "gradient_clip_val": 1.0}, True),
        ({"precision": "64-true"}, True),
    ],
    ids=str,
)
def test_fused_is_chosen_wherever_the_trainer_can_train_with_it(
    flags: dict[str, Any], fused: bool
) -> None:
    fit = trainer(max_epochs=1, **flags)
    fit.fit(Lit(ADAMW), loader(3))
    assert fit.global_step == 3
    assert fit.optimizers[0].param_groups[0]["fused"] is fused


def test_an_eps_that_is_0_in_half_precision_is_refused_before_training() -> None:
    fit = trainer(max_epochs=1, precision="16-true")
    with pytest.raises(ConfigError, match=r"optimizer\.eps=1e-08: .*float16"):
        fit.fit(Lit(ADAMW), loader(3))


def test_the_groups_are_shown_once_at_fit_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(max_epochs=2).fit(Lit(ADAMW, COSINE), loader(4))
    shown = [record.message for record in caplog.records if "no_decay" in record.message]
    assert len(shown) == 1
    assert shown[0].startswith("AdamW, fused: float32 on cpu\ngroup ")


def test_the_schedule_is_shown_at_fit_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(max_epochs=2).fit(Lit(ADAMW, COSINE), loader(4))
    (shown,) = [each.message for each in caplog.records if each.message.startswith("schedule")]
    assert shown == (
        "schedule  name=cosine, warmup_steps=5, total_steps=8, min_lr_ratio=0.0, interval=step,"
        " frequency=1"
    )


class Stalled(Lit):
    """Validation never improves; notes the epoch and batch of each step of the scheduler."""

    logged: tuple[str, ...] = ("val/loss", "val/acc")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(dict.fromkeys(self.logged, torch.tensor(1.0)))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        batch = self.trainer.fit_loop.epoch_loop.batch_idx
        self.stepped = [*getattr(self, "stepped", []), (self.trainer.current_epoch, batch)]
        super().lr_scheduler_step(scheduler, metric)


PLATEAU = {"name": "plateau", "patience": 0, "factor": 0.5, "min_lr_ratio": 0.2}
TORCHS_PLATEAU = {
    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "patience": 0,
    "factor": 0.5,
    "min_lr": 0.2 * 1e-2,
}


@pytest.mark.parametrize("scheduler", [PLATEAU, TORCHS_PLATEAU], ids=["ours", "torch's"])
@pytest.mark.parametrize(
    ("flags", "stepped"),
    [
        ({}, [(0, 5), (1, 5)]),
        ({"val_check_interval": 0.5}, [(0, 2), (0, 5), (1, 2), (1, 5)]),
        (
            {"val_check_interval": 4, "accumulate_grad_batches": 2},
            [(0, 3), (1, 3)],
        ),
        ({"check_val_every_n_epoch": 2}, [(1, 5)]),
    ],
    ids=str,
)
def test_a_plateau_is_judged_after_each_validation(
    scheduler: Any, flags: dict[str, Any], stepped: list[tuple[int, int]]
) -> None:
    module = Stalled(ADAMW, scheduler)
    fit = trainer(max_epochs=2, **flags)
    fit.fit(module, loader(6), loader(2))
    assert module.stepped == stepped
    expected = max(1e-2 * 0.5 ** (len(stepped) - 1), 0.2 * 1e-2)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"val_check_interval": 3, "accumulate_grad_batches": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"val_check_interval": 3, "check_val_every_n_epoch": 2},
        {"val_check_interval": "00:00:00:01"},
    ],
    ids=str,
)
def test_a_plateau_that_validation_does_not_fit_is_refused(flags: dict[str, Any]) -> None:
    fit = trainer(max_epochs=2, **flags)
    with pytest.raises(ConfigError, match=r"scheduler: .*Trainer\(\.\.\., val_check_interval=1\.0"):
        fit.fit(Stalled(ADAMW, PLATEAU), loader(6), loader(2))


def test_a_metric_that_validation_does_not_log_is_refused_before_training() -> None:
    fit = trainer(max_epochs=1)
    expected = r"^scheduler\.monitor=val/los: .*: val/loss, val/acc; .*scheduler\.monitor=val/loss$"
    with pytest.raises(ConfigError, match=expected):
        fit.fit(Stalled(ADAMW, {**PLATEAU, "monitor": "val/los"}), loader(6), loader(2))
    assert fit.global_step == 0


def test_a_metric_that_is_missing_is_refused_under_the_name_of_its_place() -> None:
    root = OmegaConf.create({"model": {"scheduler": {**PLATEAU, "monitor": "loss/val"}}})
    with pytest.raises(ConfigError, match=r"^model\.scheduler\.monitor=loss/val: "):
        trainer(max_epochs=1).fit(Stalled(ADAMW, root.model.scheduler), loader(6), loader(2))


class QuietAtFirst(Stalled):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


def test_a_module_that_logs_nothing_in_the_sanity_check_is_let_pass() -> None:
    fit = trainer(max_epochs=1)
    fit.fit(QuietAtFirst(ADAMW, PLATEAU), loader(6), loader(2))
    assert fit.global_step == 6
    fit = trainer(max_epochs=3)
    with pytest.raises(ConfigError, match=r"scheduler\.monitor=val/los"):
        fit.fit(QuietAtFirst(ADAMW, {**PLATEAU, "monitor": "val/los"}), loader(6), loader(2))
    assert fit.global_step == 6


def test_validating_after_a_fit_is_not_judged() -> None:
    module = Stalled(ADAMW, PLATEAU)
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(6), loader(2))
    module.logged = ("test/loss",)
    assert "test/loss" in fit.validate(module, loader(2), verbose=False)[0]


CUSTOM = "torch.optim.lr_scheduler"


@pytest.mark.parametrize(
    ("scheduler", "interval", "steps"),
    [
        ({"_target_": f"{CUSTOM}.StepLR", "step_size": 1}, "epoch", 2),
        ({"_target_": f"{CUSTOM}.StepLR", "step_size": 1, "interval": "step"}, "step", 12),
        ({"_target_": f"{CUSTOM}.StepLR", "step_size": 1, "frequency": 2}, "epoch", 1),
        ({"_target_": f"{CUSTOM}.CosineAnnealingLR", "T_max": "total_steps"}, "step", 12),
        (functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1), "epoch", 2),
        (
            functools.partial(
                torch.optim.lr_scheduler.CosineAnnealingLR,
                T_max="total_steps",  # type: ignore[arg-type]
            ),
            "step",
            12,
        ),
    ],
    ids=str,
)
def test_a_scheduler_of_torch_is_stepped_as_lightning_would(
    scheduler: Any, interval: str, steps: int
) -> None:
    module = Stalled(ADAMW, scheduler)
    fit = trainer(max_epochs=2)
    fit.fit(module, loader(6))
    assert fit.lr_scheduler_configs[0].interval == interval
    assert len(module.stepped) == steps


def test_a_frequency_that_no_epoch_reaches_is_refused() -> None:
    """Lightning alone never steps the scheduler, and says nothing."""
    scheduler = {"_target_": f"{CUSTOM}.StepLR", "step_size": 1, "interval": "step"}
    with pytest.raises(ConfigError, match=r"scheduler\.frequency=10: expected at most the 8 batch"):
        trainer(max_epochs=2).fit(Lit(ADAMW, {**scheduler, "frequency": 10}), loader(8))
    fit = trainer(max_epochs=2)
    fit.fit(Lit(ADAMW, {**scheduler, "frequency": 8}), loader(8))
    assert fit.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_a_plateau_of_torch_has_a_metric_and_no_frequency_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.frequency=2: expected 1, .*validation"):
        build_adam(network(), ADAMW, {**TORCHS_PLATEAU, "frequency": 2})
    built = build_adam(network(), ADAMW, TORCHS_PLATEAU)
    assert built["lr_scheduler"]["monitor"] == "val/loss"
    stepwise = {"_target_": f"{CUSTOM}.StepLR", "step_size": 1, "interval": "step"}
    assert "monitor" not in build_adam(network(), ADAMW, stepwise)["lr_scheduler"]


def test_the_schedulers_argument_is_the_trainings_length() -> None:
    fit = trainer(max_epochs=2)
    scheduler = {"_target_": f"{CUSTOM}.CosineAnnealingLR", "T_max": "total_steps"}
    fit.fit(Stalled(ADAMW, scheduler), loader(6))
    built = fit.lr_scheduler_configs[0].scheduler
    assert isinstance(built, torch.optim.lr_scheduler.CosineAnnealingLR)
    assert built.T_max == 12
    assert built.get_last_lr() == [0.0, 0.0]


def test_two_optimizers_are_built_by_build_adam() -> None:
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


def test_build_adam_serves_a_module_without_the_mixin() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            steps = int(self.trainer.estimated_stepping_batches)
            return build_adam(self.net, ADAMW, COSINE, steps)

    module = Plain()
    trainer(max_epochs=1).fit(module, loader(40))
    expected = trained_by_hand(steps=40, warmup=5)
    assert all(torch.equal(a, b) for a, b in zip(parameters(module), expected, strict=True))
