"""Clipping, loss scaling, wrapped optimizers and CUDA graphs."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_adam import AdamMonitor
from lightning_adam._compat.torch import loss_scale
from lightning_adam.statistics.metric import AdamStatistics
from tests.support.loops import MAX_NORM, ManualTwoSteps, OwnClipping
from tests.support.monitored import KEY, BadBatches, fit_monitored
from tests.support.training import ADAMW, Lit, TrainingRun, assert_same_parameters, run_training

BEFORE_CLIP = "adam_gradient/grad_norm_before_clip"
COEFFICIENT = "adam_gradient/clip_coefficient"
LOSS_SCALE = "adam_gradient/loss_scale"


def keeping_norms(kind: type[Lit]) -> tuple[Lit, list[float]]:
    """Returns a module and the list of its gradient norms before clipping."""
    norms: list[float] = []

    class KeepsNorms(kind):  # type: ignore[valid-type, misc]
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            grads = [each.grad for each in self.parameters() if each.grad is not None]
            norms.append(torch.cat([grad.flatten().double() for grad in grads]).norm().item())

    return KeepsNorms(ADAMW), norms


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (Lit, {"gradient_clip_val": MAX_NORM}),
        (Lit, {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}),
        (OwnClipping, {}),
    ],
)
def test_norm_before_clipping_and_coefficient_are_those_of_each_due_step(
    kind: type[Lit], flags: dict[str, Any]
) -> None:
    module, norms = keeping_norms(kind)
    run = run_training(module, AdamMonitor(3), data=9, **flags)
    assert run.steps_of(BEFORE_CLIP) == run.steps_of(COEFFICIENT) == [0, 2, 5, 8]
    expected = [norms[step] for step in (0, 2, 5, 8)]
    assert run.values(BEFORE_CLIP) == pytest.approx(expected, rel=1e-6)
    clipped = run.values("adam_gradient/grad_norm")
    assert max(clipped) < min(expected)
    coefficients = [after / before for after, before in zip(clipped, expected, strict=True)]
    assert run.values(COEFFICIENT) == pytest.approx(coefficients, rel=1e-6)


def test_norm_before_clipping_is_absent_if_the_trainer_does_not_clip() -> None:
    flags: dict[str, Any] = {"gradient_clip_val": None}
    for module in (Lit(ADAMW), ManualTwoSteps(ADAMW)):
        run = run_training(module, AdamMonitor(1), data=2, **flags)
        assert run.steps_of(KEY)
        assert run.steps_of(BEFORE_CLIP) == []


def test_gradients_are_read_before_clipping_at_due_steps_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    before_clip = AdamStatistics.before_clip

    def counted(statistics: AdamStatistics, optimizer: Any) -> None:
        calls.append(1)
        before_clip(statistics, optimizer)

    monkeypatch.setattr(AdamStatistics, "before_clip", counted)
    run_training(Lit(ADAMW), AdamMonitor(10), data=20, gradient_clip_val=1.0)
    assert len(calls) == 3


def test_clipping_is_bit_identical_with_and_without_the_monitor() -> None:
    def module(monitor: AdamMonitor | None) -> Any:
        return run_training(Lit(ADAMW), monitor, data=9, gradient_clip_val=MAX_NORM).module

    assert_same_parameters(module(None), module(AdamMonitor(1)))


def fit_scaled(monitor: AdamMonitor, **flags: Any) -> TrainingRun:
    """Skips two of ten steps. The scale is halved after each, and doubled every third step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    module = BadBatches("for-loop", bad_batches=(1, 5))
    return run_training(module, monitor, data=10, plugins=plugins, **flags)


def test_loss_scale_is_that_of_the_measured_step() -> None:
    run = fit_scaled(AdamMonitor(1, statistics=["loss_scale", "step"]))
    assert run.steps_of(LOSS_SCALE) == [0, 2, 3, 4, 6, 7, 8, 9]
    assert run.values(LOSS_SCALE) == [8.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 8.0]


def test_norm_before_clipping_is_unscaled_and_that_of_the_step_that_was_taken() -> None:
    """The first attempt at the second step has an infinite gradient, and is skipped."""
    run = fit_scaled(AdamMonitor(1), gradient_clip_val=MAX_NORM)
    norms = run.values(BEFORE_CLIP)
    assert len(norms) == 8
    assert all(math.isfinite(norm) for norm in norms)
    scaled = run.values("adam_gradient/grad_norm")
    assert scaled == pytest.approx([MAX_NORM] * 8, rel=1e-3)
    plain = run_training(Lit(ADAMW), AdamMonitor(1), data=10, gradient_clip_val=MAX_NORM)
    assert norms[0] == pytest.approx(plain.values(BEFORE_CLIP)[0], rel=1e-2)


def test_run_without_a_scaler_has_no_loss_scale() -> None:
    run = run_training(Lit(ADAMW), AdamMonitor(1, statistics="all"), data=2)
    assert run.steps_of(KEY)
    assert run.steps_of(LOSS_SCALE) == []


def test_scale_of_a_scaler_is_copied() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert loss_scale(None) is None
    assert loss_scale(scaler) is None, "it was not used yet"
    scaler.scale(torch.ones(1))
    scale = loss_scale(scaler)
    scaler.update(4.0)
    assert scale is not None
    assert float(scale) == 8.0


wraps = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="Lightning 2.6 does not accept its own wrapper from configure_optimizers there",
)


class Wrapped(Lit):
    """`configure_optimizers` returns an optimizer in Lightning's wrapper."""

    def configure_optimizers(self) -> Any:
        return LightningOptimizer(torch.optim.AdamW(self.parameters(), lr=1e-2))


@wraps
def test_wrapped_optimizer_is_measured_like_a_plain_one() -> None:
    class Plain(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    wrapped, plain = (
        run_training(kind(), AdamMonitor(1), data=4, gradient_clip_val=MAX_NORM)
        for kind in (Wrapped, Plain)
    )
    assert_same_parameters(wrapped.module, plain.module)
    assert len(wrapped.values(BEFORE_CLIP)) == 4
    ours = [[row for _, row in run.logger.rows if KEY in row] for run in (wrapped, plain)]
    assert ours[0] == ours[1]


@wraps
def test_skipped_step_of_a_wrapped_optimizer_is_counted() -> None:
    class Skipping(Wrapped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    run = run_training(Skipping(), AdamMonitor(1, statistics="skipped_steps"), data=3)
    assert run.values("adam_schedule/skipped_steps") == [0, 1]


@pytest.mark.parametrize("flight_recorder", [None, 3])
def test_step_in_a_cuda_graph_capture_is_measured_at_the_next_step_outside(
    flight_recorder: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Capturing(Lit):
        is_capturing = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            type(self).is_capturing = 4 <= batch_idx < 6
            return super().training_step(batch, batch_idx)

    measured: list[bool] = []
    update: Callable[..., None] = AdamStatistics.update

    def counted(*arguments: Any, **keywords: Any) -> None:
        measured.append(Capturing.is_capturing)
        update(*arguments, **keywords)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Capturing.is_capturing)
    monkeypatch.setattr(AdamStatistics, "update", counted)
    monitor = AdamMonitor(5, flight_recorder=flight_recorder)
    run = fit_monitored(monitor, Capturing(ADAMW), data=12, gradient_clip_val=1.0)
    # The fifth step is captured, and the sixth too.
    assert run.steps_of(KEY) == run.steps_of(BEFORE_CLIP) == [0, 6, 9]
    assert measured
    assert not any(measured)
