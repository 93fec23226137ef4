"""The flight recorder in real training runs: its files, their steps, and internal errors."""

import math
import random
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from lightning_adam import AdamMonitor, ConfigError
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.monitor.failsafe import Failsafe
from lightning_adam.monitor.flight_recorder.event_files import MAX_FILES
from lightning_adam.monitor.flight_recorder.recorder import FlightRecorder
from lightning_adam.monitor.publishing import Publisher
from lightning_adam.optim.steps import StepCounter
from tests.support.commands import records
from tests.support.exploding import (
    Exploding,
    files_of,
    is_hyperparameter,
    logged_by,
    numbers,
    read,
    recorded,
    steps_of,
)
from tests.support.monitored import BadBatches, DelayedArrival, TwoOptimizers, TwoSteps
from tests.support.precision import precision_flags
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, parameters, run_training, trainer

AT = random.Random(20).randint(20, 40)
"""The step at which a fault occurs."""
SPIKE_AT = random.Random(20).randint(70, 90)
"""The step of a loss spike. The first 64 losses cannot be spikes."""


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the recorder has logged."""
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.monitor.flight_recorder.event_files.log_info", lines.append)
    return lines


@pytest.mark.parametrize(
    ("how", "layer"), [("nan in a gradient", "net.1"), ("inf in a weight", "net.3")]
)
def test_non_finite_values_are_recorded_with_the_steps_before_and_the_first_layer(
    how: str, layer: str, log_lines: list[str]
) -> None:
    recorder, folder = recorded(Exploding(AT, how), batches=AT + 5)
    (file,) = files_of(folder)
    assert file.name == f"step_{AT}_not_finite.csv"
    rows = read(file)
    assert steps_of(rows) == list(range(AT - 9, AT + 1))
    logged = logged_by(recorder)
    for step in range(AT - 9, AT + 1):
        of_step = [row for row in rows if row["optimizer_step"] == str(step)]
        assert [row["scope"] for row in of_step] == ["model", "layer", "layer", "layer"]
        assert {row["trainer/global_step"] for row in of_step} == {str(step - 1)}
        (loss,) = {row["loss"] for row in of_step}
        assert step != AT or float(loss) > 0, "the loss was still finite"
        written = {key: value for row in of_step for key, value in numbers(row).items()}
        written = {key: value for key, value in written.items() if not is_hyperparameter(key)}
        assert written == pytest.approx(logged[step - 1], rel=0, abs=0, nan_ok=True)
    assert log_lines == [
        f"AdamMonitor: not_finite at step {AT}; the last 10 steps are in {file}; layer {layer}"
        f" diverged first: nonfinite_count=1 at step {AT}; report: lightning-adam report {folder}"
    ]


def test_loss_spike_is_recorded(log_lines: list[str]) -> None:
    _, folder = recorded(Exploding(SPIKE_AT, "learning rate"), steps=20, batches=SPIKE_AT + 15)
    (file,) = files_of(folder)
    step = int(file.name.split("_")[1])
    assert file.name == f"step_{step}_loss_spike.csv"
    # The step after the one with the large learning rate.
    assert step == SPIKE_AT + 1
    rows = read(file)
    assert steps_of(rows) == list(range(step - 19, step + 1))
    losses = {int(row["optimizer_step"]): float(row["loss"]) for row in rows}
    after = [losses[each] for each in losses if each > SPIKE_AT]
    before = [losses[each] for each in losses if each <= SPIKE_AT]
    assert min(after) > max(before)


class Raising(Exploding):
    """An exception ends the run, at a place and a batch."""

    def __init__(self, place: str, exception: BaseException, at: int, how: str) -> None:
        super().__init__(at, how)
        self.place, self.exception = place, exception

    def reach(self, place: str, batch_idx: int) -> None:
        if (place, batch_idx) == (self.place, AT + 4):
            raise self.exception

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.reach("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.reach("between steps", batch_idx)

    def lr_scheduler_step(self, *arguments: Any) -> None:
        self.reach("after a step, in its batch", self.steps - 1)


@pytest.mark.parametrize(
    ("place", "exception"),
    [
        ("training_step", ZeroDivisionError("planted")),
        ("between steps", KeyboardInterrupt()),
        ("after a step, in its batch", ZeroDivisionError("planted")),
    ],
)
def test_exception_is_recorded_with_the_layer_that_moved_first(
    place: str, exception: BaseException, log_lines: list[str]
) -> None:
    module = Raising(place, exception, AT, "gradient")
    # Lightning turns KeyboardInterrupt into SystemExit.
    with pytest.raises((ZeroDivisionError, SystemExit)):
        recorded(module)
    last = AT + 5 if place == "after a step, in its batch" else AT + 4
    (file,) = files_of("recorded/version_0")
    assert file.name == f"step_{last}_exception.csv"
    rows = read(file)
    assert steps_of(rows) == list(range(last - 9, last + 1))
    assert (rows[-1]["loss"] == "") is (last == AT + 5), "the batch has not ended"
    (line,) = log_lines
    assert f"exception ({type(exception).__name__}) at step {last};" in line
    assert "; layer net.0 grew first: grad_rms=" in line
    assert f" times its median, at step {AT};" in line


def test_healthy_run_leaves_no_file() -> None:
    _, folder = recorded(Lit(ADAMW, {"name": "cosine"}), batches=120)
    assert files_of(folder) == []


def test_parameters_and_logged_metrics_are_unchanged() -> None:
    flags: Any = {"max_epochs": 2, "log_every_n_steps": 10, "gradient_clip_val": 0.5}

    def outcome(steps: int | None) -> tuple[list[Tensor], Any, Any]:
        monitor = AdamMonitor(7, histograms_every_n_steps=5, flight_recorder=steps)
        run = run_training(Exploding(30, "inf in a weight"), monitor, data=20, **flags)
        logged = [(step, sorted(row), *map(str, row.values())) for step, row in run.logger.rows]
        metrics = {key: str(value) for key, value in run.trainer.callback_metrics.items()}
        return [each.nan_to_num() for each in parameters(run.module)], logged, metrics

    (without, *logged), (with_it, *logged_with_it) = outcome(None), outcome(10)
    assert all(map(torch.equal, without, with_it))
    assert logged == logged_with_it
    assert [*Path("recorded").rglob("step_30_not_finite.csv")]


def test_recording_does_not_depend_on_logging() -> None:
    module = Exploding(12, "nan in a gradient")
    run = run_training(module, AdamMonitor(flight_recorder=5), data=20, log_every_n_steps=0)
    assert run.logger.rows == []
    assert run.logger.experiment.hparams == {}
    (file,) = files_of(run.logger.log_dir)
    assert steps_of(read(file)) == list(range(8, 13))


def test_loss_under_accumulation_is_the_mean_of_the_batches() -> None:
    losses: list[float] = []

    class Watched(Exploding):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss))
            return loss

    module = Watched(12, "inf in a weight")
    _, folder = recorded(module, batches=60, accumulate_grad_batches=4)
    (file,) = files_of(folder)
    rows = [row for row in read(file) if row["scope"] == "model"]
    assert [int(row["trainer/global_step"]) for row in rows] == list(range(2, 12))
    means = [sum(losses[4 * step : 4 * step + 4]) / 4 for step in range(2, 12)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-6)


class BreakingSecondOptimizer(TwoOptimizers):
    """Manual optimization; the gradient of the second optimizer is infinite at a step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        def broken(module: Any, of_inputs: Any, of_outputs: Any) -> Any:
            return tuple(each * math.inf for each in of_inputs)

        if batch_idx == 8:
            self.second[3].register_full_backward_hook(broken)
        super().training_step(batch, batch_idx)


def test_each_of_several_optimizers_has_its_rows(log_lines: list[str]) -> None:
    _, folder = recorded(BreakingSecondOptimizer(torch.optim.Adam), steps=5, batches=10)
    (file,) = files_of(folder)
    rows = read(file)
    assert file.name == "step_9_not_finite.csv"
    for name in ("first", "second"):
        own = [row for row in rows if row["optimizer"] == name]
        assert steps_of(own) == [5, 6, 7, 8, 9]
        assert {row["layer"].partition(".")[0] for row in own} == {"", name}
    assert {row["loss"] for row in rows} == {""}, "its training_step returns none"
    # The infinite gradient starts at the input of the last layer, and flows to the first layer.
    (line,) = log_lines
    assert "layer second.1 diverged first: nonfinite_count=" in line
    assert "at step 9 of second;" in line


def test_all_steps_of_a_batch_are_recorded() -> None:
    class Breaking(TwoSteps):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx)
            if batch_idx == 3:
                raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        recorded(Breaking(), batches=5)
    (file,) = files_of("recorded/version_0")
    rows = [row for row in read(file) if row["scope"] == "model"]
    assert [int(row["optimizer_step"]) for row in rows] == list(range(1, 9))
    assert [int(row["trainer/global_step"]) for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("implementation", ["fused", "for-loop"])
def test_skipped_steps_are_not_recorded(implementation: str) -> None:
    """Batches 4 and 5 have an infinite loss; only the first is an event."""
    module = BadBatches(implementation, bad_batches=(4, 5))
    flags = precision_flags("16-mixed")
    _, folder = recorded(module, batches=12, **flags)
    (file,) = files_of(folder)
    assert file.name == "step_4_not_finite.csv"
    assert steps_of(read(file)) == [1, 2, 3, 4]

    class Stopped(BadBatches):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 11:
                raise ZeroDivisionError("planted")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ZeroDivisionError, match="planted"):
        recorded(Stopped(implementation, bad_batches=(4, 5)), steps=3, batches=12, **flags)
    first, second = files_of("recorded/version_1")
    assert (first.name, second.name) == ("step_4_not_finite.csv", "step_9_exception.csv")
    rows = [row for row in read(second) if row["scope"] == "model"]
    assert [int(row["trainer/global_step"]) for row in rows] == [8, 9, 10]
    assert {row["skipped_steps"] for row in rows} == {"2.0"}


def test_steps_that_the_device_skips_are_not_numbered(
    tmp_path: Path,
) -> None:
    layer = nn.Linear(3, 1)
    adam = torch.optim.Adam(layer.parameters(), fused=True)
    fit, counter = trainer(default_root_dir=tmp_path), StepCounter(adam)
    recorder = FlightRecorder(MonitorConfig(flight_recorder=10), fit, Publisher(fit))
    recorder.track(adam, "", layer, counter)
    failsafe = Failsafe(lambda: None)
    failsafe.start()
    counter.attach(lambda: recorder.after_step("", failsafe))
    for is_skipped in (False, True, False, True, True, False):
        # A GradScaler passes its flag to a fused step in this way.
        adam.found_inf = torch.tensor(float(is_skipped))  # type: ignore[attr-defined]
        layer(torch.ones(3)).sum().backward()
        adam.step()
    assert counter.taken == 6, "the host has not asked the device yet"
    recorder.write_on_exception(ZeroDivisionError("planted"), 0.0)
    (file,) = files_of(tmp_path)
    assert file.name == "step_3_exception.csv"
    assert steps_of(read(file)) == [1, 2, 3]


@pytest.mark.parametrize("asked_for", [3, 1000])
def test_measurements_that_arrive_late_are_recorded_unchanged(
    asked_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightning_adam.monitor.flight_recorder.recorder.PendingMeasurement", DelayedArrival
    )
    monkeypatch.setattr(DelayedArrival, "asked_for", asked_for)
    _, folder = recorded(Exploding(12, "nan in a gradient"), batches=20)
    (file,) = files_of(folder)
    assert file.name == "step_12_not_finite.csv"
    assert steps_of(read(file)) == list(range(3, 13))


def test_resumed_run_is_recorded_from_its_first_step() -> None:
    first = run_training(Lit(ADAMW, {"name": "constant"}), AdamMonitor(flight_recorder=10), data=10)
    first.trainer.save_checkpoint("last.ckpt")
    resumed = run_training(
        Exploding(6, "nan in a gradient"),
        AdamMonitor(flight_recorder=10),
        data=10,
        ckpt_path="last.ckpt",
        max_epochs=2,
    )
    (file,) = files_of(resumed.logger.log_dir)
    assert file.name == "step_16_not_finite.csv"
    assert steps_of(read(file)) == [11, 12, 13, 14, 15, 16]


class Unsteady(Lit):
    """A weight is infinite at every n-th step, and is reset after it."""

    def __init__(self, every: int) -> None:
        super().__init__(ADAMW)
        self.every, self.steps = every, 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            next(self.net.parameters()).data[0, 0] = math.inf

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.steps % self.every == 0:
            with torch.no_grad():
                next(self.net.parameters())[0, 0] = 0.0


@pytest.mark.parametrize(("every", "files"), [(3, [3, 15, 27]), (10, [10, 20, 30])])
def test_events_within_recorded_steps_write_no_second_file(every: int, files: list[int]) -> None:
    _, folder = recorded(Unsteady(every), batches=36)
    assert [int(file.name.split("_")[1]) for file in files_of(folder)] == files


def test_number_of_files_is_limited_and_the_limit_is_logged_once(
    log_lines: list[str],
) -> None:
    _, folder = recorded(Unsteady(3), steps=3, batches=3 * MAX_FILES + 12)
    assert len(files_of(folder)) == MAX_FILES
    assert len(log_lines) == MAX_FILES + 1
    assert log_lines[-1].startswith(
        "AdamMonitor's flight recorder has reached its limit of 10 files per run."
    )


def test_file_is_among_those_of_the_wandb_run(tmp_path: Path) -> None:
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    folder = Path(logger.experiment.dir)
    recorded(Exploding(12, "inf in a weight"), batches=15, logger=logger)
    wandb.finish()
    (file,) = files_of(folder)
    assert file.name == "step_12_not_finite.csv"
    saved = [
        each["path"]
        for record in records(folder.parent)
        for each in record.get("files", {}).get("files", [])
    ]
    assert f"adam_flight_recorder/{file.name}" in saved, "`wandb sync` uploads it"


def test_file_without_a_logger_is_in_the_root_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    monitor = AdamMonitor(flight_recorder=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags: Any = {"logger": False, "default_root_dir": root}
        run_training(Exploding(12, "inf in a weight"), monitor, data=15, **flags)
    (file,) = files_of(root)
    assert file.name == "step_12_not_finite.csv"


def test_internal_error_is_reported_once_and_changes_no_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError("planted")

    def parameters_after(steps: int | None) -> list[Tensor]:
        module = Exploding(12, "inf in a weight")
        recorded(module, steps, batches=15)
        return [each.nan_to_num() for each in parameters(module)]

    baseline = parameters_after(None)
    with each_row() as row:
        for place in (
            "lightning_adam.statistics.metric.AdamStatistics.update",
            "lightning_adam.monitor.flight_recorder.recorder.logging_step",
            "lightning_adam.monitor.flight_recorder.event_files.write",
            "lightning_adam.monitor.flight_recorder.recorder.SpikeWindow.add",
        ):
            with row(place), monkeypatch.context() as patch:
                patch.setattr(place, fail)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    parameters_with_error = parameters_after(10)
                (report,) = [str(each.message) for each in caught if "AdamM" in str(each.message)]
                assert "OSError: planted" in report
                assert all(map(torch.equal, baseline, parameters_with_error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recording_on_cuda_does_not_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks all steps except the first, which compiles kernels, and those that write a file."""

    def without_sync(name: str) -> Callable[..., Any]:
        original = getattr(FlightRecorder, name)

        def checked(recorder: FlightRecorder, *arguments: Any) -> Any:
            is_checked = 1 < recorder.asked < 10  # type: ignore[attr-defined]
            torch.cuda.set_sync_debug_mode("error" if is_checked else "default")
            try:
                return original(recorder, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                recorder.asked += name == "after_batch"  # type: ignore[attr-defined]

        return checked

    monkeypatch.setattr(FlightRecorder, "asked", 0, raising=False)
    for name in ("after_step", "after_batch"):
        monkeypatch.setattr(FlightRecorder, name, without_sync(name))
    _, folder = recorded(Exploding(12, "nan in a gradient"), batches=20, accelerator="gpu")
    (file,) = files_of(folder)
    assert file.name == "step_12_not_finite.csv"
    assert steps_of(read(file)) == list(range(3, 13))
    assert all(row["loss"] for row in read(file))


def test_invalid_lengths_raise() -> None:
    steps: Any
    with each_row() as row:
        for steps in (0, -1, 2.5, "many"):
            message = f"^flight_recorder={steps!r} must be .* flight_recorder=200$"
            with row(steps), pytest.raises(ConfigError, match=message):
                AdamMonitor(flight_recorder=steps)


class Losses(Lit):
    """The losses are given by a list."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(ADAMW, {"name": "constant"})
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss - loss.detach() + self.losses[batch_idx]


@pytest.mark.parametrize(
    ("place", "deviations", "is_spike"), [(63, 7, False), (64, 7, True), (75, 5, False)]
)
def test_loss_above_six_deviations_is_a_spike_once_64_are_known(
    place: int, deviations: float, is_spike: bool
) -> None:
    losses = [1.0, 3.0] * 40
    before = losses[:place]
    losses[place] = statistics.fmean(before) + deviations * statistics.stdev(before)
    _, folder = recorded(Losses(losses), batches=len(losses))
    names = [file.name for file in files_of(folder)]
    assert names == ([f"step_{place + 1}_loss_spike.csv"] if is_spike else [])
