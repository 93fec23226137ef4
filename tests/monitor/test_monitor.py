"""AdamMonitor in a real Trainer: when it measures, what it logs, and unchanged training."""

import csv
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_adam import AdamMonitor, ConfigError
from lightning_adam.statistics.catalogue import STATISTICS, select
from tests.statistics.cases import reference_tensors
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import (
    BAD_STEPS,
    KEY,
    SELF_SCALING,
    BadBatches,
    TwoOptimizers,
    TwoSteps,
    fit_monitored,
    fit_with_scaler,
    scoped,
    step_hooks,
)
from tests.support.oracle import reference_statistics
from tests.support.precision import IMPLEMENTATIONS
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    Lit,
    TrainingRun,
    assert_same_parameters,
    loss_of,
    parameters,
    run_training,
)


class PlainAdam(Lit):
    """Builds torch's Adam with unnamed groups."""

    def configure_optimizers(self) -> Any:
        first, *others = self.parameters()
        return torch.optim.Adam([{"params": [first]}, {"params": others}])


@contextmanager
def warnings_of_monitor() -> Iterator[list[str]]:
    """Collects the monitor's warnings, by the end of the block."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]


@pytest.mark.parametrize(
    ("implementation", "precision"),
    [("fused", "32-true"), ("foreach", "bf16-true"), ("for-loop", "bf16-mixed")],
)
def test_parameters_are_bit_identical_with_and_without_the_monitor(
    implementation: str, precision: str
) -> None:
    def module() -> Lit:
        config = {**ADAMW, **IMPLEMENTATIONS[implementation]}
        return Lit(config, {"name": "cosine", "warmup_steps": 10})

    flags: dict[str, Any] = {"data": 15, "max_epochs": 2, "precision": precision}
    without = fit_monitored(None, module(), **flags)
    with_it = fit_monitored(AdamMonitor(1), module(), **flags)
    assert_same_parameters(without.module, with_it.module)


def test_the_first_step_and_every_nth_are_measured() -> None:
    cases = [(None, [0, 9, 19]), (1, [*range(25)]), (7, [0, 6, 13, 20]), (100, [0])]
    with each_row() as row:
        for every_n_steps, expected in cases:
            run = fit_monitored(AdamMonitor(every_n_steps, ["model", "group"]))
            with row(f"every_n_steps={every_n_steps}"):
                assert run.steps_of(KEY) == expected
                assert run.steps_of(scoped("group/no_decay")) == expected


def test_statistics_and_loss_have_the_same_x_values() -> None:
    run = fit_monitored(AdamMonitor(5), log_every_n_steps=5)
    assert run.steps_of("loss") == [4, 9, 14, 19, 24]
    assert set(run.steps_of("loss")) < set(run.steps_of(KEY))


def test_accumulation_counts_optimizer_steps() -> None:
    run = fit_monitored(AdamMonitor(2), data=12, accumulate_grad_batches=3)
    assert run.steps_of(KEY) == [0, 1, 3]


def test_log_every_n_steps_0_disables_the_monitor() -> None:
    assert fit_monitored(AdamMonitor(), data=3, log_every_n_steps=0).steps_of(KEY) == []


def test_headline_statistics_are_logged_for_the_model_by_default_and_for_groups_on_request() -> (
    None
):
    names = {statistic.name for statistic in select(["headline"])}
    names -= {"grad_norm_before_clip", "clip_coefficient"}
    undefined = {"decay_norm", "decay_to_update"}

    def keys(names: set[str], scope: str) -> set[str]:
        return {STATISTICS[name].key_of(scope) for name in names}

    def logged(**settings: Any) -> set[str]:
        rows = fit_monitored(AdamMonitor(10, **settings), data=10).logger.rows
        return {key for _, metrics in rows for key in metrics if key.startswith("adam_")}

    model = keys(names, "")
    assert logged() == model
    groups = keys(names, "group/decay/") | keys(names - undefined, "group/no_decay/")
    assert logged(scopes=["model", "group"]) == model | groups


def test_logged_values_match_the_reference() -> None:
    """The learning rate is constant, so that the optimizer keeps the settings of the last step."""
    logger = CSVLogger(".")
    flags: dict[str, Any] = {"data": 12, "logger": logger, "gradient_clip_val": 1e-3}
    fit = run_training(Lit(ADAMW), AdamMonitor(1), **flags).trainer
    expected = reference_statistics(reference_tensors(fit.optimizers[0]))
    assert expected["grad_norm"] == pytest.approx(1e-3, rel=1e-4), "the gradient is clipped"
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        last = [row for row in csv.DictReader(file) if row[KEY]][-1]
    before_clip = {"grad_norm_before_clip", "clip_coefficient"}
    for statistic in [each for each in select(["headline"]) if each.name not in before_clip]:
        key, value = statistic.key, expected[statistic.name]
        assert float(fit.callback_metrics[key]) == pytest.approx(value, rel=1e-5, abs=1e-7)
        assert float(last[key]) == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_checkpoints_can_monitor_a_statistic() -> None:
    checkpoint = ModelCheckpoint(".", monitor="adam_weight_decay/weight_norm")
    run_training(Lit(ADAMW), AdamMonitor(1), checkpoint, enable_checkpointing=True)
    assert checkpoint.best_model_score is not None


def test_every_logger_gets_the_statistics() -> None:
    recorders = [MemoryLogger(), MemoryLogger()]
    fit_monitored(AdamMonitor(), logger=recorders)
    assert recorders[0].steps_of(KEY) == recorders[1].steps_of(KEY) == [0, 9, 19]


def test_without_a_logger_it_warns_and_fills_callback_metrics() -> None:
    with pytest.warns(UserWarning, match="AdamMonitor has no logger"):
        run = run_training(Lit(ADAMW), AdamMonitor(1), data=3, logger=False)
    assert KEY in run.trainer.callback_metrics


@pytest.mark.parametrize(("statistics", "histograms"), [(3, 4), (4, 3)])
def test_everything_due_at_any_step_of_a_batch_is_logged(
    statistics: int, histograms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch takes the steps 3 and 4."""
    logged: list[int] = []
    monkeypatch.setattr(
        "lightning_adam.monitor.row_log.log_exponents",
        lambda logger, counts, step: logged.append(step),
    )
    monitor = AdamMonitor(statistics, histograms_every_n_steps=histograms)
    run = fit_monitored(monitor, TwoSteps(), data=2)
    # In manual optimization, Lightning's x-axis counts batches with a step.
    assert run.steps_of(KEY) == logged == [0, 1]


class RaisingClosure(Lit):
    """The closure of the second step raises, and training continues."""

    def __init__(self) -> None:
        super().__init__(ADAMW)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]

        def closure() -> None:
            self.manual_backward(loss_of(self.net, batch))
            if batch_idx == 1:
                raise ArithmeticError

        with suppress(ArithmeticError):
            optimizer.step(closure)  # type: ignore[union-attr]


def test_step_that_raised_is_not_measured_and_later_ones_are() -> None:
    run = fit_monitored(AdamMonitor(1), RaisingClosure(), data=4)
    assert run.steps_of(KEY) == [0, 2, 3]


def test_each_optimizer_has_its_own_keys() -> None:
    run = fit_monitored(AdamMonitor(1), TwoOptimizers(torch.optim.Adam), data=3)
    assert run.steps_of(scoped("optimizer/first")) == [0, 1, 2]
    assert run.steps_of(scoped("optimizer/second")) == [0, 1, 2]


def test_adam_beside_another_optimizer_is_measured() -> None:
    run = fit_monitored(AdamMonitor(1), TwoOptimizers(torch.optim.SGD), data=3)
    assert run.steps_of(scoped("optimizer/first")) == [0, 1, 2]
    assert run.steps_of(scoped("optimizer/second")) == []


def test_optimizer_without_moments_raises_before_training() -> None:
    class Sgd(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Sgd()
    before = parameters(module)
    with pytest.raises(ConfigError, match=r"trains with SGD\. Use torch\.optim\.Adam"):
        fit_monitored(AdamMonitor(), module)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(module), strict=True))


SCHEDULE = {"name": "cosine", "total_steps": 10, "warmup_steps": 3}
PLACES = [
    ("statistics.state_reader.StateReader.after_step", "for-loop", None),
    ("statistics.kernels.measure", "for-loop", SCHEDULE),
    ("statistics.kernels.measure", "fused", SCHEDULE),
    ("statistics.measurement.Measurement.values", "for-loop", SCHEDULE),
    ("statistics.measurement.Measurement.values", "fused", SCHEDULE),
    ("monitor.row_log.logging_step", "for-loop", SCHEDULE),
    ("monitor.session.log_every_n_steps", "for-loop", SCHEDULE),
    ("monitor.run_facts.optimizer_settings", "for-loop", SCHEDULE),
    # Only resolved if the device skips steps.
    ("monitor.tracked_optimizer.PendingStep.resolve_skipped", SELF_SCALING, SCHEDULE),
    # Without a schedule, for which the mixin has its own counter.
    ("optim.steps.StepCounter._enter", "fused", None),
    ("optim.steps.StepCounter._is_taken", "fused", None),
    ("optim.steps.StepCounter._is_taken", "for-loop", None),
    ("optim.steps.StepCounter.apply_device_skips", SELF_SCALING, None),
]
"""The function that fails, the implementation and the schedule."""


def fit_with_bad_batches(
    monitor: AdamMonitor | None, implementation: str, is_scheduled: bool
) -> TrainingRun:
    """A GradScaler skips three of ten steps."""
    module = BadBatches(implementation, SCHEDULE if is_scheduled else None, BAD_STEPS)
    return fit_with_scaler(module, monitor, log_every_n_steps=1)


@cache
def baseline_fit(implementation: str, is_scheduled: bool) -> TrainingRun:
    return fit_with_bad_batches(None, implementation, is_scheduled)


@pytest.mark.parametrize(("place", "implementation", "scheduler"), PLACES)
def test_failure_at_any_place_is_reported_once_and_changes_no_step(
    place: str, implementation: str, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planted")

    without = baseline_fit(implementation, scheduler is not None)
    monkeypatch.setattr(f"lightning_adam.{place}", planted)
    with warnings_of_monitor() as reports:
        with_error = fit_with_bad_batches(AdamMonitor(), implementation, scheduler is not None)
    assert len(reports) == 1
    assert "ZeroDivisionError: planted" in reports[0]
    assert not any(key.startswith("adam_") for _, row in with_error.logger.rows for key in row)
    assert_same_parameters(without.module, with_error.module)


def test_failure_does_not_stop_training_if_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("lightning_adam.statistics.state_reader.StateReader.after_step")
    without = fit_monitored(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdamMonitor failed")
        with_error = fit_monitored(AdamMonitor())
    assert_same_parameters(without.module, with_error.module)


def test_failure_leaves_the_hooks_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class CountSteps(L.Callback):
        steps = 0

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(self.count)

        def count(self, *hook_arguments: Any) -> None:
            self.steps += 1

    counting = CountSteps()
    monkeypatch.delattr("lightning_adam.statistics.state_reader.StateReader.after_step")
    with pytest.warns(UserWarning, match="AdamMonitor failed"):
        run_training(Lit(ADAMW), AdamMonitor(1), counting, data=4)
    assert counting.steps == 4


def test_wrapper_that_is_not_an_optimizer_warns_and_is_not_measured() -> None:
    class DeepSpeedZeroOptimizer:
        param_groups: ClassVar[list[dict[str, Any]]] = [{"params": [], "betas": (0.9, 0.999)}]

    trainer: Any = SimpleNamespace(
        optimizers=[DeepSpeedZeroOptimizer()], loggers=[], log_every_n_steps=1
    )
    monitor, module = AdamMonitor(), Lit(ADAMW)
    with warnings_of_monitor() as messages:
        monitor.on_fit_start(trainer, module)
        monitor.on_train_start(trainer, module)
        monitor.on_train_batch_end(trainer, module, None, None, 0)
        monitor.on_train_end(trainer, module)
    first, no_logger = messages
    assert first.startswith("AdamMonitor cannot measure DeepSpeedZeroOptimizer: it is not")
    assert "no logger" in no_logger


def test_flat_parameters_raise_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_adam.monitor.preconditions.is_flat_parameter", lambda parameter: True
    )
    with pytest.raises(ConfigError, match=r"Use FSDPStrategy\(use_orig_params=True\)"):
        fit_monitored(AdamMonitor())


def test_finished_run_leaves_no_hook_in_the_optimizer() -> None:
    (optimizer,) = run_training(Lit(ADAMW), AdamMonitor(1), data=2).trainer.optimizers
    (unmonitored,) = run_training(Lit(ADAMW), data=2).trainer.optimizers
    assert step_hooks(optimizer) == step_hooks(unmonitored)


def test_resumed_run_continues_counting_from_the_optimizer_state(tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")
    run_training(Lit(ADAMW), data=5).trainer.save_checkpoint(path)
    resumed = run_training(Lit(ADAMW), AdamMonitor(4), data=5, max_epochs=2, ckpt_path=path)
    assert resumed.steps_of(KEY) == [7], "optimizer step 8, not the first one after the resume"


def test_training_step_that_returns_none_is_not_measured() -> None:
    class Skipping(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    run = fit_monitored(AdamMonitor(1), Skipping(ADAMW), data=3)
    assert run.steps_of(KEY) == [0, 2]


def test_unnamed_groups_are_numbered() -> None:
    run = fit_monitored(AdamMonitor(1, ["group"]), PlainAdam(), data=2)
    assert run.steps_of(scoped("group/group_0")) == run.steps_of(scoped("group/group_1")) == [0, 1]
