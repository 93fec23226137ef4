"""The Trainer's loops, in every way it can be told to go, with and without AdamMonitor."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_adam import AdamMonitor, AdamStatistics, build_adam
from lightning_adam.optimizers import names_of
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.steps import StepCounter
from tests.reference import reference_statistics
from tests.statistics.cases import reference_tensors
from tests.test_monitor import KEY, Recorder
from tests.training import BATCH, Lit, loader, loss_of, network, parameters, trainer

LR = 1e-2
ADAMW = {"lr": LR, "weight_decay": 0.1, "decoupled_weight_decay": True}
LINEAR = {"name": "linear"}
STEP = STATISTICS["step"].key
COMPARED = ("grad_norm", "exp_avg_rms", "update_norm", "lr", "step")
Batch = tuple[Tensor, Tensor]


class Clock:
    """What the Trainer's timer reads: it goes on with the batches."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock)


class Timed(Lit):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        Clock.now += 0.3
        return super().training_step(batch, batch_idx)


class Judged(Lit):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.net, batch))


class Skipping(Lit):
    """`training_step` returns None for some batches, counted from the run's first."""

    skipped: tuple[int, ...] = (1, 4)
    batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.batches += 1
        return None if self.batches - 1 in self.skipped else super().training_step(batch, batch_idx)


class SkippingTheFirst(Skipping):
    skipped = (0,)


class SkippingAnEpoch(Skipping):
    skipped = (6, 7, 8, 9, 10, 11)


class SkippingTheSecondOfTwo(Skipping):
    skipped = (1, 3, 5)


class KeepingZeroGradients(Skipping):
    """With gradients of 0 in place of none, a batch without a loss is a step all the same."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class SteppingEverySecond(Lit):
    def optimizer_step(  # type: ignore[override]
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        if batch_idx % 2:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()


class ClippingItself(Lit):
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(optimizer, 1e-3, "norm")


class Checkpointed(Lit):
    """Keeps no activations."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        def forward(inputs: Tensor) -> Tensor:
            return checkpoint(self.net, inputs, use_reentrant=False)  # type: ignore[no-any-return]

        return nn.functional.mse_loss(forward(batch[0]), batch[1])


class Compiled(Lit):
    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


class Silent(Lit):
    """Lightning's `log` cannot be compiled."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)


def compiled_whole(optimizer: Any = None, scheduler: Any = None) -> L.LightningModule:
    compiled: Any = torch.compile(Silent(optimizer, scheduler), backend="eager")
    return compiled  # type: ignore[no-any-return]


class ByHand(Lit):
    """Manual optimization."""

    steps_a_batch = 1
    batches_a_step = 1
    raw = False

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.raw)
        scheduler: Any = self.lr_schedulers()
        for _ in range(self.steps_a_batch):
            if batch_idx % self.batches_a_step == 0:
                optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            if (batch_idx + 1) % self.batches_a_step == 0:
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()


class ByHandTwice(ByHand):
    steps_a_batch = 2


class ByHandEverySecond(ByHand):
    batches_a_step = 2


class ByHandPastLightning(ByHand):
    raw = True


class ByHandWithClosure(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(self.net, batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        if self.lr_schedulers() is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]


class Gan(L.LightningModule):
    """Two optimizers, that of the discriminator stepping at every second batch only."""

    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.configs = optimizer, scheduler
        # The network's own seed is for both.
        self.discriminator, self.generator = network(), nn.Linear(6, 6)

    def configure_optimizers(self) -> Any:
        parts = ((self.generator, 6), (self.discriminator, 3))
        return [
            build_adam(part, *self.configs, total_steps, trainer=self.trainer)
            for part, total_steps in parts
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        schedulers: Any = self.lr_schedulers() or [None, None]
        for index, optimizer in enumerate(self.optimizers()):
            if index == 1 and batch_idx % 2 == 0:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            score = self.discriminator(self.generator(batch[0])).mean()
            self.manual_backward(score if index else -score)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            if schedulers[index] is not None:
                schedulers[index].step()


class Stream(IterableDataset[Batch]):
    """Without a length."""

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(4)
        while True:
            inputs = torch.randn(6, generator=generator)
            yield inputs, inputs[:1].sin()


class Finite(Stream):
    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in zip(super().__iter__(), range(len(self)), strict=False))

    def __len__(self) -> int:
        return 5 * BATCH


def stream(kind: type[Stream]) -> DataLoader[Batch]:
    return DataLoader(kind(), batch_size=BATCH)


def six_batches() -> DataLoader[tuple[Tensor, ...]]:
    return loader(6)


@dataclass(frozen=True)
class Loop:
    """A training: 6 batches an epoch, 1 epoch, unless it says otherwise."""

    name: str
    steps: int
    """Optimizer steps that it takes."""
    length: int | None = None
    """Those that its schedule is long, if it does not come to the end of it."""
    kind: Callable[..., L.LightningModule] = Lit
    flags: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[L.Callback]] = list
    data: Callable[[], Any] = six_batches
    scheduler: dict[str, Any] = field(default_factory=lambda: LINEAR)
    measured: list[int] | None = None
    """The steps whose measurements are logged, if these are not all."""
    is_logged: bool = True
    suffix: str = ""
    """What stands at the end of its keys."""


LOOPS = [
    Loop("plain", 6),
    Loop("three epochs", 18, flags={"max_epochs": 3}),
    Loop(
        "accumulation, an epoch's last one partial",
        4,
        flags={"accumulate_grad_batches": 4} | {"max_epochs": 2},
    ),
    Loop(
        "accumulation of more than an epoch has",
        2,
        flags={"accumulate_grad_batches": 10} | {"max_epochs": 2},
    ),
    Loop("accumulation and max_steps", 3, flags={"accumulate_grad_batches": 2, "max_steps": 3}),
    Loop(
        "accumulation that grows",
        6 + 3 + 2,
        flags={"max_epochs": 3},
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})],
    ),
    Loop(
        "accumulation that grows, and max_steps",
        8,
        flags={"max_epochs": 3, "max_steps": 8},
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})],
    ),
    Loop(
        "accumulation that shrinks, and max_steps beyond the end",
        2 + 6 + 6,
        flags={"max_epochs": 3, "max_steps": 30},
        callbacks=lambda: [GradientAccumulationScheduler({0: 4, 1: 1})],
    ),
    Loop(
        "accumulation that changes in infinite training",
        8,
        flags={"max_epochs": -1, "max_steps": 8},
        callbacks=lambda: [GradientAccumulationScheduler({0: 4, 1: 1})],
    ),
    Loop(
        "accumulation that changes over data without a length",
        5,
        flags={"max_epochs": 3, "max_steps": 5},
        callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 1})],
        data=partial(stream, Stream),
    ),
    Loop("clipping by norm", 6, flags={"gradient_clip_val": 1e-3}),
    Loop(
        "clipping by value",
        6,
        flags={"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
    ),
    Loop("clipping of its own", 6, kind=ClippingItself),
    Loop("by hand", 6, kind=ByHand),
    Loop("by hand, with a closure", 6, kind=ByHandWithClosure),
    Loop(
        "by hand, two steps a batch",
        12,
        kind=ByHandTwice,
        scheduler={"name": "linear", "total_steps": 12},
        measured=[2, 4, 6, 8, 10, 12],
    ),
    Loop(
        "by hand, two steps a batch, and max_steps",
        8,
        kind=ByHandTwice,
        flags={"max_steps": 8},
        measured=[2, 4, 6, 8],
    ),
    Loop("by hand, two batches a step", 3, 6, kind=ByHandEverySecond),
    Loop("by hand, past Lightning", 6, kind=ByHandPastLightning),
    Loop("two optimizers", 6, kind=Gan, suffix="/optimizer/generator"),
    Loop("no loss of some batches", 4, 6, kind=Skipping),
    Loop("no loss of the first batch", 5, 6, kind=SkippingTheFirst),
    Loop("no loss in an epoch", 12, 18, kind=SkippingAnEpoch, flags={"max_epochs": 3}),
    Loop(
        "no loss of the second of two that accumulate",
        3,
        kind=SkippingTheSecondOfTwo,
        flags={"accumulate_grad_batches": 2},
    ),
    Loop("no loss, and gradients of 0", 6, kind=KeepingZeroGradients),
    Loop("a step at every second batch", 3, 6, kind=SteppingEverySecond),
    Loop("max_steps", 4, flags={"max_steps": 4}),
    Loop("max_steps beyond the end", 12, flags={"max_epochs": 2, "max_steps": 100}),
    Loop("max_steps, without an end of epochs", 13, flags={"max_epochs": -1, "max_steps": 13}),
    Loop("max_steps alone", 13, flags={"max_epochs": None, "max_steps": 13}),
    Loop(
        "max_time before the end",
        4,
        12,
        kind=Timed,
        flags={"max_epochs": 2, "max_time": {"seconds": 1}},
    ),
    Loop(
        "max_time alone",
        4,
        10,
        kind=Timed,
        flags={"max_epochs": -1, "max_time": {"seconds": 1}},
        scheduler={"name": "linear", "total_steps": 10},
        data=partial(loader, 2),
    ),
    Loop("data with a length", 10, flags={"max_epochs": 2}, data=partial(stream, Finite)),
    Loop(
        "data without a length",
        7,
        flags={"max_epochs": -1, "max_steps": 7},
        data=partial(stream, Stream),
    ),
    Loop(
        "validation in the middle",
        12,
        kind=Judged,
        flags={"val_check_interval": 0.5} | {"max_epochs": 2},
    ),
    Loop("validation every 4 batches", 6, kind=Judged, flags={"val_check_interval": 4}),
    Loop(
        "validation across epochs",
        12,
        kind=Judged,
        flags={"val_check_interval": 8, "check_val_every_n_epoch": None, "max_epochs": 2},
    ),
    Loop(
        "early stopping",
        6,
        18,
        kind=Judged,
        flags={"max_epochs": 3},
        callbacks=lambda: [EarlyStopping("val/loss", stopping_threshold=math.inf)],
    ),
    Loop("overfit_batches", 4, kind=Judged, flags={"overfit_batches": 2, "max_epochs": 2}),
    Loop("overfit_batches, a share", 3, kind=Judged, flags={"overfit_batches": 0.5}),
    Loop("limit_train_batches", 8, flags={"limit_train_batches": 4, "max_epochs": 2}),
    Loop("limit_train_batches, a share", 3, flags={"limit_train_batches": 0.5}),
    Loop("fast_dev_run", 1, 10**9, kind=Judged, flags={"fast_dev_run": True}, is_logged=False),
    Loop("fast_dev_run, 3 batches", 3, 10**9, flags={"fast_dev_run": 3}, is_logged=False),
    Loop("detect_anomaly", 6, flags={"detect_anomaly": True}),
    Loop("a compiled part", 6, kind=Compiled),
    Loop(
        "compiled as a whole",
        6,
        kind=compiled_whole,
    ),
    Loop("recomputed activations", 6, kind=Checkpointed),
    Loop(
        "a moving average of the weights",
        12,
        kind=Judged,
        flags={"max_epochs": 2},
        callbacks=lambda: [EMAWeightAveraging(decay=0.5)],
    ),
    Loop(
        "an average of the weights, and checkpoints",
        12,
        kind=Judged,
        flags={"max_epochs": 2, "enable_checkpointing": True},
        callbacks=lambda: [WeightAveraging(), ModelCheckpoint(".", save_top_k=-1)],
    ),
]
each_loop = pytest.mark.parametrize("loop", LOOPS, ids=[loop.name for loop in LOOPS])


def everything(**settings: Any) -> AdamMonitor:
    scopes = ["model", "group", "layer", "tensor"]
    return AdamMonitor(1, scopes, "all", histograms_every_n_steps=2, **settings)


class Fit(NamedTuple):
    trainer: L.Trainer
    module: L.LightningModule
    recorder: Recorder

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.recorder.rows if key in metrics]


def fit(loop: Loop, *callbacks: L.Callback, scheduler: Any = None) -> Fit:
    module, recorder = loop.kind(ADAMW, scheduler or loop.scheduler), Recorder()
    flags = {"max_epochs": 1, "logger": recorder, "num_sanity_val_steps": 0, **loop.flags}
    fit = trainer(callbacks=[*loop.callbacks(), *callbacks], **flags)
    fit.fit(module, loop.data(), loader(2) if isinstance(module, Judged) else None)
    return Fit(fit, module, recorder)


@cache
def undisturbed(name: str) -> Fit:
    """A training of the table without the monitor."""
    return fit(next(loop for loop in LOOPS if loop.name == name))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    pairs = list(zip(parameters(one), parameters(other), strict=True))
    assert pairs
    assert all(torch.equal(*pair) for pair in pairs)


@each_loop
def test_a_training_goes_as_far_down_its_schedule_as_it_takes_steps(loop: Loop) -> None:
    optimizer = undisturbed(loop.name).trainer.optimizers[0]
    assert {float(state["step"]) for state in optimizer.state.values()} == {loop.steps}
    left = 1 - loop.steps / (loop.length or loop.steps)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(LR * left, rel=1e-9, abs=0)


@each_loop
def test_every_step_is_measured_and_none_is_changed(loop: Loop) -> None:
    monitor = everything()
    measured = fit(loop, monitor)
    assert_same(undisturbed(loop.name).module, measured.module)
    name = loop.suffix.rpartition("/")[2]
    assert monitor.state_dict()["steps"][name][0] == loop.steps
    if loop.is_logged:
        steps = loop.measured or list(range(1, loop.steps + 1))
        assert measured.values(STEP + loop.suffix) == steps


@each_loop
def test_a_fault_in_the_monitor_is_reported_once_and_harms_no_training(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any) -> None:
        raise ZeroDivisionError("planted")

    without = undisturbed(loop.name)
    monkeypatch.setattr("lightning_adam.statistics.kernels.eager.measure", planted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disturbed = fit(loop, everything())
    reports = [each for each in caught if "ZeroDivisionError: planted" in str(each.message)]
    assert [each.category for each in reports] == [UserWarning]
    assert_same(without.module, disturbed.module)
    assert disturbed.values(KEY + loop.suffix) == []


@pytest.mark.parametrize(
    "loop",
    # After a validation Lightning lets go of the gradients.
    [each for each in LOOPS if each.is_logged and each.kind is not Judged and each.steps < 10],
    ids=lambda loop: loop.name,
)
def test_what_is_logged_last_is_what_the_reference_says_of_the_last_step(loop: Loop) -> None:
    """The learning rate is constant, so that the optimizer still stands as the step left it."""
    ended = fit(loop, everything(), scheduler={"name": "constant"})
    expected = reference_statistics(reference_tensors(ended.trainer.optimizers[0]))
    for name in COMPARED:
        last = ended.values(STATISTICS[name].key + loop.suffix)[-1]
        assert last == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


class Configured(Recorder):
    """Keeps the run's config too."""

    config: dict[str, Any]

    def log_hyperparams(self, params: Any = None) -> None:
        self.config = params["lightning_adam"]


def test_a_gans_optimizers_have_the_names_of_its_parts_in_keys_and_config() -> None:
    recorder = Configured()
    fit(Loop("gan", 6, kind=Gan, flags={"logger": recorder}), everything())
    keys = {key for _, metrics in recorder.rows for key in metrics}
    assert {key.split("/optimizer/")[1].split("/")[0] for key in keys if "adam_" in key} == {
        "generator",
        "discriminator",
    }
    assert f"{KEY}/optimizer/generator/tensor/generator.weight" in keys
    assert f"{KEY}/optimizer/discriminator/group/no_decay" in keys
    steps = f"{STEP}/optimizer/discriminator"
    assert [metrics[steps] for _, metrics in recorder.rows if steps in metrics] == [1, 2, 3]
    assert recorder.steps_of(steps) == [1, 3, 5]
    for part, total_steps in (("generator", 6), ("discriminator", 3)):
        assert recorder.config["optimizer"][part]["class"] == "AdamW"
        assert recorder.config["scheduler"][part]["total_steps"] == total_steps


def test_of_two_optimizers_only_the_scheduled_one_has_a_scheduler_in_the_config() -> None:
    class HalfScheduled(Gan):
        def configure_optimizers(self) -> Any:
            generator, discriminator = super().configure_optimizers()
            return {"optimizer": generator["optimizer"]}, discriminator

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            self.optimizers()[1].step()  # type: ignore[index]

    recorder = Configured()
    fit(Loop("gan", 6, kind=HalfScheduled, flags={"logger": recorder}), everything())
    assert recorder.config["scheduler"].keys() == {"discriminator"}
    assert recorder.config["optimizer"].keys() == {"generator", "discriminator"}


def nested() -> Any:
    part = {"encoder": nn.Linear(6, 4), "decoder": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))}
    return nn.ModuleDict({"nets": nn.ModuleDict(part), "head": nn.Linear(1, 1)})


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["nets.encoder", "nets.decoder"], ["nets.encoder", "nets.decoder"]),
        (["nets.decoder.0", "nets.decoder.1"], ["nets.decoder.0", "nets.decoder.1"]),
        (["nets", "head"], ["nets", "head"]),
        (["nets.encoder", "head"], ["nets", "head"]),
        (["nets.encoder", "nets.encoder"], ["0", "1"]),
        (["nets.encoder.weight", "nets.encoder.bias"], ["0", "1"]),
        (["nets.encoder", "nets.encoder", "head"], ["0", "1", "2"]),
        (["", "head"], ["0", "head"]),
    ],
    ids=str,
)
def test_optimizers_are_told_apart_by_the_shortest_path_that_does(
    patterns: list[str], expected: list[str]
) -> None:
    module = nested()
    optimizers = [
        Adam(each for name, each in module.named_parameters() if name.startswith(pattern))
        for pattern in patterns
    ]
    assert names_of(optimizers, module) == expected
    for part in module["nets"].values():
        part.compile(backend="eager")
    module["nets"] = torch.compile(module["nets"], backend="eager")
    assert names_of(optimizers, module) == expected


def test_no_two_optimizers_ever_have_one_name() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    names = names_of([Adam(module.parameters()), Adam(module[0].parameters())], module)
    assert len(set(names)) == 2


class TwoOnOnePart(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = network()

    def configure_optimizers(self) -> Any:
        matrices = [each for each in self.net.parameters() if each.ndim == 2]
        return AdamW(matrices), Adam(each for each in self.net.parameters() if each.ndim == 1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(loss_of(self.net, batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


def test_two_optimizers_of_one_part_are_numbered_in_keys_and_config() -> None:
    recorder = Configured()
    loop = Loop("one part", 6, kind=lambda *_: TwoOnOnePart(), flags={"logger": recorder})
    fit(loop, everything())
    for number, kind in (("0", "AdamW"), ("1", "Adam")):
        assert recorder.steps_of(f"{KEY}/optimizer/{number}") == list(range(6))
        assert recorder.config["optimizer"][number]["class"] == kind
    assert recorder.config["scheduler"] is None


@pytest.mark.parametrize("kind", [Compiled, compiled_whole])
def test_the_keys_of_what_is_compiled_are_those_of_what_is_not(kind: Any) -> None:
    def logged(kind: Any) -> list[dict[str, float]]:
        ended = fit(Loop("compiled", 6, kind=kind), everything())
        return [metrics for _, metrics in ended.recorder.rows if KEY in metrics]

    rows = logged(kind)
    assert f"{KEY}/tensor/net.0.weight" in rows[0]
    assert f"{KEY}/layer/net.1" in rows[0]
    assert rows == logged(Silent)


def test_the_groups_of_what_is_compiled_have_the_names_that_the_user_wrote() -> None:
    def groups(kind: Any) -> list[tuple[str, list[str]]]:
        optimizer = {**ADAMW, "groups": [{"name": "first", "match": "net.0.*", "lr_scale": 2}]}
        built = kind(optimizer).configure_optimizers()["optimizer"]
        return [(group["name"], group["param_names"]) for group in built.param_groups]

    assert groups(Compiled) == groups(Lit)


def with_compiled_step(built: Any) -> Any:
    built["optimizer"].step = torch.compile(built["optimizer"].step, backend="eager")
    return built


class CompiledStep(Silent):
    def configure_optimizers(self) -> Any:
        return with_compiled_step(super().configure_optimizers())


class CompiledStepByHand(ByHandPastLightning):
    def configure_optimizers(self) -> Any:
        return with_compiled_step(super().configure_optimizers())


@pytest.mark.parametrize(
    ("kind", "plain"), [(CompiledStep, Silent), (CompiledStepByHand, ByHandPastLightning)]
)
def test_a_compiled_step_is_measured_as_one_that_is_not(kind: type[Lit], plain: type[Lit]) -> None:
    def logged(kind: type[Lit]) -> list[dict[str, float]]:
        loop = Loop("step", 3, kind=kind, data=partial(loader, 3))
        ended = fit(loop, everything(), scheduler={"name": "constant"})
        return [metrics for _, metrics in ended.recorder.rows if KEY in metrics]

    compiled, expected = logged(kind), logged(plain)
    assert [row[STEP] for row in compiled] == [1, 2, 3]
    for one, other in zip(compiled, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_compiled_step_of_a_plain_loop_is_counted_and_measured() -> None:
    net, measured = network(), []
    adam = AdamW(net.parameters(), lr=LR)
    counter, statistics = StepCounter(adam), AdamStatistics("step", scopes=["model"])
    counter.attach(lambda: measured.append(statistics(adam)[STEP]))
    step = torch.compile(adam.step, backend="eager")
    for batch in loader(3):
        adam.zero_grad()
        loss_of(net, (batch[0], batch[1])).backward()  # type: ignore[no-untyped-call]
        step()
    assert counter.taken == 3
    assert measured == [1, 2, 3]


AVERAGES: dict[str, Callable[[], WeightAveraging]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "mean": WeightAveraging,
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES.keys())
def test_an_average_is_that_of_the_weights_after_each_step(
    average: Callable[[], WeightAveraging],
) -> None:
    class Keeping(L.Callback):
        def __init__(self) -> None:
            self.kept: list[list[Tensor]] = []

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.kept.append(parameters(module))

    keeping = Keeping()
    module = fit(Loop("average", 6, callbacks=lambda: [average(), keeping])).module
    expected = keeping.kept[0]
    for count, weights in enumerate(keeping.kept[1:], start=1):
        share = 0.5 if isinstance(average(), EMAWeightAveraging) else 1 / (count + 1)
        expected = [old.lerp(new, share) for old, new in zip(expected, weights, strict=True)]
    for one, other in zip(parameters(module), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES.keys())
def test_a_module_is_averaged_in_a_second_training_too(
    average: Callable[[], WeightAveraging],
) -> None:
    module = fit(Loop("first", 6, kind=Judged, callbacks=lambda: [average()])).module
    copied = copy.deepcopy(module)
    assert_same(module, copied)
    for each in (module, copied):
        again = fit(Loop("second", 6, kind=lambda *_, each=each: each), average(), everything())
        assert again.values(STEP) == [1, 2, 3, 4, 5, 6]
        assert again.trainer.optimizers[0].param_groups[0]["lr"] == 0
    assert_same(module, copied)


def test_a_training_with_an_average_goes_on_from_its_checkpoint() -> None:
    def trained(epochs: int, ckpt_path: str | None = None) -> tuple[nn.Module, Recorder]:
        module, recorder = Judged(ADAMW, {"name": "linear", "total_steps": 12}), Recorder()
        kept = ModelCheckpoint(".", filename="{epoch}", save_top_k=-1)
        callbacks = [EMAWeightAveraging(decay=0.5), kept, everything()]
        ended = trainer(
            max_epochs=epochs, callbacks=callbacks, logger=recorder, enable_checkpointing=True
        )
        ended.fit(module, loader(6), loader(2), ckpt_path=ckpt_path, weights_only=False)
        return module, recorder

    straight = trained(2)[0]
    resumed, recorder = trained(2, "epoch=0.ckpt")
    assert [metrics[STEP] for _, metrics in recorder.rows if STEP in metrics] == list(range(7, 13))
    assert_same(straight, resumed)


@pytest.mark.parametrize("scheduler", [LINEAR, None], ids=["scheduled", "constant"])
def test_stochastic_weight_averaging_takes_over_the_schedule(scheduler: Any) -> None:
    def swa() -> list[L.Callback]:
        return [StochasticWeightAveraging(1e-3, 2, annealing_epochs=1, annealing_strategy="linear")]

    flags = {"max_epochs": 5}
    loop = Loop("swa", 30, kind=lambda *_: Lit(ADAMW, scheduler), flags=flags, callbacks=swa)
    without, measured = fit(loop), fit(loop, everything())
    assert_same(without.module, measured.module)
    assert measured.values(STEP) == list(range(1, 31))
    lrs = measured.values(STATISTICS["lr"].key)
    assert lrs[0] == LR
    assert lrs[-6:] == [pytest.approx(1e-3)] * 6


class Judging(Judged):
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", loss_of(self.net, batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]


def test_a_module_without_an_optimizer_config_can_do_all_but_train() -> None:
    module, monitor, recorder = Judging(), everything(), Recorder()
    runner = trainer(callbacks=[monitor], logger=recorder)
    before = parameters(module)
    assert "val/loss" in runner.validate(module, loader(2), verbose=False)[0]
    assert "test/loss" in runner.test(module, loader(2), verbose=False)[0]
    assert len(runner.predict(module, loader(2)) or []) == 2
    assert all(torch.equal(*pair) for pair in zip(before, parameters(module), strict=True))
    assert recorder.steps_of(KEY) == []


def test_validating_between_two_trainings_changes_neither() -> None:
    def trained(validates: bool) -> Fit:
        module, recorder = Judging(ADAMW, LINEAR), Recorder()
        monitor = everything()
        for epochs in (1, 2):
            both = trainer(max_epochs=epochs, callbacks=[monitor], logger=recorder)
            both.fit(module, loader(6))
            if validates:
                both.validate(module, loader(2), verbose=False)
        return Fit(both, module, recorder)

    one, other = trained(False), trained(True)
    assert_same(one.module, other.module)
    assert one.values(STEP) == other.values(STEP)
    assert [metrics for _, metrics in one.recorder.rows if KEY in metrics] == [
        metrics for _, metrics in other.recorder.rows if KEY in metrics
    ]


def test_a_monitor_serves_another_training_as_it_did_the_first() -> None:
    monitor = AdamMonitor(4)
    for _ in range(2):
        assert fit(Loop("again", 6), monitor).recorder.steps_of(KEY) == [0, 3]
        assert monitor.state_dict()["steps"] == {"": [6, 0]}


def test_one_trainer_and_monitor_serve_two_trainings_in_a_row() -> None:
    recorder, module = Recorder(), Lit(ADAMW, LINEAR)
    both = trainer(max_epochs=1, callbacks=[everything()], logger=recorder)
    both.fit(module, loader(6))
    first = both.optimizers[0]
    both.fit_loop.max_epochs = 2
    both.fit(module, loader(6))
    steps = [metrics[STEP] for _, metrics in recorder.rows if STEP in metrics]
    assert steps == [*range(1, 7), *range(1, 7)], "the second training has a new optimizer"
    assert recorder.steps_of(KEY) == list(range(12))
    assert both.optimizers[0] is not first


class Interrupting(L.Callback):
    def __init__(self, hook: str, error: type[BaseException]) -> None:
        def interrupt(*args: Any) -> None:
            raise error

        setattr(self, hook, interrupt)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize(
    "hook",
    [
        "on_fit_start",
        "on_train_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_train_epoch_end",
    ],
)
def test_a_training_that_breaks_off_leaves_nothing_in_the_optimizer(
    hook: str, error: type[BaseException]
) -> None:
    module, monitor = Lit(ADAMW), everything()
    callbacks = [monitor, Interrupting(hook, error)]
    broken = trainer(max_epochs=1, callbacks=callbacks, logger=Recorder())
    with pytest.raises((KeyboardInterrupt, SystemExit, ArithmeticError)):
        broken.fit(module, loader(3))
    assert not broken.optimizers[0]._optimizer_step_pre_hooks
    assert not broken.optimizers[0]._optimizer_step_post_hooks
    measured = fit(Loop("after it", 6), monitor)
    assert measured.values(STEP) == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_training_has_measured_what_it_did() -> None:
    class Late(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if args[3] == 4:
                raise KeyboardInterrupt

    recorder, monitor = Recorder(), everything()
    broken = trainer(max_epochs=1, callbacks=[Late(), monitor], logger=recorder)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        broken.fit(Lit(ADAMW), loader(6))
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]
    assert monitor.state_dict()["steps"] == {"": [4, 0]}


def test_no_batches_are_no_training_and_no_fault() -> None:
    before = parameters(Lit())
    loop = Loop("none", 0, flags={"limit_train_batches": 0})
    ended = fit(loop, everything(), scheduler={"name": "constant"})
    assert ended.values(STEP) == []
    assert all(torch.equal(*pair) for pair in zip(before, parameters(ended.module), strict=True))
