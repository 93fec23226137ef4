"""Fine-tuning: parameter groups added and frozen during a run, and the learning rate finder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_adam import AdamMixin, AdamMonitor, build_adam
from lightning_adam.optim.optimizers import build_optimizer
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY, scoped
from tests.support.tables import each_row
from tests.support.training import ADAMW, LR, Lit, loader, loss_of, network, parameters, trainer

BATCHES, EPOCHS = 6, 4
SCHEDULES: dict[str, Any] = {
    "none": None,
    "linear": {"name": "linear"},
    "warm-up and cosine": {"name": "cosine", "warmup_steps": 15},
    "torch's cosine": {
        "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "T_max": "total_steps",
    },
    "torch's StepLR": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1},
    "plateau": {"name": "plateau", "patience": 0, "factor": 0.5, "min_lr_ratio": 0.3},
}
each_scheduler = pytest.mark.parametrize("scheduler", SCHEDULES.values(), ids=SCHEDULES.keys())


def schedulers(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scheduler", [SCHEDULES[name] for name in names], ids=names)


Batch = tuple[Tensor, Tensor]


class Tuned(AdamMixin, L.LightningModule):
    """A backbone and a head. Records the learning rate of each group before each step."""

    def __init__(self, optimizer: Any = ADAMW, scheduler: Any = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        net = network()
        self.backbone, self.head = net[:3], net[3]
        self.rates: list[dict[str, float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(nn.Sequential(self.backbone, self.head), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", 1.0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


class Unfreezing(BaseFinetuning):
    """Trains only the head, and from the third epoch also the backbone."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
        elif epoch > 2:
            # `freeze_before_training` has frozen it again if the run is resumed.
            self.make_trainable(pl_module.backbone)


class Fit(NamedTuple):
    trainer: L.Trainer
    module: Any
    recorder: MemoryLogger


def fit(module: Any, *callbacks: L.Callback, **flags: Any) -> Fit:
    recorder, fit_flags = MemoryLogger(), {"max_epochs": EPOCHS, "num_sanity_val_steps": 0}
    run = trainer(callbacks=list(callbacks), logger=recorder, **{**fit_flags, **flags})
    run.fit(module, loader(BATCHES), loader(1))
    return Fit(run, module, recorder)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(parameters(one), parameters(other), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def full_monitor() -> AdamMonitor:
    scopes = ["model", "group", "layer", "tensor"]
    return AdamMonitor(1, scopes, "all", histograms_every_n_steps=2)


@each_scheduler
def test_unfrozen_part_trains_at_a_tenth_of_the_lr_and_leaves_the_others_unchanged(
    scheduler: Any,
) -> None:
    rates = fit(Tuned(scheduler=scheduler), Unfreezing()).module.rates
    alone = fit(Tuned(scheduler=scheduler)).module.rates
    assert [each["decay"] for each in rates] == [each["decay"] for each in alone]
    assert len(rates) == 24
    assert all(each.keys() == {"decay", "no_decay"} for each in rates[:12])
    assert all(
        list(each) == ["decay", "no_decay", "group_2", "group_2_no_decay"] for each in rates[12:]
    )
    for each in rates[12:]:
        tenth = pytest.approx(each["decay"] / 10, rel=1e-9)
        assert each["group_2"] == tenth
        assert each["group_2_no_decay"] == tenth
        assert each["no_decay"] == each["decay"] > 0


def test_unfrozen_parameters_are_split_into_decaying_and_not_decaying() -> None:
    groups = fit(Tuned(), Unfreezing()).trainer.optimizers[0].param_groups
    assert [(each["name"], each["param_names"], each["weight_decay"]) for each in groups] == [
        ("decay", ["head.weight"], 0.1),
        ("no_decay", ["head.bias"], 0.0),
        ("group_2", ["backbone.0.weight"], 0.1),
        ("group_2_no_decay", ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias"], 0.0),
    ]


def test_unfreezing_trains_as_torch_by_hand() -> None:
    module = fit(Tuned(scheduler={"name": "linear"}), Unfreezing()).module
    by_hand = Tuned()
    by_hand.backbone.requires_grad_(False)

    def both(part: nn.Module, lr: float) -> list[dict[str, Any]]:
        matrices = [each for each in part.parameters() if each.ndim == 2]
        vectors = [each for each in part.parameters() if each.ndim == 1]
        return [{"params": matrices, "lr": lr}, {"params": vectors, "lr": lr, "weight_decay": 0.0}]

    adam = AdamW(both(by_hand.head, LR), lr=LR, weight_decay=0.1, fused=True)
    for step in range(BATCHES * EPOCHS):
        if step == 12:
            by_hand.backbone.requires_grad_(True)
            for group in both(by_hand.backbone, LR / 2 / 10):
                adam.add_param_group({**group, "initial_lr": LR / 10})
        for group in adam.param_groups:
            group["lr"] = group.setdefault("initial_lr", LR) * (1 - step / 24)
        inputs, targets = list(loader(BATCHES))[step % BATCHES]
        adam.zero_grad()
        by_hand.training_step((inputs, targets), 0).backward()  # type: ignore[no-untyped-call]
        adam.step()
    for one, other in zip(parameters(module), parameters(by_hand), strict=True):
        # The peak of the added group is a quotient, so it is rounded.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@schedulers("warm-up and cosine", "plateau")
def test_monitor_measures_unfrozen_parts_and_changes_nothing(scheduler: Any) -> None:
    measured = fit(Tuned(scheduler=scheduler), Unfreezing(), full_monitor())
    assert_same(fit(Tuned(scheduler=scheduler), Unfreezing()).module, measured.module)
    rows = measured.recorder
    assert rows.steps_of(scoped("group/decay")) == list(range(24))
    for later in ("group/group_2", "group/group_2_no_decay", "layer/backbone.0"):
        assert rows.steps_of(scoped(later)) == list(range(12, 24)), later
    assert rows.steps_of(scoped("tensor/backbone.1.bias")) == list(range(12, 24))


class Unfreeze(L.Callback):
    """Adds one group at the start of the second epoch."""

    def __init__(self, group: Callable[[Any], dict[str, Any]]) -> None:
        self.group = group

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)
            trainer.optimizers[0].add_param_group(self.group(pl_module.backbone))


ADDED: list[tuple[Callable[[Any], dict[str, Any]], list[tuple[str, float]]]] = [
    (lambda part: {"params": part[0].weight}, [("group_2", 0.1)]),
    (lambda part: {"params": part[0].bias}, [("group_2_no_decay", 0.0)]),
    (
        lambda part: {"params": part.parameters(), "name": "late"},
        [("late", 0.1), ("late_no_decay", 0.0)],
    ),
    (lambda part: {"params": part.parameters(), "weight_decay": 0.3}, [("group_2", 0.3)]),
    (lambda part: {"params": part.parameters(), "weight_decay": 0.0}, [("group_2", 0.0)]),
]
"""Added groups, and their resulting names and weight decays."""


def test_group_may_be_added_in_every_form() -> None:
    with each_row() as row:
        for group, added in ADDED:
            with row(added):
                module = Tuned(scheduler={"name": "linear"})
                ended = fit(module, Unfreeze(group), full_monitor(), max_epochs=2)
                groups = ended.trainer.optimizers[0].param_groups[2:]
                assert [(each["name"], each["weight_decay"]) for each in groups] == added
                for each in ended.module.rates[6:]:
                    assert all(each[name] == pytest.approx(each["decay"]) for name, _ in added)
                for name, _ in added:
                    assert ended.recorder.steps_of(scoped(f"group/{name}")) == list(range(6, 12))


def test_group_added_with_an_lr_continues_from_it() -> None:
    def group(part: nn.Module) -> dict[str, Any]:
        return {"params": part.parameters(), "lr": 1e-4}

    rates = fit(Tuned(scheduler={"name": "linear"}), Unfreeze(group), max_epochs=2).module.rates
    assert [each["group_2"] for each in rates[6:]] == pytest.approx(
        [1e-4 * (1 - step / 6) for step in range(6)]
    )


def test_all_unfrozen_parameters_decay_with_weight_decay_on_all() -> None:
    module = Tuned({**ADAMW, "weight_decay_on": "all"})
    groups = fit(module, Unfreezing()).trainer.optimizers[0].param_groups
    assert [(each["name"], each["weight_decay"]) for each in groups] == [
        ("decay", 0.1),
        ("group_1", 0.1),
    ]


def test_parts_may_be_unfrozen_one_after_another() -> None:
    class Gradual(Unfreezing):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
            if epoch in (1, 2):
                part = pl_module.backbone[2 - epoch]
                self.unfreeze_and_add_param_group(part, optimizer)

    ended = fit(Tuned(scheduler={"name": "linear"}), Gradual(), full_monitor())
    joined = ["group_2_no_decay", "group_3", "group_3_no_decay"]
    assert list(ended.module.rates[-1]) == ["decay", "no_decay", *joined]
    for name, since in zip(joined, (6, 12, 12), strict=True):
        assert ended.recorder.steps_of(scoped(f"group/{name}")) == list(range(since, 24))
        for each in ended.module.rates[since:]:
            assert each[name] == pytest.approx(each["decay"] / 10)


NADAM = {"_target_": "torch.optim.NAdam", "lr": LR, "weight_decay": 0.1}


def test_custom_optimizer_accepts_unfrozen_parts() -> None:
    optimizer = {**NADAM, "weight_decay_on": "matrices"}
    ended = fit(Tuned(optimizer, {"name": "linear"}), Unfreezing(), full_monitor())
    assert list(ended.module.rates[-1]) == ["decay", "no_decay", "group_2", "group_2_no_decay"]
    for each in ended.module.rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)
    key = "adam_gradient/group/group_2/grad_norm"
    assert ended.recorder.steps_of(key) == list(range(12, 24))


# A plateau is stepped after the epoch's checkpoint is written.
@schedulers("none", "warm-up and cosine", "torch's StepLR")
def test_run_that_unfreezes_is_resumed_bit_identically(scheduler: Any) -> None:
    def run_training(ckpt_path: str | None = None) -> Tuned:
        module = Tuned(scheduler=scheduler)
        checkpoints = ModelCheckpoint(".", filename="{epoch}", save_top_k=-1)
        run = trainer(
            max_epochs=EPOCHS, callbacks=[Unfreezing(), checkpoints], enable_checkpointing=True
        )
        run.fit(module, loader(BATCHES), loader(1), ckpt_path=ckpt_path, weights_only=False)
        return module

    uninterrupted = run_training()
    # Before and after the unfreezing.
    for epoch in (1, 2):
        resumed = run_training(f"epoch={epoch}.ckpt")
        assert resumed.rates == uninterrupted.rates[6 * (epoch + 1) :]
        assert_same(uninterrupted, resumed)


class ByHand(Tuned):
    """Manual optimization, also with manual steps of the schedule."""

    def __init__(self, optimizer: Any = ADAMW, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]


class WithoutMixin(L.LightningModule):
    def __init__(self, optimizer: Any = ADAMW, scheduler: Any = None) -> None:
        super().__init__()
        net = network()
        self.configs = optimizer, scheduler
        self.backbone, self.head = net[:3], net[3]
        self.rates: list[dict[str, float]] = []

    def configure_optimizers(self) -> Any:
        return build_adam(self, *self.configs, trainer=self.trainer)

    training_step = Tuned.training_step
    on_before_optimizer_step = Tuned.on_before_optimizer_step


@pytest.mark.parametrize("kind", [ByHand, WithoutMixin])
def test_unfrozen_part_is_scheduled_with_manual_stepping_and_without_the_mixin(kind: Any) -> None:
    rates = fit(kind(scheduler={"name": "linear"}), Unfreezing()).module.rates
    assert [each["decay"] for each in rates] == pytest.approx(
        [LR * (1 - step / 24) for step in range(24)]
    )
    for each in rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)


class Backbone(BackboneFinetuning):
    def __init__(self, **settings: Any) -> None:
        super().__init__(2, lambda epoch: 1.5, 0.1, should_align=False, **settings)


def test_backbone_finetuning_multiplies_the_lr_of_the_backbone() -> None:
    ended = fit(Tuned(), Backbone(), full_monitor())
    assert ended.recorder.steps_of(scoped("group/group_2")) == list(range(12, 24))
    for each in ended.module.rates[12:18]:
        assert each == {
            "decay": LR,
            "no_decay": LR,
            "group_2": pytest.approx(LR / 10),
            "group_2_no_decay": pytest.approx(LR / 10),
        }
    for each in ended.module.rates[18:]:
        assert each["group_2"] == each["group_2_no_decay"] == pytest.approx(LR / 10 * 1.5)


@pytest.mark.parametrize("kind", [Tuned, WithoutMixin])
def test_parts_of_a_group_follow_the_lr_that_a_callback_sets_on_the_last_one(kind: Any) -> None:
    layers = {"pattern": "backbone.*", "rate": 0.5}
    table: list[tuple[Any, dict[str, float]]] = [
        (ADAMW, {"group_2": 1.0, "group_2_no_decay": 1.0}),
        ({**ADAMW, "weight_decay_on": "all"}, {"group_1": 1.0}),
        (
            {**ADAMW, "layer_decay": layers},
            {
                "group_2_layer_0": 0.5,
                "group_2_layer_0_no_decay": 0.5,
                "group_2_layer_1_no_decay": 1.0,
            },
        ),
        (NADAM, {"group_1": 1.0}),
        (
            {**NADAM, "weight_decay_on": "matrices"},
            {"group_2": 1.0, "group_2_no_decay": 1.0},
        ),
    ]
    with each_row() as row:
        for optimizer, shares in table:
            with row(optimizer):
                rates = fit(kind(optimizer), Backbone()).module.rates
                for step in range(12, 24):
                    rate = LR / 10 * (1.5 if step >= 18 else 1)
                    added = {name: lr for name, lr in rates[step].items() if "group" in name}
                    assert added == {
                        name: pytest.approx(rate * share) for name, share in shares.items()
                    }


def test_parts_of_a_group_follow_its_lr_after_a_resume() -> None:
    def run_training(ckpt_path: str | None = None) -> Tuned:
        module = Tuned()
        checkpoints = ModelCheckpoint(".", filename="{epoch}", save_top_k=-1)
        run = trainer(max_epochs=5, callbacks=[Backbone(), checkpoints], enable_checkpointing=True)
        run.fit(module, loader(BATCHES), loader(1), ckpt_path=ckpt_path, weights_only=False)
        return module

    uninterrupted = run_training()
    for epoch in (1, 2, 3):
        resumed = run_training(f"epoch={epoch}.ckpt")
        # Lightning's callback leaves the backbone frozen, but sets its rate.
        assert resumed.rates == uninterrupted.rates[6 * (epoch + 1) :]


def test_lr_set_on_a_single_part_is_kept() -> None:
    module = Tuned()
    module.backbone.requires_grad_(False)
    optimizer = build_optimizer(module, ADAMW)
    optimizer.add_param_group({"params": module.backbone.requires_grad_(True).parameters()})
    optimizer.param_groups[2]["lr"] = 0.5
    for _ in range(2):
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == [LR, LR, 0.5, LR]
    optimizer.param_groups[3]["lr"] = 0.25
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR, 0.25, 0.25]


def test_unfrozen_layers_keep_their_ratio_of_learning_rates() -> None:
    config = {**ADAMW, "layer_decay": {"pattern": "backbone.*", "rate": 0.5}}
    rates = fit(Tuned(config, {"name": "linear"}), Unfreezing()).module.rates
    for each in rates[12:]:
        assert each["group_2_layer_1_no_decay"] == pytest.approx(each["decay"] / 10)
        for name in ("group_2_layer_0", "group_2_layer_0_no_decay"):
            assert each[name] == pytest.approx(each["decay"] / 20)


class FreezingAgain(L.Callback):
    """Freezes the backbone at the start of the third epoch."""

    def __init__(self, clears: bool) -> None:
        self.clears = clears

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            pl_module.backbone.requires_grad_(False)
            if self.clears:
                pl_module.backbone.zero_grad()


@pytest.mark.parametrize("clears", [True, False])
def test_part_frozen_during_the_run_is_not_measured_afterwards(clears: bool) -> None:
    frozen = FreezingAgain(clears)
    measured = fit(Tuned(scheduler={"name": "linear"}), frozen, full_monitor())
    assert_same(fit(Tuned(scheduler={"name": "linear"}), frozen).module, measured.module)
    rows = measured.recorder
    assert rows.steps_of(scoped("layer/backbone.0")) == list(range(12))
    assert rows.steps_of(scoped("tensor/backbone.1.bias")) == list(range(12))
    assert rows.steps_of(scoped("layer/head")) == list(range(24))
    assert rows.steps_of(scoped("group/decay")) == list(range(24))


def test_group_frozen_during_the_run_is_not_measured_afterwards() -> None:
    groups = [{"name": "backbone", "match": "backbone.*"}]
    measured = fit(Tuned({**ADAMW, "groups": groups}), FreezingAgain(False), full_monitor())
    for name in ("backbone", "backbone_no_decay"):
        assert measured.recorder.steps_of(scoped(f"group/{name}")) == list(range(12))


GROUPED = {**ADAMW, "groups": [{"name": "head", "match": "head.*", "lr_scale": 5.0}]}
SCALES = {"decay": 1.0, "no_decay": 1.0, "head": 5.0, "head_no_decay": 5.0}
WARM = {"name": "linear", "warmup_steps": 3}
SEARCH = {"min_lr": 1e-4, "max_lr": 1e-1}


def searched(module: Any, *callbacks: L.Callback, **settings: Any) -> tuple[L.Trainer, Any]:
    run = trainer(
        max_epochs=EPOCHS, callbacks=list(callbacks), logger=MemoryLogger(), num_sanity_val_steps=0
    )
    arguments = {**SEARCH, "num_training": 20, "attr_name": "optimizer_lr", **settings}
    found = Tuner(run).lr_find(module, loader(BATCHES), loader(1), **arguments)
    return run, found


def assert_searched(rates: list[dict[str, float]], found: Any) -> None:
    assert len(rates) == len(found.results["lr"]) == 20
    for each, lr in zip(rates, found.results["lr"], strict=True):
        assert each == {name: pytest.approx(lr * scale) for name, scale in SCALES.items()}
    assert rates[0]["decay"] == pytest.approx(SEARCH["min_lr"])
    assert rates[-1]["decay"] == pytest.approx(SEARCH["max_lr"], rel=0.5)


@each_scheduler
def test_search_keeps_the_lr_scales_of_groups_at_every_step(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    _, found = searched(module, mode="exponential", early_stop_threshold=None)
    assert_searched(module.rates, found)


def test_linear_search_keeps_the_lr_scales_of_groups_at_every_step() -> None:
    module = Tuned(GROUPED, SCHEDULES["linear"])
    _, found = searched(module, mode="linear", early_stop_threshold=None)
    assert_searched(module.rates, found)


def assert_same_rates(rates: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert rates == [
        {name: pytest.approx(lr, rel=1e-12) for name, lr in each.items()} for each in expected
    ]


@each_scheduler
def test_suggested_lr_trains_as_if_it_were_configured(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    run, found = searched(module)
    suggestion = found.suggestion()
    assert module.optimizer_lr == suggestion != LR
    module.rates.clear()
    run.fit(module, loader(BATCHES), loader(1))
    configured = fit(Tuned({**GROUPED, "lr": suggestion}, scheduler)).module
    assert_same_rates(module.rates, configured.rates)
    for one, other in zip(parameters(module), parameters(configured), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_suggested_lr_is_the_peak_of_the_schedule_of_each_group() -> None:
    module = Tuned(GROUPED, WARM)
    run, found = searched(module)
    module.rates.clear()
    run.fit(module, loader(BATCHES))
    shape = [(step + 1) / 4 if step < 3 else 1 - (step - 3) / 21 for step in range(24)]
    for name, scale in SCALES.items():
        assert [each[name] for each in module.rates] == pytest.approx(
            [found.suggestion() * scale * share for share in shape]
        )


@schedulers("none", "warm-up and cosine")
def test_second_search_begins_at_the_lowest_lr(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    searched(module)
    module.rates.clear()
    _, found = searched(module, early_stop_threshold=None)
    assert_searched(module.rates, found)


@schedulers("warm-up and cosine", "plateau")
def test_search_with_update_attr_disabled_changes_nothing(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    run, _ = searched(module, update_attr=False)
    assert module.optimizer_lr == LR
    assert_same(module, Tuned())
    module.rates.clear()
    run.fit(module, loader(BATCHES), loader(1))
    baseline = fit(Tuned(GROUPED, scheduler)).module
    assert module.rates == baseline.rates
    assert_same(module, baseline)


def test_search_is_not_measured_and_the_run_after_it_is() -> None:
    monitor = full_monitor()
    module = Tuned(GROUPED, WARM)
    run, _ = searched(module, monitor)
    recorder: Any = run.logger
    assert recorder.steps_of(KEY) == []
    run.fit(module, loader(BATCHES), loader(1))
    assert recorder.steps_of(KEY) == list(range(24))
    assert monitor.state_dict()["steps"] == {"": [24, 0]}


def finder(**settings: Any) -> LearningRateFinder:
    arguments = {**SEARCH, "num_training_steps": 20, "attr_name": "optimizer_lr", **settings}
    return LearningRateFinder(**arguments)


@schedulers("linear", "torch's StepLR")
def test_finder_callback_searches_and_trains_with_the_suggestion(scheduler: Any) -> None:
    find = finder(early_stop_threshold=None)
    measured = fit(Tuned(GROUPED, scheduler), find, full_monitor())
    module: Any = measured.module
    assert find.optimal_lr is not None
    assert_searched(module.rates[:20], find.optimal_lr)
    suggestion = find.optimal_lr.suggestion()
    assert module.optimizer_lr == suggestion
    configured = fit(Tuned({**GROUPED, "lr": suggestion}, scheduler)).module
    assert_same_rates(module.rates[20:], configured.rates)
    assert measured.recorder.steps_of(KEY) == list(range(24))


def test_monitor_does_not_change_the_finder_callback() -> None:
    one, other = (fit(Tuned(GROUPED, WARM), finder(), *more) for more in ([], [full_monitor()]))
    assert_same(one.module, other.module)


def test_finder_callback_with_update_attr_disabled_changes_nothing() -> None:
    module = fit(Tuned(GROUPED, WARM), finder(update_attr=False)).module
    baseline = fit(Tuned(GROUPED, WARM)).module
    assert module.rates[20:] == baseline.rates
    assert_same(module, baseline)


def test_suggested_lr_is_kept_when_a_part_is_unfrozen() -> None:
    module = Tuned(ADAMW, {"name": "linear"})
    run, found = searched(module, Unfreezing())
    module.rates.clear()
    run.fit(module, loader(BATCHES), loader(1))
    for step, each in enumerate(module.rates):
        assert each["decay"] == pytest.approx(found.suggestion() * (1 - step / 24))
    for each in module.rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)


class Milestone(LearningRateFinder):
    """Searches at the start of a later epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__(1e-4, 1e-1, 20, attr_name="optimizer_lr", early_stop_threshold=None)
        self.epoch = epoch

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


@schedulers("none", "warm-up and cosine")
def test_search_during_the_run_keeps_the_lr_scales_of_groups(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    fit(module, Milestone(1), limit_val_batches=0, max_epochs=6)
    assert module.optimizer_lr != LR
    assert len(module.rates) > 36, "the steps of the search are among them"
    for each in module.rates:
        assert each["head"] == pytest.approx(5 * each["decay"])


def test_search_keeps_the_lr_scale_of_an_unfrozen_part() -> None:
    module = Tuned()
    fit(module, Unfreezing(), Milestone(3), limit_val_batches=0, max_epochs=5)
    assert len(module.rates) > 30, "the steps of the search are among them"
    for each in module.rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)


def test_optimizer_lr_is_the_lr_of_the_config_or_the_class() -> None:
    assert Lit(ADAMW).optimizer_lr == LR
    assert Lit({}).optimizer_lr == 1e-3
    assert Lit({"_target_": "torch.optim.NAdam", "lr": 0.3}).optimizer_lr == 0.3
    assert Lit({"_target_": "torch.optim.NAdam"}).optimizer_lr == 2e-3


def test_optimizer_lr_set_before_training_is_used() -> None:
    module = Tuned(GROUPED, WARM)
    module.optimizer_lr = 0.02
    configured = fit(Tuned({**GROUPED, "lr": 0.02}, WARM)).module
    assert_same_rates(fit(module).module.rates, configured.rates)


def test_group_may_be_added_before_training() -> None:
    module = Tuned()
    module.backbone.requires_grad_(False)
    optimizer = build_optimizer(module, ADAMW)
    optimizer.add_param_group({"params": module.backbone.named_parameters()})
    assert [(each["name"], each["param_names"]) for each in optimizer.param_groups[2:]] == [
        ("group_2", ["backbone.0.weight"]),
        ("group_2_no_decay", ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias"]),
    ]
