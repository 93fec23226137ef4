"""Groups that join and leave a training, and learning rates that are searched for."""

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
from lightning_adam.optimizers import build_optimizer
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY
from tests.support.training import ADAMW, LR, Lit, loader, loss_of, network, parameters, trainer

BATCHES, EPOCHS = 6, 4
SCHEDULERS: dict[str, Any] = {
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
each_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
Batch = tuple[Tensor, Tensor]


class Tuned(AdamMixin, L.LightningModule):
    """A backbone and a head; notes each group's learning rate before each step."""

    def __init__(self, optimizer: Any = ADAMW, scheduler: Any = None) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        whole = network()
        self.backbone, self.head = whole[:3], whole[3]
        self.rates: list[dict[str, float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(nn.Sequential(self.backbone, self.head), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", 1.0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


class Unfreezing(BaseFinetuning):
    """Trains the head alone, and from the third epoch on the backbone too."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
        elif epoch > 2:
            # A training that is resumed has frozen it again.
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


def everything() -> AdamMonitor:
    scopes = ["model", "group", "layer", "tensor"]
    return AdamMonitor(1, scopes, "all", histograms_every_n_steps=2)


@each_scheduler
def test_an_unfrozen_part_trains_at_a_tenth_of_the_first_group_from_then_on(scheduler: Any) -> None:
    rates = fit(Tuned(scheduler=scheduler), Unfreezing()).module.rates
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


@each_scheduler
def test_what_joins_leaves_the_schedule_of_the_others_alone(scheduler: Any) -> None:
    alone = fit(Tuned(scheduler=scheduler)).module.rates
    joined = fit(Tuned(scheduler=scheduler), Unfreezing()).module.rates
    assert [each["decay"] for each in joined] == [each["decay"] for each in alone]


def test_what_joins_is_sorted_into_what_decays_and_what_does_not() -> None:
    groups = fit(Tuned(), Unfreezing()).trainer.optimizers[0].param_groups
    assert [(each["name"], each["param_names"], each["weight_decay"]) for each in groups] == [
        ("decay", ["head.weight"], 0.1),
        ("no_decay", ["head.bias"], 0.0),
        ("group_2", ["backbone.0.weight"], 0.1),
        ("group_2_no_decay", ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias"], 0.0),
    ]


def test_unfreezing_trains_bit_identically_to_torch_by_hand() -> None:
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
        # The peak of what joined is a quotient of two rates.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@each_scheduler
def test_a_training_with_a_part_that_joins_is_the_same_measured_or_not(scheduler: Any) -> None:
    measured = fit(Tuned(scheduler=scheduler), Unfreezing(), everything())
    assert_same(fit(Tuned(scheduler=scheduler), Unfreezing()).module, measured.module)
    rows = measured.recorder
    assert rows.steps_of(f"{KEY}/group/decay") == list(range(24))
    for later in ("group/group_2", "group/group_2_no_decay", "layer/backbone.0"):
        assert rows.steps_of(f"{KEY}/{later}") == list(range(12, 24)), later
    assert rows.steps_of(f"{KEY}/tensor/backbone.1.bias") == list(range(12, 24))


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


@pytest.mark.parametrize(
    ("group", "added"),
    [
        (lambda part: {"params": part[0].weight}, [("group_2", 0.1)]),
        (lambda part: {"params": part[0].bias}, [("group_2_no_decay", 0.0)]),
        (
            lambda part: {"params": part.parameters(), "name": "late"},
            [("late", 0.1), ("late_no_decay", 0.0)],
        ),
        (lambda part: {"params": part.parameters(), "weight_decay": 0.3}, [("group_2", 0.3)]),
        (lambda part: {"params": part.parameters(), "weight_decay": 0.0}, [("group_2", 0.0)]),
    ],
)
def test_a_group_may_be_added_in_every_form(
    group: Callable[[Any], dict[str, Any]], added: list[tuple[str, float]]
) -> None:
    ended = fit(Tuned(scheduler={"name": "linear"}), Unfreeze(group), everything(), max_epochs=2)
    groups = ended.trainer.optimizers[0].param_groups[2:]
    assert [(each["name"], each["weight_decay"]) for each in groups] == added
    for each in ended.module.rates[6:]:
        assert all(each[name] == pytest.approx(each["decay"]) for name, _ in added)
    for name, _ in added:
        assert ended.recorder.steps_of(f"{KEY}/group/{name}") == list(range(6, 12))


def test_a_group_that_is_added_with_a_rate_goes_on_from_it() -> None:
    def group(part: nn.Module) -> dict[str, Any]:
        return {"params": part.parameters(), "lr": 1e-4}

    rates = fit(Tuned(scheduler={"name": "linear"}), Unfreeze(group), max_epochs=2).module.rates
    assert [each["group_2"] for each in rates[6:]] == pytest.approx(
        [1e-4 * (1 - step / 6) for step in range(6)]
    )


def test_where_all_decays_what_joins_does_too() -> None:
    module = Tuned({**ADAMW, "weight_decay_on": "all"})
    groups = fit(module, Unfreezing()).trainer.optimizers[0].param_groups
    assert [(each["name"], each["weight_decay"]) for each in groups] == [
        ("decay", 0.1),
        ("group_1", 0.1),
    ]


def test_parts_may_join_one_after_another() -> None:
    class Gradual(Unfreezing):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
            if epoch in (1, 2):
                part = pl_module.backbone[2 - epoch]
                self.unfreeze_and_add_param_group(part, optimizer)

    ended = fit(Tuned(scheduler={"name": "linear"}), Gradual(), everything())
    joined = ["group_2_no_decay", "group_3", "group_3_no_decay"]
    assert list(ended.module.rates[-1]) == ["decay", "no_decay", *joined]
    for name, since in zip(joined, (6, 12, 12), strict=True):
        assert ended.recorder.steps_of(f"{KEY}/group/{name}") == list(range(since, 24))
        for each in ended.module.rates[since:]:
            assert each[name] == pytest.approx(each["decay"] / 10)


def test_a_custom_optimizer_takes_what_joins() -> None:
    optimizer = {"_target_": "torch.optim.NAdam", "lr": LR, "weight_decay": 0.1}
    ended = fit(Tuned(optimizer, {"name": "linear"}), Unfreezing(), everything())
    assert list(ended.module.rates[-1]) == ["decay", "no_decay", "group_2", "group_2_no_decay"]
    for each in ended.module.rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)
    key = "adam_moments/grad_norm/group/group_2"
    assert ended.recorder.steps_of(key) == list(range(12, 24))


# A plateau is judged after the epoch's checkpoint is written.
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "plateau"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_checkpoint_of_a_training_that_unfreezes_is_gone_on_with(name: str, epoch: int) -> None:
    def trained(ckpt_path: str | None = None) -> Tuned:
        module = Tuned(scheduler=SCHEDULERS[name])
        kept = ModelCheckpoint(".", filename="{epoch}", save_top_k=-1)
        run = trainer(max_epochs=EPOCHS, callbacks=[Unfreezing(), kept], enable_checkpointing=True)
        run.fit(module, loader(BATCHES), loader(1), ckpt_path=ckpt_path, weights_only=False)
        return module

    straight = trained()
    resumed = trained(f"epoch={epoch}.ckpt")
    assert resumed.rates == straight.rates[6 * (epoch + 1) :]
    assert_same(straight, resumed)


class ByHand(Tuned):
    """Manual optimization, and the schedule stepped by hand."""

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
        whole = network()
        self.configs = optimizer, scheduler
        self.backbone, self.head = whole[:3], whole[3]
        self.rates: list[dict[str, float]] = []

    def configure_optimizers(self) -> Any:
        return build_adam(self, *self.configs, trainer=self.trainer)

    training_step = Tuned.training_step
    on_before_optimizer_step = Tuned.on_before_optimizer_step


@pytest.mark.parametrize("kind", [ByHand, WithoutMixin])
def test_what_joins_is_scheduled_whoever_steps_the_schedule(kind: Any) -> None:
    rates = fit(kind(scheduler={"name": "linear"}), Unfreezing()).module.rates
    assert [each["decay"] for each in rates] == pytest.approx(
        [LR * (1 - step / 24) for step in range(24)]
    )
    for each in rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)


class Backbone(BackboneFinetuning):
    def __init__(self, **settings: Any) -> None:
        super().__init__(2, lambda epoch: 1.5, 0.1, should_align=False, **settings)


def test_backbone_finetuning_unfreezes_at_its_share_of_the_rate() -> None:
    ended = fit(Tuned(), Backbone(), everything())
    assert ended.recorder.steps_of(f"{KEY}/group/group_2") == list(range(12, 24))
    for each in ended.module.rates[12:18]:
        assert each == {
            "decay": LR,
            "no_decay": LR,
            "group_2": pytest.approx(LR / 10),
            "group_2_no_decay": pytest.approx(LR / 10),
        }


def test_backbone_finetuning_raises_the_rate_of_all_of_the_backbone() -> None:
    for each in fit(Tuned(), Backbone()).module.rates[18:]:
        assert each["group_2"] == each["group_2_no_decay"] == pytest.approx(LR / 10 * 1.5)


class FreezingAgain(L.Callback):
    """Takes a part out of the training at the start of the third epoch."""

    def __init__(self, clears: bool) -> None:
        self.clears = clears

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            pl_module.backbone.requires_grad_(False)
            if self.clears:
                pl_module.backbone.zero_grad()


@pytest.mark.parametrize("clears", [True, False])
def test_what_is_frozen_in_the_middle_is_not_measured_from_there_on(clears: bool) -> None:
    frozen = FreezingAgain(clears)
    measured = fit(Tuned(scheduler={"name": "linear"}), frozen, everything())
    assert_same(fit(Tuned(scheduler={"name": "linear"}), frozen).module, measured.module)
    rows = measured.recorder
    assert rows.steps_of(f"{KEY}/layer/backbone.0") == list(range(12))
    assert rows.steps_of(f"{KEY}/tensor/backbone.1.bias") == list(range(12))
    assert rows.steps_of(f"{KEY}/layer/head") == list(range(24))
    assert rows.steps_of(f"{KEY}/group/decay") == list(range(24))


def test_a_group_that_is_frozen_whole_is_not_measured_from_there_on() -> None:
    groups = [{"name": "backbone", "match": "backbone.*"}]
    measured = fit(Tuned({**ADAMW, "groups": groups}), FreezingAgain(False), everything())
    for name in ("backbone", "backbone_no_decay"):
        assert measured.recorder.steps_of(f"{KEY}/group/{name}") == list(range(12))


GROUPED = {**ADAMW, "groups": [{"name": "head", "match": "head.*", "lr_scale": 5.0}]}
SCALES = {"decay": 1.0, "no_decay": 1.0, "head": 5.0, "head_no_decay": 5.0}
WARM = {"name": "linear", "warmup_steps": 3}
SEARCH = {"min_lr": 1e-4, "max_lr": 1e-1}


def searched(module: Any, *callbacks: L.Callback, **settings: Any) -> tuple[L.Trainer, Any]:
    run = trainer(
        max_epochs=EPOCHS, callbacks=list(callbacks), logger=MemoryLogger(), num_sanity_val_steps=0
    )
    asked = {**SEARCH, "num_training": 20, "attr_name": "optimizer_lr", **settings}
    found = Tuner(run).lr_find(module, loader(BATCHES), loader(1), **asked)
    return run, found


def assert_searched(rates: list[dict[str, float]], found: Any) -> None:
    assert len(rates) == len(found.results["lr"]) == 20
    for each, lr in zip(rates, found.results["lr"], strict=True):
        assert each == {name: pytest.approx(lr * scale) for name, scale in SCALES.items()}
    assert rates[0]["decay"] == pytest.approx(SEARCH["min_lr"])
    assert rates[-1]["decay"] == pytest.approx(SEARCH["max_lr"], rel=0.5)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "exponential") for name in SCHEDULERS), ("none", "linear"), ("linear", "linear")],
)
def test_the_search_keeps_the_groups_multiples_at_every_step(name: str, mode: str) -> None:
    module = Tuned(GROUPED, SCHEDULERS[name])
    _, found = searched(module, mode=mode, early_stop_threshold=None)
    assert_searched(module.rates, found)


@each_scheduler
def test_what_was_found_trains_as_if_the_config_had_said_it(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    run, found = searched(module)
    suggestion = found.suggestion()
    assert module.optimizer_lr == suggestion != LR
    module.rates.clear()
    run.fit(module, loader(BATCHES), loader(1))
    said = fit(Tuned({**GROUPED, "lr": suggestion}, scheduler)).module
    assert module.rates == [
        {name: pytest.approx(lr, rel=1e-12) for name, lr in each.items()} for each in said.rates
    ]
    for one, other in zip(parameters(module), parameters(said), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_what_was_found_is_warmed_up_to_and_scheduled_each_group_at_its_multiple() -> None:
    module = Tuned(GROUPED, WARM)
    run, found = searched(module)
    module.rates.clear()
    run.fit(module, loader(BATCHES))
    shape = [step / 3 if step < 3 else 1 - (step - 3) / 21 for step in range(24)]
    for name, scale in SCALES.items():
        assert [each[name] for each in module.rates] == pytest.approx(
            [found.suggestion() * scale * share for share in shape]
        )


@pytest.mark.parametrize("name", ["none", "linear", "warm-up and cosine"])
def test_a_second_search_begins_at_the_lowest_rate_too(name: str) -> None:
    module = Tuned(GROUPED, SCHEDULERS[name])
    searched(module)
    module.rates.clear()
    _, found = searched(module, early_stop_threshold=None)
    assert_searched(module.rates, found)


@each_scheduler
def test_a_search_that_updates_nothing_changes_nothing(scheduler: Any) -> None:
    module = Tuned(GROUPED, scheduler)
    run, _ = searched(module, update_attr=False)
    assert module.optimizer_lr == LR
    assert_same(module, Tuned())
    module.rates.clear()
    run.fit(module, loader(BATCHES), loader(1))
    undisturbed = fit(Tuned(GROUPED, scheduler)).module
    assert module.rates == undisturbed.rates
    assert_same(module, undisturbed)


def test_a_search_is_not_measured_and_the_training_after_it_is() -> None:
    monitor = everything()
    module = Tuned(GROUPED, WARM)
    run, _ = searched(module, monitor)
    recorder: Any = run.logger
    assert recorder.steps_of(KEY) == []
    run.fit(module, loader(BATCHES), loader(1))
    assert recorder.steps_of(KEY) == list(range(24))
    assert monitor.state_dict()["steps"] == {"": [24, 0]}


def finder(**settings: Any) -> LearningRateFinder:
    asked = {**SEARCH, "num_training_steps": 20, "attr_name": "optimizer_lr", **settings}
    return LearningRateFinder(**asked)


@each_scheduler
def test_the_finders_callback_searches_and_then_trains_with_what_it_found(scheduler: Any) -> None:
    find = finder(early_stop_threshold=None)
    measured = fit(Tuned(GROUPED, scheduler), find, everything())
    module: Any = measured.module
    assert find.optimal_lr is not None
    assert_searched(module.rates[:20], find.optimal_lr)
    suggestion = find.optimal_lr.suggestion()
    assert module.optimizer_lr == suggestion
    said = fit(Tuned({**GROUPED, "lr": suggestion}, scheduler)).module
    assert module.rates[20:] == [
        {name: pytest.approx(lr, rel=1e-12) for name, lr in each.items()} for each in said.rates
    ]
    assert measured.recorder.steps_of(KEY) == list(range(24))


def test_the_finders_callback_trains_the_same_measured_or_not() -> None:
    one, other = (fit(Tuned(GROUPED, WARM), finder(), *more) for more in ([], [everything()]))
    assert_same(one.module, other.module)


def test_the_finders_callback_that_updates_nothing_changes_nothing() -> None:
    module = fit(Tuned(GROUPED, WARM), finder(update_attr=False)).module
    undisturbed = fit(Tuned(GROUPED, WARM)).module
    assert module.rates[20:] == undisturbed.rates
    assert_same(module, undisturbed)


def test_what_was_found_is_kept_while_a_part_joins() -> None:
    module = Tuned(ADAMW, {"name": "linear"})
    run, found = searched(module, Unfreezing())
    module.rates.clear()
    run.fit(module, loader(BATCHES), loader(1))
    for step, each in enumerate(module.rates):
        assert each["decay"] == pytest.approx(found.suggestion() * (1 - step / 24))
    for each in module.rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)


class Milestone(LearningRateFinder):
    """Searches in the middle of a training, at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__(1e-4, 1e-1, 20, attr_name="optimizer_lr", early_stop_threshold=None)
        self.epoch = epoch

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("name", ["none", "linear", "warm-up and cosine"])
def test_a_search_in_the_middle_of_a_training_keeps_the_groups_multiples(name: str) -> None:
    module = Tuned(GROUPED, SCHEDULERS[name])
    fit(module, Milestone(1), limit_val_batches=0, max_epochs=6)
    assert module.optimizer_lr != LR
    assert len(module.rates) > 36, "the steps of the search are among them"
    for each in module.rates:
        assert each["head"] == pytest.approx(5 * each["decay"])


def test_a_search_keeps_the_share_of_a_part_that_joined() -> None:
    module = Tuned()
    fit(module, Unfreezing(), Milestone(3), limit_val_batches=0, max_epochs=5)
    assert len(module.rates) > 30, "the steps of the search are among them"
    for each in module.rates[12:]:
        assert each["group_2"] == pytest.approx(each["decay"] / 10)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (ADAMW, LR),
        ({}, 1e-3),
        ({"_target_": "torch.optim.NAdam", "lr": 0.3}, 0.3),
        ({"_target_": "torch.optim.NAdam"}, 2e-3),
    ],
    ids=str,
)
def test_the_rate_to_search_for_is_that_of_the_optimizer(optimizer: Any, expected: float) -> None:
    assert Lit(optimizer).optimizer_lr == expected


def test_a_rate_that_is_set_before_training_is_trained_with() -> None:
    module = Tuned(GROUPED, WARM)
    module.optimizer_lr = 0.02
    said = fit(Tuned({**GROUPED, "lr": 0.02}, WARM)).module
    assert fit(module).module.rates == [
        {name: pytest.approx(lr, rel=1e-12) for name, lr in each.items()} for each in said.rates
    ]


def test_a_group_is_added_to_an_optimizer_that_is_not_trained_yet() -> None:
    module = Tuned()
    module.backbone.requires_grad_(False)
    optimizer = build_optimizer(module, ADAMW)
    optimizer.add_param_group({"params": module.backbone.named_parameters()})
    assert optimizer.param_groups[2]["param_names"][0] == "0.weight"
