"""The Trainer's loops, in every way it can be told to go, with and without AdamMonitor."""

import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from lightning_adam import AdamMonitor, AdamStatistics
from lightning_adam.optimizers import names_of
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.steps import StepCounter
from tests.statistics.cases import reference_tensors
from tests.support.loops import (
    COMPARED,
    LINEAR,
    LOOPS,
    STEP,
    Batch,
    ByHandPastLightning,
    Clock,
    Compiled,
    Gan,
    Judged,
    Loop,
    Silent,
    compiled_whole,
)
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY
from tests.support.oracle import reference_statistics
from tests.support.training import ADAMW, LR, Lit, loader, loss_of, network, parameters, trainer


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock)


each_loop = pytest.mark.parametrize("loop", LOOPS, ids=[loop.name for loop in LOOPS])


def everything(**settings: Any) -> AdamMonitor:
    scopes = ["model", "group", "layer", "tensor"]
    return AdamMonitor(1, scopes, "all", histograms_every_n_steps=2, **settings)


class Fit(NamedTuple):
    trainer: L.Trainer
    module: L.LightningModule
    recorder: MemoryLogger

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.recorder.rows if key in metrics]


def fit(loop: Loop, *callbacks: L.Callback, scheduler: Any = None) -> Fit:
    module, recorder = loop.kind(ADAMW, scheduler or loop.scheduler), MemoryLogger()
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
    monkeypatch.setattr("lightning_adam.statistics.kernels.measure", planted)
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
        assert last == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


class Configured(MemoryLogger):
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
    def trained(epochs: int, ckpt_path: str | None = None) -> tuple[nn.Module, MemoryLogger]:
        module, recorder = Judged(ADAMW, {"name": "linear", "total_steps": 12}), MemoryLogger()
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
    module, monitor, recorder = Judging(), everything(), MemoryLogger()
    runner = trainer(callbacks=[monitor], logger=recorder)
    before = parameters(module)
    assert "val/loss" in runner.validate(module, loader(2), verbose=False)[0]
    assert "test/loss" in runner.test(module, loader(2), verbose=False)[0]
    assert len(runner.predict(module, loader(2)) or []) == 2
    assert all(torch.equal(*pair) for pair in zip(before, parameters(module), strict=True))
    assert recorder.steps_of(KEY) == []


def test_validating_between_two_trainings_changes_neither() -> None:
    def trained(validates: bool) -> Fit:
        module, recorder = Judging(ADAMW, LINEAR), MemoryLogger()
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
    recorder, module = MemoryLogger(), Lit(ADAMW, LINEAR)
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
    broken = trainer(max_epochs=1, callbacks=callbacks, logger=MemoryLogger())
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

    recorder, monitor = MemoryLogger(), everything()
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
