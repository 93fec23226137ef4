"""Steps that are skipped by a GradScaler or have no loss have no effect."""

from collections import Counter, defaultdict
from collections.abc import Collection
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_adam import AdamMonitor, build_adam
from tests.support.monitored import (
    ATTEMPTS,
    BAD_STEPS,
    BadBatches,
    fit_with_scaler,
    step_counts,
    steps_logged,
)
from tests.support.precision import CLIPPING, IMPLEMENTATIONS, amp
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    Lit,
    assert_same_parameters,
    loader,
    loss_of,
    network,
    parameters,
    run_training,
    trainer,
)

COSINE = {"name": "cosine", "total_steps": 10, "warmup_steps": 3}
STATISTICS = ["headline", "skipped_steps", "step"]
LR, STEP = "adam_schedule/lr", "adam_schedule/step"
fused_or_not = pytest.mark.parametrize("implementation", ["fused", "for-loop"])


def monitor(every_n_steps: int = 1, **settings: Any) -> AdamMonitor:
    return AdamMonitor(every_n_steps, statistics=STATISTICS, **settings)


def loader_of(batches: list[Any]) -> DataLoader[Any]:
    """Lightning would take a list for several loaders."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@cache
def uninterrupted_lrs() -> list[float]:
    """Returns the learning rates of a run in which no step is skipped."""
    return fit_with_scaler(Lit(ADAMW, COSINE), monitor()).values(LR)


@pytest.mark.parametrize("has_loss", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", ["none", "norm"])
@fused_or_not
def test_skipped_steps_train_like_a_run_without_their_batches(
    implementation: str, clipping: str, accumulation: int, has_loss: bool
) -> None:
    """The loss scale is a power of two, so scaling is exact for these values."""
    flags = {"accumulate_grad_batches": accumulation, **CLIPPING[clipping]}
    batches = list(loader(ATTEMPTS * accumulation))
    bad = [index for index in range(len(batches)) if index // accumulation in BAD_STEPS]
    module = BadBatches(implementation, COSINE, bad, has_loss)
    skipping = fit_with_scaler(module, monitor(2), loader_of(batches), **flags)
    rest = [batch for index, batch in enumerate(batches) if index not in bad]
    without = BadBatches(implementation, COSINE)
    baseline = fit_with_scaler(without, None, loader_of(rest), **flags)
    assert_same_parameters(skipping.module, baseline.module)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", ["none", "norm"])
@fused_or_not
def test_measured_steps_are_the_steps_the_optimizer_took(
    implementation: str, clipping: str, accumulation: int
) -> None:
    flags = {"accumulate_grad_batches": accumulation, **CLIPPING[clipping]}
    rates = uninterrupted_lrs()
    for every_n_steps in (1, 3):
        bad = [attempt * accumulation for attempt in BAD_STEPS]
        module = BadBatches(implementation, COSINE, bad)
        run = fit_with_scaler(module, monitor(every_n_steps), ATTEMPTS * accumulation, **flags)
        expected = step_counts(BAD_STEPS, every_n_steps)
        assert steps_logged(run) == expected
        assert run.values(LR) == [rates[int(step) - 1] for _, step, _ in expected]


@pytest.mark.parametrize(
    "bad", [[0, 1, 2], [3], [1, 3, 5, 7, 9], [8, 9], [1, 2, 3, 4, 6, 7]], ids=str
)
def test_fused_step_skipped_by_grad_scaler_is_not_measured(bad: list[int]) -> None:
    """Without a schedule, nothing synchronizes with the device between measurements."""
    with each_row() as row:
        for every_n_steps in (1, 2, 3, 4):
            run = fit_with_scaler(BadBatches("fused", None, bad), monitor(every_n_steps))
            with row(f"every_n_steps={every_n_steps}"):
                assert steps_logged(run) == step_counts(bad, every_n_steps)


@fused_or_not
def test_run_in_which_every_step_is_skipped_logs_nothing(implementation: str) -> None:
    module = BadBatches(implementation, COSINE, range(ATTEMPTS))
    before = parameters(module)
    run = fit_with_scaler(module, AdamMonitor(1))
    assert [key for _, row in run.logger.rows for key in row if key.startswith("adam_")] == []
    assert all(map(torch.equal, before, parameters(module)))


@pytest.mark.parametrize("every_n_steps", [1, 4])
@fused_or_not
def test_checkpoint_counts_a_skipped_last_step(implementation: str, every_n_steps: int) -> None:
    used = AdamMonitor(every_n_steps)
    fit_with_scaler(BadBatches(implementation, None, [0, 4, 8, 9]), used)
    assert used.state_dict()["steps"] == {"": [6, 4]}


class TwoStepsPerBatch(Lit):
    """Manual optimization. The loss of some steps is infinite."""

    def __init__(self, implementation: str, bad_steps: Collection[int]) -> None:
        super().__init__({**ADAMW, **IMPLEMENTATIONS[implementation]})
        self.automatic_optimization = False
        self.bad_steps = bad_steps

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for attempt in (2 * batch_idx, 2 * batch_idx + 1):
            optimizer.zero_grad()
            loss = loss_of(self.net, batch)
            self.manual_backward(loss * torch.inf if attempt in self.bad_steps else loss)
            optimizer.step()


@fused_or_not
def test_expected_step_that_is_never_taken_counts_as_skipped(implementation: str) -> None:
    """Also before a later step in the same batch."""
    used = monitor()
    module = TwoStepsPerBatch(implementation, BAD_STEPS)
    run = fit_with_scaler(module, used, ATTEMPTS // 2)
    assert used.state_dict()["steps"] == {"": [ATTEMPTS - len(BAD_STEPS), len(BAD_STEPS)]}
    # The batches 0, 1, 3 and 4 end with the steps 1, 3, 5 and 7. Both steps of batch 2 are skipped.
    assert [(step, skipped) for _, step, skipped in steps_logged(run)] == [
        (1, 1), (3, 1), (5, 3), (7, 3),
    ]  # fmt: skip


@fused_or_not
def test_statistics_and_histograms_are_due_at_separate_steps(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        "lightning_adam.monitor.row_log.log_exponents",
        lambda logger, counts, step: drawn.append(step),
    )
    module = BadBatches(implementation, None, BAD_STEPS)
    run = fit_with_scaler(module, monitor(3, histograms_every_n_steps=2))
    assert steps_logged(run) == step_counts(BAD_STEPS, 3)
    assert drawn == [x for x, _, _ in step_counts(BAD_STEPS, 2)]


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_fused_and_for_loop_log_the_same_rows(every_n_steps: int) -> None:
    def rows_of(implementation: str) -> list[tuple[int | None, dict[str, float]]]:
        module = BadBatches(implementation, COSINE, BAD_STEPS)
        run = fit_with_scaler(module, monitor(every_n_steps))
        return [(x, row) for x, row in run.logger.rows if STEP in row]

    fused, plain = rows_of("fused"), rows_of("for-loop")
    assert [x for x, _ in fused] == [x for x, _ in plain]
    for (_, one), (_, other) in zip(fused, plain, strict=True):
        # The implementations round differently in float32.
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("has_loss", [True, False])
@fused_or_not
def test_count_skipped_steps_advances_the_schedule_at_skipped_steps(
    implementation: str, has_loss: bool
) -> None:
    counting = {**COSINE, "count_skipped_steps": True}
    run = fit_with_scaler(BadBatches(implementation, counting, BAD_STEPS, has_loss), monitor())
    rates = enumerate(uninterrupted_lrs())
    assert run.values(LR) == [rate for attempt, rate in rates if attempt not in BAD_STEPS]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clipping", ["none", "norm"])
@fused_or_not
def test_training_step_that_returns_none_is_skipped_in_every_precision(
    implementation: str, clipping: str, precision: str
) -> None:
    module = BadBatches(implementation, COSINE, BAD_STEPS, has_loss=False)
    run = fit_with_scaler(module, monitor(2), precision=precision, **CLIPPING[clipping])
    rates, expected = uninterrupted_lrs(), step_counts(BAD_STEPS, 2)
    assert steps_logged(run) == expected
    assert run.values(LR) == [rates[int(step) - 1] for _, step, _ in expected]


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


def test_monitor_of_a_fused_step_waits_for_the_device_at_measurements_only() -> None:
    def host_reads(*callbacks: L.Callback) -> Counter[int]:
        fitting = trainer(max_epochs=1, callbacks=list(callbacks), plugins=[amp()])
        reads = HostReads(fitting)
        with reads:
            fitting.fit(BadBatches("fused"), loader(20))
        return reads.batches

    added = host_reads(AdamMonitor(5)) - host_reads()
    # After the last batch, skipped steps are counted even without a measurement.
    assert set(added) == {0, 4, 9, 14, 19}


class WithoutMixin(L.LightningModule):
    """Without the mixin. The loss of some batches is infinite, or None."""

    def __init__(self, implementation: str, bad_batches: Collection[int], has_loss: bool) -> None:
        super().__init__()
        self.config = {**ADAMW, **IMPLEMENTATIONS[implementation]}
        self.bad_batches = bad_batches
        self.has_loss = has_loss
        self.net = network()

    def configure_optimizers(self) -> Any:
        return build_adam(self, self.config, COSINE)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_of(self.net, batch)
        if batch_idx not in self.bad_batches:
            return loss
        return loss * torch.inf if self.has_loss else None


class TwoOptimizersWithoutMixin(WithoutMixin):
    """Two optimizers in manual optimization. Only the loss of the second one gets infinite."""

    def __init__(self, implementation: str, bad_batches: Collection[int], has_loss: bool) -> None:
        super().__init__(implementation, bad_batches, has_loss)
        self.automatic_optimization = False
        self.other = network()

    def configure_optimizers(self) -> Any:
        parts = (self.other, self.net)
        return [build_adam(part, self.config, COSINE, trainer=self.trainer) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        for optimizer, scheduler, net in zip(
            optimizers, schedulers, (self.other, self.net), strict=True
        ):
            optimizer.zero_grad()
            is_bad = net is self.net and batch_idx in self.bad_batches
            # A GradScaler raises an error without gradients.
            if self.has_loss or not is_bad:
                loss = loss_of(net, batch)
                self.manual_backward(loss * torch.inf if is_bad else loss)
                optimizer.step()
            scheduler.step()


class Rates(L.Callback):
    """Records the learning rates of the steps that were taken, by optimizer."""

    def __init__(self) -> None:
        self.used = defaultdict[int, list[float]](list)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            self.used[index].append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("has_loss", [True, False])
@pytest.mark.parametrize("kind", [WithoutMixin, TwoOptimizersWithoutMixin])
@fused_or_not
def test_optimizer_of_build_adam_skips_steps_like_the_mixin(
    implementation: str, kind: type[WithoutMixin], has_loss: bool
) -> None:
    rates = Rates()
    module = kind(implementation, BAD_STEPS, has_loss)
    run = run_training(module, rates, data=ATTEMPTS, plugins=[amp()])
    of_schedule = uninterrupted_lrs()
    taken = [attempt - sum(bad < attempt for bad in BAD_STEPS) for attempt in range(ATTEMPTS)]
    last = len(run.trainer.optimizers) - 1
    assert rates.used[last] == [of_schedule[step] for step in taken]
    if last:
        assert rates.used[0] == of_schedule
    steps = {float(each["step"]) for each in run.trainer.optimizers[last].state.values()}
    assert steps == {ATTEMPTS - len(BAD_STEPS)}
