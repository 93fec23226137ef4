"""AdamMonitor in a real Trainer: when it measures, where it logs, and that it does no harm."""

import csv
import json
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor, ConfigError, __version__
from lightning_adam.statistics.catalogue import select
from tests.statistics.cases import reference_tensors
from tests.support.commands import offline_runs, records
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import KEY, TwoOptimizers, TwoSteps, fit_monitored
from tests.support.oracle import reference_statistics
from tests.support.training import ADAMW, Lit, loader, loss_of, parameters, trainer


@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}, {"fused": False}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_parameters_are_bit_identical_with_and_without_it(
    implementation: dict[str, bool], precision: Any
) -> None:
    def trained(monitor: AdamMonitor | None) -> list[Tensor]:
        module = Lit({**ADAMW, **implementation}, {"name": "cosine", "warmup_steps": 10})
        fit_monitored(monitor, batches=100, module=module, max_epochs=2, precision=precision)
        return parameters(module)

    without, with_it = trained(None), trained(AdamMonitor(every_n_steps=1))
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize(
    ("every_n_steps", "expected"),
    [(None, [0, 9, 19]), (1, list(range(25))), (7, [0, 6, 13, 20]), (100, [0])],
)
def test_it_measures_the_first_step_and_every_nth(
    every_n_steps: int | None, expected: list[int]
) -> None:
    _, recorder = fit_monitored(AdamMonitor(every_n_steps))
    assert recorder.steps_of(KEY) == expected
    assert recorder.steps_of(f"{KEY}/group/no_decay") == expected


def test_its_x_axis_is_that_of_the_loss() -> None:
    _, recorder = fit_monitored(AdamMonitor(5), log_every_n_steps=5)
    assert recorder.steps_of("loss") == [4, 9, 14, 19, 24]
    assert set(recorder.steps_of("loss")) < set(recorder.steps_of(KEY))


def test_under_accumulation_it_counts_optimizer_steps() -> None:
    _, recorder = fit_monitored(AdamMonitor(2), batches=12, accumulate_grad_batches=3)
    assert recorder.steps_of(KEY) == [0, 1, 3]


def test_log_every_n_steps_0_means_never() -> None:
    _, recorder = fit_monitored(AdamMonitor(), log_every_n_steps=0)
    assert recorder.steps_of(KEY) == []


def test_every_headline_statistic_is_logged_for_the_model_and_each_group() -> None:
    _, recorder = fit_monitored(AdamMonitor(10))
    logged = {key for _, metrics in recorder.rows for key in metrics if key.startswith("adam_")}
    model = {statistic.key for statistic in select(["headline"])}
    undefined = {"adam_weight_decay/decay_norm", "adam_weight_decay/decay_to_update"}
    expected = model | {f"{key}/group/decay" for key in model}
    assert logged == expected | {f"{key}/group/no_decay" for key in model - undefined}


def test_what_is_logged_is_what_the_reference_says_of_the_last_step() -> None:
    """The learning rate is constant, so that the optimizer still stands as the step left it."""
    module = Lit(ADAMW)
    logger = CSVLogger(".")
    fit = trainer(max_epochs=1, logger=logger, callbacks=[AdamMonitor(1)], gradient_clip_val=1e-3)
    fit.fit(module, loader(12))
    expected = reference_statistics(reference_tensors(fit.optimizers[0]))
    assert expected["grad_norm"] == pytest.approx(1e-3, rel=1e-4), "the gradient is the clipped one"
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        last = [row for row in csv.DictReader(file) if row[KEY]][-1]
    for statistic in select(["headline"]):
        key, value = statistic.key, expected[statistic.name]
        assert float(fit.callback_metrics[key]) == pytest.approx(value, rel=1e-5, abs=1e-7)
        assert float(last[key]) == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_checkpointing_can_watch_a_statistic() -> None:
    checkpoint = ModelCheckpoint(".", monitor="adam_weight_decay/weight_norm")
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1), checkpoint], enable_checkpointing=True)
    fit.fit(Lit(ADAMW), loader(5))
    assert checkpoint.best_model_score is not None


def test_every_logger_is_served() -> None:
    recorders = [MemoryLogger(), MemoryLogger()]
    fit_monitored(AdamMonitor(), logger=recorders)
    assert recorders[0].steps_of(KEY) == recorders[1].steps_of(KEY) == [0, 9, 19]


def test_no_logger_is_a_warning_and_the_numbers_are_in_callback_metrics() -> None:
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1)])
    with pytest.warns(UserWarning, match="AdamMonitor has no logger"):
        fit.fit(Lit(ADAMW), loader(3))
    assert KEY in fit.callback_metrics


def test_the_wandb_run_holds_rows_config_and_step_metric(tmp_path: Path) -> None:
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    fit_monitored(AdamMonitor(), logger=logger)
    wandb.finish()
    (offline_run,) = offline_runs(tmp_path)
    text = json.dumps(records(offline_run))
    globs = [each["metric"] for each in records(offline_run) if each["type"] == "metric"]
    ours = next(each for each in globs if each.get("glob_name") == "adam_*")
    assert ours["step_metric"] == "trainer/global_step"
    assert __version__ in text
    for recorded in ('"class": "AdamW"', '"total_steps": 25', '"no_decay"'):
        assert recorded in text


@pytest.mark.parametrize(("statistics", "histograms"), [(3, 4), (4, 3)])
def test_what_is_due_at_any_step_of_a_batch_is_logged(
    statistics: int, histograms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch takes the steps 3 and 4."""
    logged: list[int] = []
    monkeypatch.setattr(
        "lightning_adam.monitor.log_exponents", lambda logger, counts, step: logged.append(step)
    )
    monitor = AdamMonitor(statistics, histograms_every_n_steps=histograms)
    _, recorder = fit_monitored(monitor, module=TwoSteps(), batches=2)
    # In manual optimization Lightning's x-axis counts the batches that stepped.
    assert recorder.steps_of(KEY) == logged == [0, 1]


class Stumbling(Lit):
    """The closure of a step raises, and the loop goes on."""

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


def test_a_step_that_raised_is_not_measured_and_those_after_it_are() -> None:
    _, recorder = fit_monitored(AdamMonitor(1), module=Stumbling(), batches=4)
    assert recorder.steps_of(KEY) == [0, 2, 3]


def test_several_optimizers_have_keys_of_their_own() -> None:
    _, recorder = fit_monitored(AdamMonitor(1), module=TwoOptimizers(torch.optim.Adam), batches=3)
    assert recorder.steps_of(f"{KEY}/optimizer/first/group/group_0") == [0, 1, 2]
    assert recorder.steps_of(f"{KEY}/optimizer/second") == [0, 1, 2]


def test_beside_another_optimizer_the_adam_is_measured() -> None:
    _, recorder = fit_monitored(AdamMonitor(1), module=TwoOptimizers(torch.optim.SGD), batches=3)
    assert recorder.steps_of(f"{KEY}/optimizer/first") == [0, 1, 2]
    assert recorder.steps_of(f"{KEY}/optimizer/second") == []


def test_an_optimizer_without_moments_is_refused_before_training() -> None:
    class Plain(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    before = parameters(module)
    with pytest.raises(ConfigError, match=r"trains with SGD; train with torch\.optim\.Adam"):
        fit_monitored(AdamMonitor(), module=module)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(module), strict=True))


@pytest.mark.parametrize(
    "place",
    [
        "lightning_adam.statistics.views.Views.after_step",
        "lightning_adam.statistics.kernels.measure",
        "lightning_adam.statistics.measurement.Measurement.values",
        "lightning_adam.monitor.logging_step",
        "lightning_adam.monitor.log_every_n_steps",
        "lightning_adam.monitor.optimizer_settings",
    ],
)
def test_a_fault_inside_is_reported_once_and_training_ends_as_without_it(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planted")

    undisturbed, _ = fit_monitored(None)
    monkeypatch.setattr(place, planted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, recorder = fit_monitored(AdamMonitor())
    reports = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert len(reports) == 1
    assert "ZeroDivisionError: planted" in reports[0]
    assert recorder.steps_of(KEY) == []
    same = zip(parameters(undisturbed), parameters(module), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_fault_inside_stops_no_training_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("lightning_adam.statistics.views.Views.after_step")
    undisturbed, _ = fit_monitored(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdamMonitor has failed")
        module, _ = fit_monitored(AdamMonitor())
    same = zip(parameters(undisturbed), parameters(module), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_what_wraps_an_optimizer_and_is_none_is_said_and_not_measured() -> None:
    class DeepSpeedZeroOptimizer:
        param_groups: ClassVar[list[dict[str, Any]]] = [{"params": [], "betas": (0.9, 0.999)}]

    trainer: Any = SimpleNamespace(
        optimizers=[DeepSpeedZeroOptimizer()], loggers=[], log_every_n_steps=1
    )
    monitor, module = AdamMonitor(), Lit(ADAMW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.on_fit_start(trainer, module)
        monitor.on_train_start(trainer, module)
        monitor.on_train_batch_end(trainer, module, None, None, 0)
        monitor.on_train_end(trainer, module)
    first, no_logger = (str(each.message) for each in caught)
    assert first.startswith("AdamMonitor measures nothing of DeepSpeedZeroOptimizer, which is no")
    assert "no logger" in no_logger


def test_flat_parameters_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_adam.monitor.is_flattened", lambda parameter: True)
    with pytest.raises(ConfigError, match=r"use FSDPStrategy\(use_orig_params=True\)"):
        fit_monitored(AdamMonitor())


def test_a_fault_inside_leaves_the_hooks_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(L.Callback):
        steps = 0

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(self.count)

        def count(self, *hook_arguments: Any) -> None:
            self.steps += 1

    counting = Counting()
    monkeypatch.delattr("lightning_adam.statistics.views.Views.after_step")
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1), counting], logger=MemoryLogger())
    with pytest.warns(UserWarning, match="AdamMonitor has failed"):
        fit.fit(Lit(ADAMW), loader(4))
    assert counting.steps == 4


def test_after_training_nothing_is_left_in_the_optimizer() -> None:
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1)], logger=MemoryLogger())
    fit.fit(Lit(ADAMW), loader(2))
    assert not fit.optimizers[0]._optimizer_step_post_hooks
    assert not fit.optimizers[0]._optimizer_step_pre_hooks


def test_a_second_fit_is_measured_from_where_the_optimizer_is(tmp_path: Path) -> None:
    fit = trainer(max_epochs=1)
    fit.fit(Lit(ADAMW), loader(5))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    recorder = MemoryLogger()
    again = trainer(max_epochs=2, callbacks=[AdamMonitor(4)], logger=recorder)
    again.fit(Lit(ADAMW), loader(5), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    assert recorder.steps_of(KEY) == [7], "optimizer step 8, not the first one after the resume"


def test_compiled_modules_are_measured() -> None:
    module = Lit(ADAMW)
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    _, recorder = fit_monitored(AdamMonitor(1), module=module, batches=2)
    assert recorder.steps_of(KEY) == [0, 1]


def test_training_step_that_skips_is_not_measured() -> None:
    class Skipping(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    _, recorder = fit_monitored(AdamMonitor(1), module=Skipping(ADAMW), batches=3)
    assert recorder.steps_of(KEY) == [0, 2]


def test_bad_arguments_are_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match=r"adam_monitor\.every_n_steps=0"):
        AdamMonitor(every_n_steps=0)
    with pytest.raises(
        ConfigError, match=r"adam_monitor\.scopes=.*expected one of \[model, group, layer, tensor\]"
    ):
        AdamMonitor(scopes=["tensors"])


def test_a_model_scope_alone() -> None:
    _, recorder = fit_monitored(AdamMonitor(scopes=["model"]))
    assert recorder.steps_of(KEY)
    assert not recorder.steps_of(f"{KEY}/group/decay")


def test_a_plain_module_with_unnamed_groups() -> None:
    class Plain(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    _, recorder = fit_monitored(AdamMonitor(1), module=Plain(), batches=2)
    assert recorder.steps_of(f"{KEY}/group/group_0") == [0, 1]
