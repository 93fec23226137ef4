"""Steps that were skipped, by a GradScaler or for want of a loss: as if they had not been."""

import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_adam import AdamMonitor
from tests.support.memory_logger import MemoryLogger
from tests.support.training import Lit, loader, parameters, trainer
from tests.test_precision import ADAMW, CLIPPING, IMPLEMENTATIONS, amp, precision_flags

COSINE = {"name": "cosine", "total_steps": 10, "warmup_steps": 3}
ATTEMPTS = 10
BAD = (0, 4, 5)
"""The attempts at a step that are skipped."""
STATISTICS = ["headline", "skipped_steps", "step"]
fused_or_not = pytest.mark.parametrize("implementation", ["fused", "for-loop"])


class Failing(Lit):
    """The loss of some batches is infinite, or there is none."""

    def __init__(
        self,
        implementation: str,
        scheduler: Any = None,
        bad_batches: Collection[int] = (),
        has_loss: bool = True,
    ) -> None:
        super().__init__({**ADAMW, **IMPLEMENTATIONS[implementation]}, scheduler)
        self.bad_batches = bad_batches
        self.has_loss = has_loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx not in self.bad_batches:
            return loss
        return loss * torch.inf if self.has_loss else None


def fit(
    module: L.LightningModule,
    monitor: AdamMonitor | None = None,
    batches: DataLoader[Any] | None = None,
    precision: str = "16-mixed",
    **flags: Any,
) -> MemoryLogger:
    recorder = MemoryLogger()
    trainer(
        max_epochs=1,
        logger=recorder,
        callbacks=[] if monitor is None else [monitor],
        **precision_flags(precision),
        **flags,
    ).fit(module, loader(ATTEMPTS) if batches is None else batches)
    return recorder


def loader_of(batches: list[Any]) -> DataLoader[Any]:
    """Lightning would take a list for several loaders."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def rows_of(recorder: MemoryLogger) -> list[tuple[int | None, dict[str, float]]]:
    return [(x, row) for x, row in recorder.rows if "adam_schedule/step" in row]


def counts_of(recorder: MemoryLogger) -> list[tuple[int | None, float, float]]:
    """Of each row the x-axis, the optimizer's step, and how many were skipped before it."""
    keys = ("adam_schedule/step", "adam_schedule/skipped_steps")
    return [(x, row[keys[0]], row[keys[1]]) for x, row in rows_of(recorder)]


def lrs_of(recorder: MemoryLogger) -> list[float]:
    return [row["adam_schedule/lr"] for _, row in rows_of(recorder)]


def counts(bad: Collection[int], every_n_steps: int) -> list[tuple[int, float, float]]:
    taken = [attempt for attempt in range(ATTEMPTS) if attempt not in bad]
    return [
        (attempt, step, attempt + 1 - step)
        for step, attempt in enumerate(taken, 1)
        if step == 1 or step % every_n_steps == 0
    ]


def are_equal(left: L.LightningModule, right: L.LightningModule) -> bool:
    return all(map(torch.equal, parameters(left), parameters(right)))


@pytest.mark.parametrize("has_loss", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", ["none", "norm"])
@fused_or_not
def test_training_goes_on_as_if_the_batches_had_been_left_out(
    implementation: str, clipping: str, accumulation: int, has_loss: bool
) -> None:
    """The loss scale is a power of two, and nothing gets so small that halving it would round."""
    flags = {"accumulate_grad_batches": accumulation, **CLIPPING[clipping]}
    batches = list(loader(ATTEMPTS * accumulation))
    of_bad = [index for index in range(len(batches)) if index // accumulation in BAD]
    failing = Failing(implementation, COSINE, of_bad, has_loss)
    fit(failing, AdamMonitor(2, statistics=STATISTICS), loader_of(batches), **flags)
    spared = Failing(implementation, COSINE)
    rest = [batch for index, batch in enumerate(batches) if index not in of_bad]
    fit(spared, None, loader_of(rest), **flags)
    assert are_equal(failing, spared)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", ["none", "norm"])
@fused_or_not
def test_the_steps_measured_are_the_optimizers_own(
    implementation: str, clipping: str, accumulation: int
) -> None:
    flags = {"accumulate_grad_batches": accumulation, **CLIPPING[clipping]}
    rates = lrs_of(fit(Lit(ADAMW, COSINE), AdamMonitor(1, statistics=STATISTICS)))
    for every_n_steps in (1, 2, 3):
        module = Failing(implementation, COSINE, [attempt * accumulation for attempt in BAD])
        monitor = AdamMonitor(every_n_steps, statistics=STATISTICS)
        recorder = fit(module, monitor, loader(ATTEMPTS * accumulation), **flags)
        expected = counts(BAD, every_n_steps)
        assert counts_of(recorder) == expected
        assert lrs_of(recorder) == [rates[int(step) - 1] for _, step, _ in expected]


@pytest.mark.parametrize("bad", [[0, 1, 2], [3], [1, 3, 5, 7, 9], [8, 9], [1, 2, 3, 4, 6, 7]])
@pytest.mark.parametrize("every_n_steps", [1, 2, 3, 4])
def test_a_step_that_the_device_skipped_is_not_counted_later(
    bad: list[int], every_n_steps: int
) -> None:
    """Without a schedule nobody asks the device between two measurements."""
    monitor = AdamMonitor(every_n_steps, statistics=STATISTICS)
    recorder = fit(Failing("fused", None, bad), monitor)
    assert counts_of(recorder) == counts(bad, every_n_steps)


@fused_or_not
def test_if_every_step_is_skipped_nothing_is_logged(implementation: str) -> None:
    module, monitor = Failing(implementation, COSINE, range(ATTEMPTS)), AdamMonitor(1)
    before = parameters(module)
    recorder = fit(module, monitor)
    assert [key for _, row in recorder.rows for key in row if key.startswith("adam_")] == []
    assert all(map(torch.equal, before, parameters(module)))


@pytest.mark.parametrize("every_n_steps", [1, 4])
@fused_or_not
def test_a_checkpoint_knows_of_the_last_batch_that_it_was_skipped(
    implementation: str, every_n_steps: int
) -> None:
    monitor = AdamMonitor(every_n_steps)
    fit(Failing(implementation, None, [0, 4, 8, 9]), monitor)
    assert monitor.state_dict()["steps"] == {"": [6, 4]}


@fused_or_not
def test_statistics_and_histograms_are_due_at_steps_of_their_own(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        "lightning_adam.monitor.log_exponents", lambda logger, counts, step: drawn.append(step)
    )
    monitor = AdamMonitor(3, statistics=STATISTICS, histograms_every_n_steps=2)
    recorder = fit(Failing(implementation, None, BAD), monitor)
    assert counts_of(recorder) == counts(BAD, 3)
    assert drawn == [x for x, _, _ in counts(BAD, 2)]


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_fused_and_not_log_the_same_rows(every_n_steps: int) -> None:
    def logged(implementation: str) -> list[tuple[int | None, dict[str, float]]]:
        monitor = AdamMonitor(every_n_steps, statistics=STATISTICS)
        return rows_of(fit(Failing(implementation, COSINE, BAD), monitor))

    fused, plain = logged("fused"), logged("for-loop")
    assert [x for x, _ in fused] == [x for x, _ in plain]
    for (_, one), (_, other) in zip(fused, plain, strict=True):
        # They round differently; the state that they have is of float32.
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("has_loss", [True, False])
@fused_or_not
def test_with_count_skipped_steps_the_schedule_goes_on_at_them(
    implementation: str, has_loss: bool
) -> None:
    def monitor() -> AdamMonitor:
        return AdamMonitor(1, statistics=STATISTICS)

    rates = lrs_of(fit(Lit(ADAMW, COSINE), monitor()))
    counting = {**COSINE, "count_skipped_steps": True}
    recorder = fit(Failing(implementation, counting, BAD, has_loss), monitor())
    expected = [rate for attempt, rate in enumerate(rates) if attempt not in BAD]
    assert lrs_of(recorder) == expected


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clipping", ["none", "norm"])
@fused_or_not
def test_a_training_step_that_returned_none_is_skipped_in_every_precision(
    implementation: str, clipping: str, precision: str
) -> None:
    rates = lrs_of(fit(Lit(ADAMW, COSINE), AdamMonitor(1, statistics=STATISTICS)))
    module = Failing(implementation, COSINE, BAD, has_loss=False)
    monitor = AdamMonitor(2, statistics=STATISTICS)
    recorder = fit(module, monitor, precision=precision, **CLIPPING[clipping])
    assert counts_of(recorder) == counts(BAD, 2)
    assert lrs_of(recorder) == [rates[int(step) - 1] for _, step, _ in counts(BAD, 2)]


@pytest.mark.parametrize(
    ("place", "implementation", "scheduler"),
    [
        ("lightning_adam.statistics.kernels.measure", "fused", COSINE),
        ("lightning_adam.statistics.kernels.measure", "for-loop", COSINE),
        ("lightning_adam.statistics.measurement.Measurement.values", "fused", COSINE),
        ("lightning_adam.statistics.measurement.Measurement.values", "for-loop", COSINE),
        # Only where the device skips is there anything to settle.
        ("lightning_adam.monitor.AdamMonitor._settled", "fused", COSINE),
        # The schedule's own counter is no part of the monitor.
        ("lightning_adam.steps.StepCounter._enter", "fused", None),
        ("lightning_adam.steps.StepCounter._is_taken", "fused", None),
        ("lightning_adam.steps.StepCounter._is_taken", "for-loop", None),
        ("lightning_adam.steps.StepCounter.learn", "fused", None),
    ],
)
def test_a_fault_in_the_monitor_is_reported_once_and_harms_no_training(
    place: str, implementation: str, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("planted")

    undisturbed, disturbed = (Failing(implementation, scheduler, BAD) for _ in range(2))
    fit(undisturbed)
    monkeypatch.setattr(place, planted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = fit(disturbed, AdamMonitor(1))
    reports = [str(each.message) for each in caught if "AdamMonitor" in str(each.message)]
    assert len(reports) == 1
    assert "ZeroDivisionError: planted" in reports[0]
    assert are_equal(undisturbed, disturbed)
    assert not any(key.startswith("adam_") for _, row in recorder.rows for key in row)


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the scalars that Python reads from tensors, which waits for a device, by batch."""

    def __init__(self, fitting: L.Trainer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fitting = fitting
        self.batches: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.batches[self.fitting.fit_loop.epoch_loop.batch_idx] += 1
        return func(*args, **(kwargs or {}))


def test_between_measurements_the_monitor_of_a_fused_step_does_not_wait_for_the_device() -> None:
    def host_reads(*callbacks: L.Callback) -> Counter[int]:
        fitting = trainer(max_epochs=1, callbacks=list(callbacks), plugins=[amp()])
        reads = HostReads(fitting)
        with reads:
            fitting.fit(Failing("fused"), loader(20))
        return reads.batches

    added = host_reads(AdamMonitor(5)) - host_reads()
    # After the last batch it is settled, whatever was measured.
    assert set(added) == {0, 4, 9, 14, 19}
