"""Every precision, clipping, implementation and accumulation: what is trained and measured."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam import AdamMonitor, ConfigError
from tests.support.memory_logger import MemoryLogger
from tests.support.training import Lit, loader, loss_of, network, parameters, trainer

ADAMW = {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "decoupled_weight_decay": True}
FUSED = {**ADAMW, "fused": True}
COSINE = {"name": "cosine"}
BATCHES = 5
IMPLEMENTATIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 1.0},
    "value": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"},
}
GRADIENT_TOLERANCES = {
    # Sums of some dozens of products, each to a relative 6e-8.
    "32-true": 1e-5,
    # Operands of the matrix products have 8 bits.
    "bf16-mixed": 3e-2,
    # Operands of the matrix products have 11 bits.
    "16-mixed": 4e-3,
    # All that is computed, the batch too, has 8 bits.
    "bf16-true": 5e-2,
    # All that is computed, the batch too, has 11 bits.
    "16-true": 6e-3,
    # The reference's own precision; only the order of sums may differ.
    "64-true": 1e-12,
}
"""How far a gradient may be from the exact one, as a share of its largest element."""


def amp(init_scale: float = 2.0**10) -> MixedPrecision:
    """Real fp16 with a loss scale, for which Lightning would take bf16 on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=10**6)
    return MixedPrecision("16-mixed", "cpu", scaler)


def precision_flags(precision: str) -> dict[str, Any]:
    return {"plugins": [amp()]} if precision == "16-mixed" else {"precision": precision}


@dataclass
class Moments:
    """A parameter and its state, in float64."""

    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass
class Step:
    """What stood around one optimizer step, parameter by parameter in the module's order."""

    net: nn.Module
    before: list[Moments]
    after: list[Moments]
    grads: list[Tensor]
    groups: list[dict[str, Any]]


class Witness(L.Callback):
    """Keeps all of every step."""

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


def assert_it_is_adams_step(step: Step, number: int, dtype: torch.dtype) -> None:
    """AdamW in float64 from what stood before the step; what is stored is rounded to the dtype.

    An implementation may go on with a moment before or after it is rounded, so that the update is
    known as far as the moments are.
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


def trained(
    module: L.LightningModule, batches: int, *callbacks: L.Callback, **flags: Any
) -> MemoryLogger:
    recorder = MemoryLogger()
    settings = {"max_epochs": 1, "logger": recorder, "callbacks": list(callbacks), **flags}
    trainer(**settings).fit(module, loader(batches))
    return recorder


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("clipping", list(CLIPPING))
@pytest.mark.parametrize("precision", list(GRADIENT_TOLERANCES))
def test_what_is_measured_is_what_the_step_used_and_the_step_is_adams(
    precision: str, clipping: str, implementation: str, accumulation: int
) -> None:
    eps = 1e-4 if precision == "16-true" else 1e-8
    config = {**ADAMW, "eps": eps, **IMPLEMENTATIONS[implementation]}
    watched, unwatched, witness = Lit(config, COSINE), Lit(config, COSINE), Witness()
    scopes = ["model", "group", "layer", "tensor"]
    monitor = AdamMonitor(1, scopes, "all", histograms_every_n_steps=2)
    flags = {"accumulate_grad_batches": accumulation, **CLIPPING[clipping]}
    recorder = trained(watched, BATCHES, witness, monitor, **flags, **precision_flags(precision))
    trained(unwatched, BATCHES, **flags, **precision_flags(precision))
    same = zip(parameters(watched), parameters(unwatched), strict=True)
    assert all(torch.equal(a, b) for a, b in same)

    rows = [row for _, row in recorder.rows if "adam_moments/grad_norm" in row]
    batches, tolerance = list(loader(BATCHES)), GRADIENT_TOLERANCES[precision]
    assert len(rows) == len(witness.steps) == -(-BATCHES // accumulation)
    for index, (row, step) in enumerate(zip(rows, witness.steps, strict=True)):
        own = batches[index * accumulation : (index + 1) * accumulation]
        exact = clipped(exact_gradient(step.net, own, accumulation), clipping)
        for grad, expected in zip(step.grads, exact, strict=True):
            assert (grad - expected).abs().max() <= tolerance * largest(exact)
        norm, peak = row["adam_moments/grad_norm"], row["adam_moments/grad_max"]
        assert norm == pytest.approx(norm_of(exact), rel=tolerance)
        assert peak == pytest.approx(largest(exact), rel=tolerance)
        assert norm == pytest.approx(norm_of(step.grads), rel=1e-6)
        assert peak == pytest.approx(largest(step.grads), rel=1e-6)
        assert_it_is_adams_step(step, index + 1, next(watched.parameters()).dtype)


@pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
def test_an_eps_that_is_0_in_half_is_refused_before_the_first_step(implementation: str) -> None:
    module = Lit({**ADAMW, **IMPLEMENTATIONS[implementation]}, COSINE)
    before = parameters(module)
    with pytest.raises(ConfigError, match=r"optimizer\.eps=1e-08.*float16.*optimizer\.eps=0\.0001"):
        trainer(max_epochs=1, precision="16-true").fit(module, loader(2))
    same = zip(before, parameters(module), strict=True)
    assert all(torch.equal(a.to(b.dtype), b) for a, b in same)


class Plain(L.LightningModule):
    """Torch's own fused AdamW, without the mixin."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


class OwnClipping(Lit):
    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


class ClippingByHand(Lit):
    def __init__(self, *configs: Any) -> None:
        super().__init__(*configs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_alone_refuses_to_clip_for_a_fused_optimizer(precision: str) -> None:
    flags = {"gradient_clip_val": 0.01, **precision_flags(precision)}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(Plain(), 2, **flags)


@pytest.mark.parametrize(
    ("kind", "precision", "flags"),
    [
        (Lit, "bf16-mixed", {"gradient_clip_val": 0.01}),
        (Lit, "16-mixed", {"gradient_clip_val": 0.01}),
        (OwnClipping, "bf16-mixed", {}),
        (OwnClipping, "16-mixed", {}),
        (ClippingByHand, "bf16-mixed", {}),
    ],
)
def test_for_a_fused_optimizer_from_the_mixin_it_clips(
    kind: type[Lit], precision: str, flags: dict[str, Any]
) -> None:
    module, witness = kind(FUSED), Witness()
    flags = {**flags, **precision_flags(precision)}
    recorder = trained(module, 4, witness, AdamMonitor(1), **flags)
    measured = [row["adam_moments/grad_norm"] for _, row in recorder.rows]
    assert measured == pytest.approx([0.01] * 4, rel=1e-3)
    assert [norm_of(step.grads) for step in witness.steps] == pytest.approx(measured, rel=1e-6)
    assert all(group["fused"] for step in witness.steps for group in step.groups)
