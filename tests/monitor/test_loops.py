"""The Trainer's loops with and without AdamMonitor."""

import copy
import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LambdaCallback,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from lightning_adam import AdamMonitor, AdamStatistics
from lightning_adam.optim.steps import StepCounter
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.names import optimizer_names
from tests.statistics.cases import reference_tensors
from tests.support.loops import (
    COMPARED,
    LINEAR,
    STEP,
    Batch,
    Clock,
    Compiled,
    Gan,
    Loop,
    Validating,
    WithoutLog,
    baseline_fit,
    compiled_whole,
    each_distinct_loop,
    each_loop,
    run_loop,
)
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY, full_monitor, scoped, step_hooks
from tests.support.oracle import reference_statistics
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    LR,
    Lit,
    TrainingRun,
    assert_same_parameters,
    loader,
    loss_of,
    network,
    run_training,
    trainer,
)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock)


@each_loop
def test_schedule_ends_with_the_run_and_every_step_is_measured_and_unchanged(loop: Loop) -> None:
    without, monitor = baseline_fit(loop.name), full_monitor()
    optimizer = without.trainer.optimizers[0]
    assert {float(state["step"]) for state in optimizer.state.values()} == {loop.steps}
    left = 1 - loop.steps / (loop.length or loop.steps)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(LR * left, rel=1e-9, abs=0)

    measured = run_loop(loop, monitor)
    assert_same_parameters(without.module, measured.module)
    assert monitor.state_dict()["steps"][loop.optimizer][0] == loop.steps
    if loop.is_logged:
        steps = loop.measured or list(range(1, loop.steps + 1))
        assert measured.values(loop.key_of("step")) == steps


@each_distinct_loop
def test_monitor_failure_is_reported_once_and_changes_no_step(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any) -> None:
        raise ZeroDivisionError("planted")

    without = baseline_fit(loop.name)
    monkeypatch.setattr("lightning_adam.statistics.kernels.measure", planted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_error = run_loop(loop, full_monitor())
    reports = [each for each in caught if "ZeroDivisionError: planted" in str(each.message)]
    assert [each.category for each in reports] == [UserWarning]
    assert_same_parameters(without.module, with_error.module)
    assert with_error.values(loop.key_of("update_norm")) == []


@each_distinct_loop
def test_last_logged_values_match_the_reference(loop: Loop) -> None:
    """The learning rate is constant, so that the optimizer keeps the settings of the last step."""
    ended = run_loop(loop, full_monitor(), scheduler={"name": "constant"})
    expected = reference_statistics(reference_tensors(ended.trainer.optimizers[0]))
    for name in COMPARED:
        last = ended.values(loop.key_of(name))[-1]
        assert last == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


class ConfigLogger(MemoryLogger):
    """Also keeps the config of the run."""

    config: dict[str, Any]

    def log_hyperparams(self, params: Any = None) -> None:
        self.config = params["lightning_adam"]


def test_optimizers_of_a_gan_are_named_after_its_parts_in_keys_and_config() -> None:
    recorder = ConfigLogger()
    run_loop(Loop("gan", 6, kind=Gan, flags={"logger": recorder}), full_monitor())
    keys = {key for _, metrics in recorder.rows for key in metrics}
    assert {key.split("/")[2] for key in keys if "adam_" in key} == {
        "generator",
        "discriminator",
    }
    assert scoped("optimizer/generator/tensor/generator.weight") in keys
    assert scoped("optimizer/discriminator/group/no_decay") in keys
    steps = scoped("optimizer/discriminator", STEP)
    assert [metrics[steps] for _, metrics in recorder.rows if steps in metrics] == [1, 2, 3]
    assert recorder.steps_of(steps) == [1, 3, 5]
    for part, total_steps in (("generator", 6), ("discriminator", 3)):
        assert recorder.config["optimizer"][part]["class"] == "AdamW"
        assert recorder.config["scheduler"][part]["total_steps"] == total_steps


def test_config_has_a_scheduler_for_the_scheduled_optimizer_only() -> None:
    class HalfScheduled(Gan):
        def configure_optimizers(self) -> Any:
            generator, discriminator = super().configure_optimizers()
            return {"optimizer": generator["optimizer"]}, discriminator

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            self.optimizers()[1].step()  # type: ignore[index]

    recorder = ConfigLogger()
    run_loop(Loop("gan", 6, kind=HalfScheduled, flags={"logger": recorder}), full_monitor())
    assert recorder.config["scheduler"].keys() == {"discriminator"}
    assert recorder.config["optimizer"].keys() == {"generator", "discriminator"}


def nested() -> Any:
    part = {"encoder": nn.Linear(6, 4), "decoder": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))}
    return nn.ModuleDict({"nets": nn.ModuleDict(part), "head": nn.Linear(1, 1)})


OPTIMIZER_NAMES = [
    (["nets.encoder", "nets.decoder"], ["nets.encoder", "nets.decoder"]),
    (["nets.decoder.0", "nets.decoder.1"], ["nets.decoder.0", "nets.decoder.1"]),
    (["nets", "head"], ["nets", "head"]),
    (["nets.encoder", "head"], ["nets", "head"]),
    (["nets.encoder", "nets.encoder"], ["0", "1"]),
    (["nets.encoder.weight", "nets.encoder.bias"], ["0", "1"]),
    (["nets.encoder", "nets.encoder", "head"], ["0", "1", "2"]),
    (["", "head"], ["0", "head"]),
]
"""The prefixes of the parameter names of each optimizer, and the names of the optimizers."""


@pytest.mark.parametrize("is_compiled", [False, True])
def test_optimizers_are_named_by_the_shortest_distinct_path(is_compiled: bool) -> None:
    with each_row() as row:
        for patterns, expected in OPTIMIZER_NAMES:
            module = nested()
            optimizers = [
                Adam(each for name, each in module.named_parameters() if name.startswith(pattern))
                for pattern in patterns
            ]
            if is_compiled:
                for part in module["nets"].values():
                    part.compile(backend="eager")
                module["nets"] = torch.compile(module["nets"], backend="eager")
            with row(patterns):
                assert optimizer_names(optimizers, module) == expected


def test_two_optimizers_of_the_same_parameters_have_distinct_names() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    names = optimizer_names([Adam(module.parameters()), Adam(module[0].parameters())], module)
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
    recorder = ConfigLogger()
    loop = Loop("one part", 6, kind=lambda *_: TwoOnOnePart(), flags={"logger": recorder})
    run_loop(loop, full_monitor())
    for number, kind in (("0", "AdamW"), ("1", "Adam")):
        assert recorder.steps_of(scoped(f"optimizer/{number}")) == list(range(6))
        assert recorder.config["optimizer"][number]["class"] == kind
    assert recorder.config["scheduler"] is None


@pytest.mark.parametrize("kind", [Compiled, compiled_whole])
def test_compiled_module_logs_the_same_keys_and_values(kind: Any) -> None:
    def log_of(kind: Any) -> list[dict[str, float]]:
        ended = run_loop(Loop("compiled", 6, kind=kind), full_monitor())
        return [metrics for _, metrics in ended.logger.rows if KEY in metrics]

    rows = log_of(kind)
    assert scoped("tensor/net.0.weight") in rows[0]
    assert scoped("layer/net.1") in rows[0]
    assert rows == log_of(WithoutLog)


def test_groups_of_a_compiled_network_match_the_uncompiled_names() -> None:
    def groups(kind: Any) -> list[tuple[str, list[str]]]:
        optimizer = {**ADAMW, "groups": [{"name": "first", "match": "net.0.*", "lr_scale": 2}]}
        built = kind(optimizer).configure_optimizers()["optimizer"]
        return [(group["name"], group["param_names"]) for group in built.param_groups]

    assert groups(Compiled) == groups(Lit)


def test_compiled_step_in_a_plain_loop_is_counted_and_measured() -> None:
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


def test_weights_are_also_averaged_in_a_second_run() -> None:
    def average() -> L.Callback:
        return EMAWeightAveraging(decay=0.5)

    module = run_loop(Loop("first", 6, kind=Validating, callbacks=lambda: [average()])).module
    copied = copy.deepcopy(module)
    assert_same_parameters(module, copied)
    for each in (module, copied):
        loop = Loop("second", 6, kind=lambda *_, each=each: each)
        again = run_loop(loop, average(), full_monitor())
        assert again.values(STEP) == [1, 2, 3, 4, 5, 6]
        assert again.trainer.optimizers[0].param_groups[0]["lr"] == 0
    assert_same_parameters(module, copied)


def test_run_with_a_weight_average_resumes_from_its_checkpoint() -> None:
    def run(ckpt_path: str | None = None) -> TrainingRun:
        return run_training(
            Validating(ADAMW, {"name": "linear", "total_steps": 12}),
            EMAWeightAveraging(decay=0.5),
            ModelCheckpoint(".", filename="{epoch}", save_top_k=-1),
            full_monitor(),
            validation=loader(2),
            ckpt_path=ckpt_path,
            max_epochs=2,
            enable_checkpointing=True,
        )

    uninterrupted, resumed = run(), run("epoch=0.ckpt")
    assert resumed.values(STEP) == list(range(7, 13))
    assert_same_parameters(uninterrupted.module, resumed.module)


@pytest.mark.parametrize("scheduler", [LINEAR, None], ids=["scheduled", "constant"])
def test_stochastic_weight_averaging_replaces_the_schedule(scheduler: Any) -> None:
    def run(*monitor: L.Callback) -> TrainingRun:
        swa = StochasticWeightAveraging(1e-3, 2, annealing_epochs=1, annealing_strategy="linear")
        return run_training(Lit(ADAMW, scheduler), swa, *monitor, max_epochs=5)

    without, measured = run(), run(full_monitor())
    assert_same_parameters(without.module, measured.module)
    assert measured.values(STEP) == list(range(1, 31))
    lrs = measured.values(STATISTICS["lr"].key)
    assert lrs[0] == LR
    assert lrs[-6:] == [pytest.approx(1e-3)] * 6


class WithTestAndPredict(Validating):
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", loss_of(self.net, batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]


def test_module_without_optimizer_config_can_validate_test_and_predict() -> None:
    module, monitor, recorder = WithTestAndPredict(), full_monitor(), MemoryLogger()
    runner = trainer(callbacks=[monitor], logger=recorder)
    assert "val/loss" in runner.validate(module, loader(2), verbose=False)[0]
    assert "test/loss" in runner.test(module, loader(2), verbose=False)[0]
    assert len(runner.predict(module, loader(2)) or []) == 2
    assert_same_parameters(module, WithTestAndPredict())
    assert recorder.steps_of(KEY) == []


def test_validation_between_two_runs_changes_neither() -> None:
    def run_twice(validates: bool) -> TrainingRun:
        module = WithTestAndPredict(ADAMW, LINEAR)
        recorder, monitor = MemoryLogger(), full_monitor()
        for epochs in (1, 2):
            run = run_training(module, monitor, max_epochs=epochs, logger=recorder)
            if validates:
                run.trainer.validate(module, loader(2), verbose=False)
        return run

    one, other = run_twice(False), run_twice(True)
    assert_same_parameters(one.module, other.module)
    assert one.values(STEP) == other.values(STEP)
    assert [metrics for _, metrics in one.logger.rows if KEY in metrics] == [
        metrics for _, metrics in other.logger.rows if KEY in metrics
    ]


def test_a_monitor_measures_a_second_run_like_the_first() -> None:
    monitor = AdamMonitor(4)
    for _ in range(2):
        assert run_loop(Loop("again", 6), monitor).steps_of(KEY) == [0, 3]
        assert monitor.state_dict()["steps"] == {"": [6, 0]}


def test_one_trainer_and_monitor_measure_two_consecutive_runs() -> None:
    recorder, module = MemoryLogger(), Lit(ADAMW, LINEAR)
    both = trainer(max_epochs=1, callbacks=[full_monitor()], logger=recorder)
    both.fit(module, loader(6))
    first = both.optimizers[0]
    both.fit_loop.max_epochs = 2
    both.fit(module, loader(6))
    steps = [metrics[STEP] for _, metrics in recorder.rows if STEP in metrics]
    assert steps == [*range(1, 7), *range(1, 7)], "the second run has a new optimizer"
    assert recorder.steps_of(KEY) == list(range(12))
    assert both.optimizers[0] is not first


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
def test_interrupted_run_leaves_no_hook_in_the_optimizer(hook: str) -> None:
    monitor = full_monitor()
    (unmonitored,) = run_training(Lit(ADAMW), data=1).trainer.optimizers
    for error in (KeyboardInterrupt, ArithmeticError):

        def interrupt(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        callbacks = [monitor, LambdaCallback(**{hook: interrupt})]
        broken = trainer(max_epochs=1, callbacks=callbacks, logger=MemoryLogger())
        with pytest.raises((KeyboardInterrupt, SystemExit, ArithmeticError)):
            broken.fit(Lit(ADAMW), loader(3))
        assert step_hooks(broken.optimizers[0]) == step_hooks(unmonitored)
    measured = run_loop(Loop("next", 3, data=partial(loader, 3)), monitor)
    assert measured.values(STEP) == [1, 2, 3]


def test_interrupted_run_measures_every_step_before_the_interrupt() -> None:
    def interrupt(_: Any, __: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            raise KeyboardInterrupt

    recorder, monitor = MemoryLogger(), full_monitor()
    callbacks = [LambdaCallback(on_train_batch_start=interrupt), monitor]
    broken = trainer(max_epochs=1, callbacks=callbacks, logger=recorder)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        broken.fit(Lit(ADAMW), loader(6))
    assert recorder.steps_of(KEY) == [0, 1, 2, 3]
    assert monitor.state_dict()["steps"] == {"": [4, 0]}


def test_run_without_batches_measures_nothing_and_does_not_fail() -> None:
    ended = run_training(Lit(ADAMW, {"name": "constant"}), full_monitor(), limit_train_batches=0)
    assert ended.values(STEP) == []
    assert_same_parameters(ended.module, Lit())
