"""Steps and logged values with each precision, clipping, implementation and accumulation."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_adam import AdamMonitor, ConfigError, build_adam
from tests.support.loops import MAX_NORM, Manual, OwnClipping
from tests.support.monitored import full_monitor
from tests.support.pairwise import pairwise
from tests.support.precision import CLIPPING, IMPLEMENTATIONS, amp, precision_flags
from tests.support.tables import each_row
from tests.support.training import (
    Lit,
    assert_same_parameters,
    loader,
    loss_of,
    network,
    parameters,
    run_training,
    trainer,
)

ADAMW = {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "decoupled_weight_decay": True}
FUSED = {**ADAMW, "fused": True}
COSINE = {"name": "cosine"}
BATCHES = 5
GRADIENT_TOLERANCES = {
    # Sums of some dozens of products, each to a relative 6e-8.
    "32-true": 1e-5,
    # Operands of the matrix products have 8 bits.
    "bf16-mixed": 3e-2,
    # Operands of the matrix products have 11 bits.
    "16-mixed": 4e-3,
    # Everything computed, and the batch, has 8 bits.
    "bf16-true": 5e-2,
    # Everything computed, and the batch, has 11 bits.
    "16-true": 6e-3,
    # The precision of the reference. Only the order of sums may differ.
    "64-true": 1e-12,
}
"""The largest error of a gradient, relative to the largest element of the exact one."""


@dataclass
class Moments:
    """A parameter and its state, in float64."""

    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class Step:
    """The values before and after an optimizer step, by parameter in the order of the module."""

    net: nn.Module
    before: list[Moments]
    after: list[Moments]
    grads: list[Tensor]
    groups: list[dict[str, Any]]


class StepSnapshots(L.Callback):
    """Keeps the values around every step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer, module = trainer.optimizers[0], pl_module
        optimizer.register_step_pre_hook(lambda *_: self.before(optimizer, module))
        optimizer.register_step_post_hook(lambda *_: self.after(optimizer, module))

    def before(self, optimizer: Optimizer, module: Any) -> None:
        net = deepcopy(module.net)
        self.steps.append(Step(net.double(), moments(optimizer, module), [], [], []))

    def after(self, optimizer: Optimizer, module: L.LightningModule) -> None:
        step = self.steps[-1]
        step.after = moments(optimizer, module)
        groups = [dict.fromkeys(group["params"], group) for group in optimizer.param_groups]
        for parameter in module.parameters():
            (group,) = (each[parameter] for each in groups if parameter in each)
            step.groups.append({**group, "params": None})
            assert parameter.grad is not None
            step.grads.append(parameter.grad.to(torch.float64, copy=True))


def moments(optimizer: Optimizer, module: nn.Module) -> list[Moments]:
    def copies(parameter: Tensor) -> Moments:
        state, zeros = optimizer.state.get(parameter, {}), torch.zeros_like(parameter)
        kept = (parameter, state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros))
        return Moments(*(each.detach().to(torch.float64, copy=True) for each in kept))

    return [copies(parameter) for parameter in module.parameters()]


def exact_gradient(net: nn.Module, batches: list[Any], accumulation: int) -> list[Tensor]:
    weights = list(net.parameters())
    losses = (loss_of(net, (inputs.double(), targets.double())) for inputs, targets in batches)
    grads = [torch.autograd.grad(loss / accumulation, weights) for loss in losses]
    return [torch.stack(each).sum(0) for each in zip(*grads, strict=True)]


def clipped(grads: list[Tensor], clipping: str) -> list[Tensor]:
    if clipping == "norm":
        factor = min(1.0, 1.0 / (norm_of(grads) + 1e-6))
        return [grad * factor for grad in grads]
    return [grad.clamp(-0.3, 0.3) for grad in grads] if clipping == "value" else grads


def norm_of(grads: list[Tensor]) -> float:
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


def largest(grads: list[Tensor]) -> float:
    return max(float(grad.abs().max()) for grad in grads)


def assert_is_adam_step(step: Step, number: int, dtype: torch.dtype) -> None:
    """Compares a step with AdamW in float64 from the values before it, rounded to the dtype.

    An implementation may use a moment before or after rounding it. The update is then known as
    precisely as the moments are.
    """
    info = torch.finfo(dtype)

    def rounding(size: Tensor) -> Tensor:
        return 2 * info.eps * size.clamp(min=info.smallest_normal)

    def update(group: dict[str, Any], first: Tensor, second: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        root = (second.clamp(min=0) / (1 - beta2**number)).sqrt()
        return group["lr"] * first / (1 - beta1**number) / (root + group["eps"])  # type: ignore[no-any-return]

    every = zip(step.before, step.after, step.grads, step.groups, strict=True)
    for before, after, grad, group in every:
        beta1, beta2 = group["betas"]
        kept, entered = beta1 * before.exp_avg, (1 - beta1) * grad
        first, first_error = kept + entered, rounding(kept.abs() + entered.abs())
        second = beta2 * before.exp_avg_sq + (1 - beta2) * grad**2
        second_error = rounding(second)
        assert (after.exp_avg - first).abs().le(first_error).all()
        assert (after.exp_avg_sq - second).abs().le(second_error).all()
        exact = update(group, first, second)
        furthest = update(group, first.abs() + first_error, second - second_error)
        error = furthest - exact.abs() + rounding(before.parameter.abs() + 2 * furthest)
        survival = 1 - group["lr"] * group["weight_decay"]
        assert (after.parameter - (survival * before.parameter - exact)).abs().le(error).all()


@pytest.mark.parametrize(
    ("precision", "clipping", "implementation", "accumulation"),
    pairwise(GRADIENT_TOLERANCES, CLIPPING, IMPLEMENTATIONS, (1, 3)),
)
def test_step_and_logged_gradient_match_adam_in_float64(
    precision: str, clipping: str, implementation: str, accumulation: int
) -> None:
    eps = 1e-4 if precision == "16-true" else 1e-8
    config = {**ADAMW, "eps": eps, **IMPLEMENTATIONS[implementation]}
    watched, unwatched, snapshots = Lit(config, COSINE), Lit(config, COSINE), StepSnapshots()
    flags = {"accumulate_grad_batches": accumulation, **CLIPPING[clipping]}
    run = run_training(
        watched, snapshots, full_monitor(), data=BATCHES, **flags, **precision_flags(precision)
    )
    run_training(unwatched, data=BATCHES, **flags, **precision_flags(precision))
    assert_same_parameters(watched, unwatched)

    rows = [row for _, row in run.logger.rows if "adam_gradient/grad_norm" in row]
    batches, tolerance = list(loader(BATCHES)), GRADIENT_TOLERANCES[precision]
    assert len(rows) == len(snapshots.steps) == -(-BATCHES // accumulation)
    for index, (row, step) in enumerate(zip(rows, snapshots.steps, strict=True)):
        own = batches[index * accumulation : (index + 1) * accumulation]
        exact = clipped(exact_gradient(step.net, own, accumulation), clipping)
        for grad, expected in zip(step.grads, exact, strict=True):
            assert (grad - expected).abs().max() <= tolerance * largest(exact)
        norm, peak = row["adam_gradient/grad_norm"], row["adam_gradient/grad_max"]
        assert norm == pytest.approx(norm_of(exact), rel=tolerance)
        assert peak == pytest.approx(largest(exact), rel=tolerance)
        assert norm == pytest.approx(norm_of(step.grads), rel=1e-6)
        assert peak == pytest.approx(largest(step.grads), rel=1e-6)
        assert_is_adam_step(step, index + 1, next(watched.parameters()).dtype)


def test_eps_that_is_0_in_float16_raises_before_the_first_step() -> None:
    with each_row() as row:
        for name, implementation in IMPLEMENTATIONS.items():
            module = Lit({**ADAMW, **implementation}, COSINE)
            before = parameters(module)
            sentence = r"^eps=1e-08 rounds to 0 in float16.*eps=0\.0001$"
            with row(name):
                with pytest.raises(ConfigError, match=sentence):
                    trainer(max_epochs=1, precision="16-true").fit(module, loader(2))
                same = zip(before, parameters(module), strict=True)
                assert all(torch.equal(a.to(b.dtype), b) for a, b in same)


class FusedWithoutMixin(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


class ManualClipping(Manual):
    def before_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, MAX_NORM, "norm")


class ManualUnusedHook(Manual, OwnClipping):
    """Lightning does not call the hook in manual optimization."""


class ManualUsedHook(ManualUnusedHook):
    def before_step(self, optimizer: Any) -> None:
        self.configure_gradient_clipping(optimizer)


class ManualScaledClipping(ManualUnusedHook):
    """Clips the gradients as they are after the backward pass: scaled."""

    def before_step(self, optimizer: Any) -> None:
        plugin: Any = self.trainer.precision_plugin
        nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM * plugin.scaler.get_scale())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_alone_raises_when_clipping_for_a_fused_optimizer(precision: str) -> None:
    flags = {"gradient_clip_val": MAX_NORM, **precision_flags(precision)}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        run_training(FusedWithoutMixin(), data=2, **flags)


@pytest.mark.parametrize(
    ("kind", "precision", "flags"),
    [
        (Lit, "bf16-mixed", {"gradient_clip_val": MAX_NORM}),
        (Lit, "16-mixed", {"gradient_clip_val": MAX_NORM}),
        (OwnClipping, "bf16-mixed", {}),
        (OwnClipping, "16-mixed", {}),
        (ManualClipping, "bf16-mixed", {}),
        (ManualScaledClipping, "16-mixed", {}),
    ],
)
def test_gradients_of_a_fused_optimizer_from_the_mixin_are_clipped(
    kind: type[Lit], precision: str, flags: dict[str, Any]
) -> None:
    module, snapshots = kind(FUSED), StepSnapshots()
    flags = {**flags, **precision_flags(precision)}
    run = run_training(module, snapshots, AdamMonitor(1), data=4, **flags)
    measured = run.values("adam_gradient/grad_norm")
    assert measured == pytest.approx([MAX_NORM] * 4, rel=1e-3)
    assert [norm_of(step.grads) for step in snapshots.steps] == pytest.approx(measured, rel=1e-6)
    assert all(group["fused"] for step in snapshots.steps for group in step.groups)


class ClippingInHook(Lit):
    """Clips as in Lightning's documentation."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)


class ManualClippingInHook(Manual):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)


class WithoutMixin(FusedWithoutMixin):
    """Builds the optimizer without the mixin."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.config = optimizer

    def configure_optimizers(self) -> Any:
        return build_adam(self, self.config)


class WithoutMixinClippingInHook(WithoutMixin):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, MAX_NORM, "norm")


class ManualTwoClipped(Manual):
    """Two optimizers, each clipped to its own norm."""

    def configure_optimizers(self) -> Any:
        parts = (self.net[:2], self.net[2:])
        return [build_adam(part, FUSED, trainer=self.trainer) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for each in optimizers:
            each.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        for each in optimizers:
            self.clip_gradients(each, MAX_NORM, "norm")
            each.step()


class Norms(L.Callback):
    """Records the norm of the gradients in hooks and in the steps."""

    def __init__(self) -> None:
        self.seen = list[float]()
        self.used = list[float]()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(
                lambda optimizer, *_: self.used.append(self.norm(optimizer))
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self.seen.append(self.norm(optimizer))

    def norm(self, optimizer: Optimizer) -> float:
        owned = [each for group in optimizer.param_groups for each in group["params"]]
        return norm_of([each.grad for each in owned if each.grad is not None])


UNSCALED: list[tuple[type[Any], bool, dict[str, Any]]] = [
    (Lit, False, {}),
    (Lit, False, {"accumulate_grad_batches": 2}),
    (Lit, True, {"gradient_clip_val": MAX_NORM}),
    (OwnClipping, True, {}),
    (ClippingInHook, True, {}),
    (ClippingInHook, True, {"accumulate_grad_batches": 2}),
    (WithoutMixin, False, {}),
    (WithoutMixin, True, {"gradient_clip_val": MAX_NORM}),
    (WithoutMixinClippingInHook, True, {}),
    (Manual, False, {}),
    (ManualUnusedHook, False, {}),
    (ManualClipping, True, {}),
    (ManualUsedHook, True, {}),
    (ManualClippingInHook, True, {}),
    (ManualTwoClipped, True, {}),
]
"""A module, whether it clips, and the trainer's flags."""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hooks_see_and_clip_the_same_gradients_with_a_grad_scaler_as_without(
    implementation: str,
) -> None:
    config = {**ADAMW, **IMPLEMENTATIONS[implementation]}
    with each_row() as row:
        for kind, clips, flags in UNSCALED:
            with row((kind.__name__, flags)):
                scaled, exact = Norms(), Norms()
                run_training(kind(config), scaled, data=4, plugins=[amp()], **flags)
                run_training(kind(config), exact, data=4, **flags)
                # Operands of the matrix products have 11 bits.
                assert scaled.seen == pytest.approx(exact.seen, rel=1e-2)
                assert scaled.used == pytest.approx(exact.used, rel=1e-2)
                assert (
                    scaled.used == pytest.approx([MAX_NORM] * len(scaled.used), rel=1e-3)
                ) == clips
                assert len(scaled.used) == len(exact.used) > 1


class Infinite(ManualClipping):
    """Batch 1 has an infinite loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        inputs, targets = batch
        super().training_step((inputs, targets * (torch.inf if batch_idx == 1 else 1)), batch_idx)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clipped_infinite_gradients_are_skipped(implementation: str) -> None:
    module, norms = Infinite({**ADAMW, **IMPLEMENTATIONS[implementation]}), Norms()
    without = ManualClipping({**ADAMW, **IMPLEMENTATIONS[implementation]})
    batches = list(loader(3))
    run = run_training(module, norms, data=3, plugins=[amp()])
    rest: DataLoader[Any] = DataLoader([batches[0], batches[2]], batch_size=None)  # type: ignore[arg-type]
    run_training(without, data=rest, plugins=[amp()])
    assert_same_parameters(module, without)
    assert run.trainer.precision_plugin.scaler.get_scale() == 2.0**9  # type: ignore[attr-defined]
