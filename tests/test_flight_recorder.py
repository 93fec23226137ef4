"""The flight recorder in real trainings: what it writes, of which steps, and that it is safe."""

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lightning_adam import AdamMonitor, ConfigError
from lightning_adam.flight_recorder.loss_spikes import LossSpikes
from lightning_adam.flight_recorder.recorder import MOST_FILES, FlightRecorder
from tests.support.commands import records
from tests.support.exploding import (
    Exploding,
    files_of,
    logged_by,
    numbers,
    read,
    recorded,
    steps_of,
)
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import TwoOptimizers, TwoSteps
from tests.support.training import ADAMW, Lit, loader, parameters, trainer
from tests.test_arriving import Late
from tests.test_precision import precision_flags
from tests.test_skipped_steps import Failing

AT = random.Random(20).randint(70, 90)
"""The step that goes wrong: after the warm-up of what judges the loss."""
Said = Callable[[], str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """The recorder's only line."""
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.flight_recorder.recorder.rank_zero_info", lines.append)

    def only() -> str:
        (line,) = lines
        return line

    return only


@pytest.mark.parametrize(
    ("how", "layer"), [("nan in a gradient", "net.1"), ("inf in a weight", "net.3")]
)
def test_what_is_not_finite_is_written_with_the_steps_before_and_the_layer_that_went_first(
    how: str, layer: str, said: Said
) -> None:
    recorder, folder = recorded(Exploding(AT, how))
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
        told = {key: value for row in of_step for key, value in numbers(row).items()}
        assert told == pytest.approx(logged[step - 1], rel=0, abs=0, nan_ok=True)
    assert said() == (
        f"AdamMonitor: not_finite at step {AT}; the last 10 steps are in {file}; layer {layer} went"
        f" first: nonfinite_count=1 at step {AT}; look: lightning-adam report {folder}"
    )


def test_a_loss_that_jumps_is_written(said: Said) -> None:
    _, folder = recorded(Exploding(AT, "learning rate"), steps=20, batches=AT + 15)
    (file,) = files_of(folder)
    step = int(file.name.split("_")[1])
    assert file.name == f"step_{step}_loss_spike.csv"
    assert AT < step <= AT + 7
    rows = read(file)
    assert steps_of(rows) == list(range(step - 19, step + 1))
    losses = {int(row["optimizer_step"]): float(row["loss"]) for row in rows}
    after = [losses[each] for each in losses if each > AT]
    before = [losses[each] for each in losses if each <= AT]
    assert min(after) > max(before)


class Raising(Exploding):
    """An exception ends it, at a place and a batch."""

    def __init__(self, place: str, exception: BaseException, at: int, how: str) -> None:
        super().__init__(at, how)
        self.place, self.exception = place, exception

    def come_by(self, place: str, batch_idx: int) -> None:
        if (place, batch_idx) == (self.place, AT + 4):
            raise self.exception

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.come_by("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.come_by("between steps", batch_idx)

    def lr_scheduler_step(self, *arguments: Any) -> None:
        self.come_by("after a step, in its batch", self.steps - 1)


@pytest.mark.parametrize("exception", [ZeroDivisionError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["training_step", "between steps", "after a step, in its batch"])
def test_an_exception_is_written_and_the_layer_that_moved_first(
    place: str, exception: BaseException, said: Said
) -> None:
    module = Raising(place, exception, AT, "gradient")
    # Lightning exits by itself after the keyboard's interrupt.
    with pytest.raises((ZeroDivisionError, SystemExit)):
        recorded(module)
    last = AT + 5 if place == "after a step, in its batch" else AT + 4
    (file,) = files_of("recorded/version_0")
    assert file.name == f"step_{last}_exception.csv"
    rows = read(file)
    assert steps_of(rows) == list(range(last - 9, last + 1))
    assert (rows[-1]["loss"] == "") is (last == AT + 5), "the batch has not ended"
    assert f"exception ({type(exception).__name__}) at step {last};" in said()
    assert "; layer net.0 moved first: grad_rms=" in said()
    assert f" times its median, at step {AT};" in said()


def test_of_a_healthy_training_nothing_is_written() -> None:
    _, folder = recorded(Lit(ADAMW, {"name": "cosine"}), batches=400)
    assert files_of(folder) == []


def test_nothing_else_is_changed() -> None:
    """Neither the parameters nor what is logged, nor when, nor what callbacks can watch."""

    def trained(steps: int | None) -> tuple[list[Tensor], Any, Any]:
        recorder = MemoryLogger()
        monitor = AdamMonitor(7, histograms_every_n_steps=5, flight_recorder=steps)
        flags = {"max_epochs": 2, "log_every_n_steps": 10, "gradient_clip_val": 0.5}
        fit = trainer(logger=recorder, callbacks=[monitor], **flags)
        module = Exploding(80, "inf in a weight")
        fit.fit(module, loader(50))
        logged = [(step, sorted(row), *map(str, row.values())) for step, row in recorder.rows]
        metrics = {key: str(value) for key, value in fit.callback_metrics.items()}
        return parameters(module), logged, metrics

    (without, *logged), (with_it, *logged_with_it) = trained(None), trained(10)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(without, with_it, strict=True)
    )
    assert logged == logged_with_it
    assert [*Path("recorded").rglob("step_80_not_finite.csv")]


def test_where_nothing_is_logged_it_records_all_the_same() -> None:
    recorder = MemoryLogger()
    monitor = AdamMonitor(flight_recorder=5)
    flags = {"max_epochs": 1, "log_every_n_steps": 0, "callbacks": [monitor]}
    trainer(logger=recorder, **flags).fit(Exploding(12, "nan in a gradient"), loader(20))
    assert recorder.rows == []
    assert recorder.experiment.hparams == {}
    (file,) = files_of(recorder.log_dir)
    assert steps_of(read(file)) == list(range(8, 13))


def test_under_accumulation_a_steps_loss_is_the_mean_of_its_batches() -> None:
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


class WithoutLosses(TwoOptimizers):
    """Manual optimization; the second optimizer's gradient breaks at a step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        def broken(module: Any, of_inputs: Any, of_outputs: Any) -> Any:
            return tuple(each * math.inf for each in of_inputs)

        if batch_idx == 8:
            hook = self.second[3].register_full_backward_hook(broken)
        super().training_step(batch, batch_idx)
        if batch_idx == 8:
            hook.remove()


def test_of_several_optimizers_each_has_its_rows(said: Said) -> None:
    _, folder = recorded(WithoutLosses(torch.optim.Adam), steps=5, batches=10)
    (file,) = files_of(folder)
    rows = read(file)
    assert file.name == "step_9_not_finite.csv"
    for name in ("first", "second"):
        own = [row for row in rows if row["optimizer"] == name]
        assert steps_of(own) == [5, 6, 7, 8, 9]
        assert {row["layer"].partition(".")[0] for row in own} == {"", name}
    assert {row["loss"] for row in rows} == {""}, "its training_step returns none"
    # The last layer's input has the first gradient that is not finite, and it flows to the first.
    assert "layer second.1 went first: nonfinite_count=" in said()
    assert "at step 9 of second;" in said()


def test_every_step_of_a_batch_is_there() -> None:
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
def test_steps_that_were_skipped_are_not_recorded(implementation: str) -> None:
    """The batches 4 and 5 have an infinite loss, at which the first is an event."""
    module = Failing(implementation, bad_batches=(4, 5))
    flags = precision_flags("16-mixed")
    _, folder = recorded(module, batches=12, **flags)
    (file,) = files_of(folder)
    assert file.name == "step_4_not_finite.csv"
    assert steps_of(read(file)) == [1, 2, 3, 4]

    class Stopped(Failing):
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


@pytest.mark.parametrize("asked_for", [1, 3, 1000])
def test_what_arrives_late_is_judged_late_and_written_as_it_was(
    asked_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_adam.flight_recorder.recorder.Arriving", Late)
    monkeypatch.setattr(Late, "asked_for", asked_for)
    _, folder = recorded(Exploding(12, "nan in a gradient"), batches=20)
    (file,) = files_of(folder)
    assert file.name == "step_12_not_finite.csv"
    assert steps_of(read(file)) == list(range(3, 13))


def test_a_resumed_training_is_recorded_from_where_it_goes_on(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer(
        max_epochs=1,
        enable_checkpointing=True,
        logger=CSVLogger("."),
        callbacks=[AdamMonitor(flight_recorder=10), keep],
    ).fit(Lit(ADAMW, {"name": "constant"}), loader(10))
    recorder = MemoryLogger()
    monitor = AdamMonitor(flight_recorder=10)
    trainer(max_epochs=2, logger=recorder, callbacks=[monitor]).fit(
        Exploding(6, "nan in a gradient"),
        loader(10),
        ckpt_path=str(tmp_path / "step=10.ckpt"),
        weights_only=False,
    )
    (file,) = files_of(recorder.log_dir)
    assert file.name == "step_16_not_finite.csv"
    assert steps_of(read(file)) == [11, 12, 13, 14, 15, 16]


class Unsteady(Lit):
    """The gradient of every n-th step is not finite, and the step does no harm."""

    def __init__(self, every: int) -> None:
        super().__init__(ADAMW)
        self.every, self.steps = every, 0
        self.whole: list[Tensor] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            next(self.net.parameters()).data[0, 0] = math.inf

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.steps % self.every == 0:
            with torch.no_grad():
                next(self.net.parameters())[0, 0] = 0.0


@pytest.mark.parametrize(("every", "files"), [(3, [3, 15, 27]), (10, [10, 20, 30])])
def test_within_the_steps_that_an_event_has_written_no_other_is(
    every: int, files: list[int]
) -> None:
    _, folder = recorded(Unsteady(every), batches=36)
    assert [int(file.name.split("_")[1]) for file in files_of(folder)] == files


def test_after_some_files_it_writes_no_more_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.flight_recorder.recorder.rank_zero_info", lines.append)
    _, folder = recorded(Unsteady(3), steps=3, batches=3 * MOST_FILES + 12)
    assert len(files_of(folder)) == MOST_FILES
    assert len(lines) == MOST_FILES + 1
    assert lines[-1].startswith("AdamMonitor's flight recorder has written 10 files, and writes no")


def test_a_run_of_wandb_has_the_file_among_its_own(tmp_path: Path) -> None:
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
    assert f"adam_flight_recorder/{file.name}" in saved, "`wandb sync` takes it along"


def test_without_a_logger_the_file_is_in_the_root_folder(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = trainer(
            max_epochs=1,
            default_root_dir=tmp_path / "root",
            callbacks=[AdamMonitor(flight_recorder=5)],
        )
        fit.fit(Exploding(12, "inf in a weight"), loader(15))
    (file,) = files_of(tmp_path / "root")
    assert file.name == "step_12_not_finite.csv"


@pytest.mark.parametrize(
    "place",
    [
        "lightning_adam.statistics.metric.AdamStatistics.update",
        "lightning_adam.flight_recorder.recorder.logging_step",
        "lightning_adam.flight_recorder.recorder.write",
        "lightning_adam.flight_recorder.recorder.LossSpikes.is_spike",
    ],
)
def test_a_fault_in_it_is_reported_once_and_training_ends_as_without_it(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*arguments: Any, **keywords: Any) -> None:
        raise OSError("planted")

    undisturbed, module = (Exploding(12, "inf in a weight") for _ in range(2))
    recorded(undisturbed, steps=None, batches=15)
    monkeypatch.setattr(place, planted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorded(module, batches=15)
    reports = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert len(reports) == 1
    assert "OSError: planted" in reports[0]
    same = zip(parameters(undisturbed), parameters(module), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in same)


def test_a_file_that_cannot_be_written_stops_no_training() -> None:
    Path("recorded/version_0").mkdir(parents=True)
    Path("recorded/version_0/adam_flight_recorder").touch()
    recorder = MemoryLogger()
    recorder._version = 0
    with pytest.warns(UserWarning, match="(?s)AdamMonitor has failed.*FileExistsError"):
        recorded(Exploding(12, "inf in a weight"), batches=15, logger=recorder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_step_is_recorded_without_waiting_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step but the first, at which kernels are compiled, and those that write."""

    def unhurried(name: str) -> Callable[..., Any]:
        original = getattr(FlightRecorder, name)

        def watched(recorder: FlightRecorder, *arguments: Any) -> Any:
            is_watched = 1 < recorder.asked < 10  # type: ignore[attr-defined]
            torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
            try:
                return original(recorder, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                recorder.asked += name == "after_batch"  # type: ignore[attr-defined]

        return watched

    monkeypatch.setattr(FlightRecorder, "asked", 0, raising=False)
    for name in ("after_step", "after_batch"):
        monkeypatch.setattr(FlightRecorder, name, unhurried(name))
    _, folder = recorded(Exploding(12, "nan in a gradient"), batches=20, accelerator="gpu")
    (file,) = files_of(folder)
    assert file.name == "step_12_not_finite.csv"
    assert steps_of(read(file)) == list(range(3, 13))
    assert all(row["loss"] for row in read(file))


@pytest.mark.parametrize("steps", [0, -1, 2.5, "many"])
def test_a_length_that_cannot_be_is_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match=r"adam_monitor\.flight_recorder=.*flight_recorder=200"):
        AdamMonitor(flight_recorder=steps)


# ---- What a jump of the loss is


def first_spike(losses: Tensor) -> int | None:
    spikes = LossSpikes()
    return next(
        (place for place, loss in enumerate(losses.tolist()) if spikes.is_spike(loss)), None
    )


def noises(steps: int) -> dict[str, Tensor]:
    """Noise with ever heavier tails, around a loss that falls."""
    torch.manual_seed(5)
    fall = 2 * torch.exp(-torch.arange(steps) / 300)
    return {
        "normal": fall + 0.1 * torch.randn(steps),
        "Student's t of 2": fall + 0.1 * torch.distributions.StudentT(2.0).sample((steps,)),
        "Cauchy": fall + 0.1 * torch.distributions.Cauchy(0.0, 1.0).sample((steps,)),
        "lognormal": fall * torch.exp(2 * torch.randn(steps)),
        "rare batches": fall + 5 * (torch.rand(steps) < 0.02),
        "a random walk": 5 + 0.01 * torch.randn(steps).cumsum(0) + 0.1 * torch.randn(steps),
        "constant": torch.ones(steps),
        "rising": torch.arange(steps) / 1000 + 0.01 * torch.randn(steps),
    }


@pytest.mark.parametrize("name", noises(2))
def test_no_noise_is_a_jump(name: str) -> None:
    assert first_spike(noises(5000)[name]) is None


@pytest.mark.parametrize("name", ["normal", "Student's t of 2", "constant"])
def test_a_jump_is_seen_within_seven_steps(name: str) -> None:
    losses = noises(2000)[name]
    losses[1500:] += 10
    found = first_spike(losses)
    assert found is not None
    assert 1503 <= found <= 1506
