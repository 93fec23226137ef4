"""SharpnessMonitor: its value against the dense Hessian, and training that it does not change."""

import math
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import MeanMetric

from lightning_adam import AdamMixin, AdamMonitor, ConfigError, SharpnessMonitor
from tests.support.loops import LINEAR, baseline_fit, compiled_whole
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import TwoOptimizers, step_hooks
from tests.support.reported import Build, Built
from tests.support.tables import each_row
from tests.support.training import (
    ADAMW,
    Lit,
    TrainingRun,
    assert_same_parameters,
    loader,
    loss_of,
    run_training,
)

KEY = "adam_sharpness/preconditioned"
LINE = "adam_sharpness/stability_line"
EXACT: dict[str, Any] = {"iterations": 60, "tolerance": 1e-6}


def batch() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
    return inputs, inputs[:, :1].sin()


def loss(module: L.LightningModule, batch: Any) -> Tensor:
    return loss_of(module.net, batch)  # type: ignore[arg-type]


def exact_sharpness(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, of: Sequence[Tensor]
) -> float:
    """Evaluates the definition in float64: a dense Hessian, and numpy's eigenvalues."""
    net: Any = module.net
    names = {id(each): name for name, each in net.named_parameters()}
    everything = {name: each.detach().double() for name, each in net.named_parameters()}
    inputs, targets = (each.double() for each in of)
    stepped = [
        (names[id(each)], group, optimizer.state[each])
        for group in optimizer.param_groups
        for each in group["params"]
        if each in optimizer.state
    ]
    shapes = [everything[name].shape for name, _, _ in stepped]

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        parts = torch.split(at, [shape.numel() for shape in shapes])
        rows = zip(stepped, parts, shapes, strict=True)
        replaced = {name: part.view(shape) for (name, _, _), part, shape in rows}
        outputs = functional_call(net, {**everything, **replaced}, inputs)
        return torch.autograd.grad(nn.functional.mse_loss(outputs, targets), at)[0]

    # Central differences, for torch.func.hessian is wrong for a LayerNorm in torch 2.13.
    here = torch.cat([everything[name].flatten() for name, _, _ in stepped])
    nudges = 1e-5 * torch.eye(len(here), dtype=torch.float64)
    rows = [(gradient(here + nudge) - gradient(here - nudge)) / 2e-5 for nudge in nudges]
    matrix = torch.stack(rows).numpy()
    scale, decay = [], []
    for _, group, state in stepped:
        (beta1, beta2), t = group["betas"], float(state["step"])
        moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double().flatten()
        root = np.sqrt(moment.numpy() / (1 - beta2**t))
        edge = (2 + 2 * beta1) / ((1 - beta1) * group["lr"])
        scale.append(1 / (edge * (1 - beta1**t) * (root + group["eps"])))
        is_coupled = not group.get("decoupled_weight_decay")
        decay.append(np.full(root.shape, group["weight_decay"] if is_coupled else 0.0))
    sign = -1 if stepped[0][1]["maximize"] else 1
    product = np.concatenate(scale)[:, None] * (sign * matrix + np.diag(np.concatenate(decay)))
    return float(np.linalg.eigvals(product).real.max())


def two_groups(net: nn.Sequential) -> torch.optim.Optimizer:
    first: dict[str, Any] = {"params": net[0].parameters(), "lr": 3e-2, "betas": (0.5, 0.9)}
    second: dict[str, Any] = {"params": net[1:].parameters(), "eps": 1e-2, "weight_decay": 0.1}
    return torch.optim.Adam([first, second], lr=1e-3)


def half_frozen(net: nn.Sequential) -> torch.optim.Optimizer:
    net[0].weight.requires_grad_(False)
    return torch.optim.Adam(net.parameters(), lr=1e-2)


def fit(module: L.LightningModule, monitor: L.Callback | None, **flags: Any) -> TrainingRun:
    return run_training(module, monitor, **{"log_every_n_steps": 1, **flags})


@contextmanager
def warned() -> Iterator[list[str]]:
    """Collects the monitor's warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(each.message) for each in caught if "SharpnessMonitor" in str(each.message)]


def sharpness_of(run: TrainingRun) -> float:
    """The last value logged."""
    return float(run.trainer.callback_metrics[KEY])


def assert_exact(run: TrainingRun, of: Sequence[Tensor], rel: float = 1e-3) -> None:
    expected = exact_sharpness(run.module, run.trainer.optimizers[0], of)
    assert abs(expected) > 1e-3
    assert sharpness_of(run) == pytest.approx(expected, rel=rel)


BUILDS: dict[str, Build] = {
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2),
    "amsgrad": lambda net: torch.optim.Adam(net.parameters(), betas=(0.0, 0.5), amsgrad=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1.0),
    "coupled decay": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1.0),
    "maximize": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2, maximize=True),
    "two groups": two_groups,
    "half frozen": half_frozen,
}


@pytest.mark.parametrize("name", BUILDS)
def test_sharpness_is_the_largest_eigenvalue_of_the_dense_hessian(name: str) -> None:
    run = fit(Built(BUILDS[name]), SharpnessMonitor(2, batch=batch(), **EXACT))
    assert run.steps_of(KEY) == [0, 1, 3, 5]
    assert_exact(run, batch())


def test_loss_of_the_user_and_optimizer_of_the_mixin_are_measured() -> None:
    assert_exact(fit(Lit(ADAMW), SharpnessMonitor(6, batch=batch(), loss=loss, **EXACT)), batch())


def test_default_iterations_and_tolerance_are_accurate_to_one_percent() -> None:
    run = fit(Built(BUILDS["Adam"]), SharpnessMonitor(1, batch=batch()), data=20)
    assert_exact(run, batch(), rel=1e-2)


def test_first_batch_is_held() -> None:
    run = fit(Built(BUILDS["Adam"]), SharpnessMonitor(6, **EXACT))
    assert_exact(run, next(iter(loader(6))))


def test_learning_rate_is_the_one_the_step_used() -> None:
    """When the batch ends, the schedule has gone on to 0."""
    module = Lit(ADAMW, {"name": "linear"})
    run = fit(module, SharpnessMonitor(6, batch=batch(), **EXACT))
    for group in run.trainer.optimizers[0].param_groups:
        assert group["lr"] == 0
        group["lr"] = ADAMW["lr"] / 6
    assert_exact(run, batch())


@pytest.mark.parametrize(("precision", "rel"), [("bf16-true", 2e-2), ("64-true", 1e-6)])
def test_sharpness_is_computed_in_single_precision_or_higher(precision: Any, rel: float) -> None:
    run = fit(Lit(ADAMW), SharpnessMonitor(6, batch=batch(), **EXACT), precision=precision)
    dtype = run.trainer.optimizers[0].param_groups[0]["params"][0].dtype
    assert dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    of = [each.bfloat16() if dtype == torch.bfloat16 else each for each in batch()]
    assert_exact(run, of, rel)


def test_optimizer_steps_are_counted_under_accumulation() -> None:
    run = fit(Lit(ADAMW), SharpnessMonitor(2), data=12, accumulate_grad_batches=3)
    assert run.steps_of(KEY) == [0, 1, 3]


def test_x_axis_is_that_of_the_loss() -> None:
    run = fit(Lit(ADAMW), SharpnessMonitor(5), data=10, log_every_n_steps=5)
    assert run.steps_of("loss") == [4, 9]
    assert run.steps_of(KEY) == run.steps_of(LINE) == [0, 4, 9]


def test_counting_continues_after_a_resume() -> None:
    first = run_training(Lit(ADAMW), data=5)
    first.trainer.save_checkpoint("last.ckpt")
    run = fit(Lit(ADAMW), SharpnessMonitor(4), data=5, ckpt_path="last.ckpt", max_epochs=2)
    assert run.steps_of(KEY) == [7]


def test_both_monitors_measure_side_by_side() -> None:
    run = run_training(Lit(ADAMW), AdamMonitor(2), SharpnessMonitor(2), data=4)
    assert run.steps_of(KEY) == run.steps_of("adam_update/update_norm") == [0, 1, 3]


class Careless(AdamMixin, L.LightningModule):
    """All that an evaluation of its loss could change, or leave behind."""

    def __init__(self) -> None:
        super().__init__(optimizer=ADAMW, scheduler={"name": "cosine"})
        torch.manual_seed(1)
        self.first = nn.Linear(6, 16)
        self.net = nn.Sequential(
            self.first, nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1)
        )
        self.slow = nn.Linear(6, 1)
        self.slow.requires_grad_(False)
        self.mean = MeanMetric()
        self.noise = torch.Generator().manual_seed(7)
        self.losses: list[Tensor] = []
        self.drawn: list[tuple[float, float, float, float]] = []
        self.gradients: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        inputs, targets = batch
        noise = torch.randn(inputs.shape, generator=self.noise)
        loss = nn.functional.mse_loss(self.net(inputs + 0.1 * noise), targets)
        self.mean(loss.detach())
        self.losses.append(loss)
        self.drawn.append(
            (random.random(), float(np.random.rand()), float(torch.rand(1)), float(batch_idx))
        )
        with torch.no_grad():
            self.slow.weight.mul_(0.9).add_(0.1 * self.first.weight.mean(0, keepdim=True))
            inputs.mul_(2)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({"noise": noise.std()})
        if self.logger is not None:
            self.logger.log_metrics({"by hand": float(loss)}, step=batch_idx)
        self.trainer.strict_step = len(self.losses)  # type: ignore[attr-defined]
        return {"loss": loss, "inputs": inputs}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients += [
            each.grad.clone() for each in self.net.parameters() if each.grad is not None
        ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_training_is_the_same_without_the_monitor(precision: Any) -> None:
    def run_careless(monitor: L.Callback | None) -> tuple[Careless, TrainingRun]:
        L.seed_everything(3, verbose=False)
        module = Careless()
        flags = {"precision": precision, "max_epochs": 2, "accumulate_grad_batches": 2}
        return module, fit(module, monitor, **flags)

    plain, run = run_careless(None)
    monitored, run_monitored = run_careless(SharpnessMonitor(1))
    assert len(run_monitored.steps_of(KEY)) == 6
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, monitored.state_dict()[name]), name
    for ours, theirs in zip(monitored.gradients, plain.gradients, strict=True):
        assert torch.equal(ours, theirs)
    for one, other in zip(monitored.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
    assert torch.equal(torch.stack(plain.losses), torch.stack(monitored.losses))
    assert plain.drawn == monitored.drawn
    assert torch.equal(plain.noise.get_state(), monitored.noise.get_state())
    assert run_monitored.trainer.strict_step == run.trainer.strict_step  # type: ignore[attr-defined]
    metrics = {key: float(each) for key, each in run_monitored.trainer.callback_metrics.items()}
    assert metrics.pop(LINE) == 1.0
    assert metrics.pop(KEY) > 0
    assert metrics == {key: float(each) for key, each in run.trainer.callback_metrics.items()}
    assert [row for row in run_monitored.logger.rows if KEY not in row[1]] == run.logger.rows


def test_random_numbers_continue_after_a_fault() -> None:
    class Drawing(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)))
            if not isinstance(self.trainer.logger, MemoryLogger):
                raise ZeroDivisionError("planted")
            draws.append(drawn)
            return super().training_step(batch, batch_idx)

    draws: list[tuple[float, ...]] = []
    for monitor in (None, SharpnessMonitor(1)):
        L.seed_everything(3, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(Drawing(ADAMW), monitor, data=4)
    assert draws[:4] == draws[4:]


@pytest.mark.parametrize(
    "place",
    [
        *("copied_batch", "stability_of", "evaluated", "largest_eigenvalue"),
        *("logging_step", "StepCounter"),
    ],
)
@pytest.mark.parametrize("are_errors", [False, True], ids=["warnings", "errors"])
def test_fault_inside_is_reported_once_and_training_continues(
    place: str, are_errors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("planted")

    # It trains as that loop does.
    without = baseline_fit("plain")
    monkeypatch.setattr(f"lightning_adam.monitor.sharpness.callback.{place}", planted)
    with warned() as messages:
        if are_errors:
            warnings.filterwarnings("error", message="SharpnessMonitor")
        run = fit(Lit(ADAMW, LINEAR), SharpnessMonitor(2))
    if not are_errors:
        (report,) = messages
        assert "ZeroDivisionError: planted" in report
    assert run.steps_of(KEY) == []
    assert_same_parameters(without.module, run.module)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        doubled: Tensor = 2 * gradient * inputs
        return doubled


def test_loss_without_a_second_derivative_is_reported_without_traceback() -> None:
    class OnceDifferentiable(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            squares: Tensor = Once.apply(self.net(batch[0]))  # type: ignore[no-untyped-call]
            return squares.square().mean()

    with warned() as messages:
        run = fit(OnceDifferentiable(ADAMW), SharpnessMonitor(1))
    (report,) = messages
    assert "Traceback" not in report
    assert "once_differentiable" in report
    assert "Use SharpnessMonitor(loss=...)" in report
    assert run.steps_of(KEY) == []


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(6, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        packed = self.packed(inputs.view(1, 1, *inputs.shape)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(*packed)
        return mixed[0, 0, :, :1]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(6, 4, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cells(inputs[None])[0][0, :, :1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Attending, Recurrent])
def test_kernels_without_a_second_derivative_are_avoided(kind: type[nn.Module]) -> None:
    module = Lit(ADAMW)
    module.net = kind()  # type: ignore[assignment]
    assert fit(module, SharpnessMonitor(1), data=2).steps_of(KEY) == [0, 1]


def partly_compiled(optimizer: Any) -> L.LightningModule:
    module = Lit(optimizer)
    # What this backend compiles has no second derivative.
    module.net = torch.compile(module.net, backend="aot_eager")  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    "build", [pytest.param(partly_compiled, marks=pytest.mark.slow), compiled_whole]
)
def test_compiled_modules_are_measured(build: Callable[[Any], L.LightningModule]) -> None:
    values = []
    for module in (build(ADAMW), Lit(ADAMW)):
        run = fit(module, SharpnessMonitor(2, batch=batch(), **EXACT), data=2)
        assert run.steps_of(KEY) == [0, 1]
        values.append(sharpness_of(run))
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_module_that_cannot_be_copied_is_reported_without_traceback() -> None:
    module = Lit(ADAMW)
    module.lock = threading.Lock()  # type: ignore[assignment]
    with warned() as messages:
        fit(module, SharpnessMonitor(1))
    (report,) = messages
    assert "cannot copy the module: TypeError: cannot pickle" in report
    assert "Traceback" not in report


def test_parameters_without_influence_on_the_loss_are_flat() -> None:
    class Wasteful(Lit):
        def __init__(self) -> None:
            super().__init__(ADAMW)
            self.head, self.shift = nn.Linear(6, 1), nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            extra = self.head(batch[0]).square().mean() if batch_idx else 0.0
            return loss_of(self.net, batch) + extra + self.shift.sum()

    run = fit(Wasteful(), SharpnessMonitor(1, batch=batch()), data=3)
    assert run.steps_of(KEY) == [0, 1, 2]


def test_batch_without_loss_is_not_measured() -> None:
    class SkippingSecond(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    assert fit(SkippingSecond(ADAMW), SharpnessMonitor(1), data=3).steps_of(KEY) == [0, 2]


def test_nan_is_logged() -> None:
    class Diverging(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.nan

    with warned() as messages:
        run = fit(Diverging(ADAMW), SharpnessMonitor(1), data=2)
    assert run.steps_of(KEY) == [0, 1]
    assert math.isnan(sharpness_of(run))
    assert not messages


def test_several_optimizers_have_separate_keys() -> None:
    def both(module: L.LightningModule, batch: Any) -> Tensor:
        return loss_of(module.first, batch) + loss_of(module.second, batch)  # type: ignore[arg-type]

    without = fit(TwoOptimizers(torch.optim.Adam), None, data=2)
    run = fit(TwoOptimizers(torch.optim.Adam), SharpnessMonitor(2, loss=both), data=2)
    assert_same_parameters(without.module, run.module)
    assert run.steps_of(f"{KEY}/optimizer/first") == [0, 1]
    assert run.steps_of(f"{KEY}/optimizer/second") == [0, 1]
    assert run.steps_of(LINE) == [0, 1]


def test_only_the_adam_of_two_optimizers_is_measured() -> None:
    def first(module: L.LightningModule, batch: Any) -> Tensor:
        return loss_of(module.first, batch)  # type: ignore[arg-type]

    run = fit(TwoOptimizers(torch.optim.SGD), SharpnessMonitor(1, loss=first), data=2)
    assert run.steps_of(f"{KEY}/optimizer/first") == [0, 1]
    assert run.steps_of(f"{KEY}/optimizer/second") == []


def test_hooks_are_removed_after_training_and_the_monitor_can_be_used_again() -> None:
    monitor = SharpnessMonitor(1)
    run = fit(Lit(ADAMW), monitor, data=2)
    (unmonitored,) = fit(Lit(ADAMW), None, data=2).trainer.optimizers
    assert step_hooks(run.trainer.optimizers[0]) == step_hooks(unmonitored)
    assert fit(Lit(ADAMW), monitor, data=2).steps_of(KEY) == [0, 1]


def mixed(net: nn.Sequential) -> torch.optim.Optimizer:
    first: dict[str, Any] = {"params": net[0].parameters(), "maximize": True}
    return torch.optim.Adam([first, {"params": net[3].parameters()}])


UNSUITABLE: list[tuple[L.LightningModule, str]] = [
    (
        Built(lambda net: torch.optim.SGD(net.parameters(), lr=0.1)),
        r"needs torch\.optim\.Adam or AdamW\. The model trains with SGD\. Use",
    ),
    (
        Built(lambda net: torch.optim.NAdam(net.parameters(), lr=0.1)),
        r"The model trains with NAdam",
    ),
    (TwoOptimizers(torch.optim.Adam), r"Use SharpnessMonitor\(loss=lambda module"),
    (Built(mixed), r"some groups of Adam minimize and others maximize"),
]
"""Modules, and the error when training starts."""

INVALID: list[tuple[dict[str, Any], str]] = [
    (
        {"every_n_steps": 0},
        r"^every_n_steps=0 must be an integer, at least 1\. Use .* every_n_steps=50$",
    ),
    ({"iterations": 1.5}, r"^iterations=1\.5 must be .* iterations=20$"),
    (
        {"tolerance": 1.0},
        r"^tolerance=1\.0 must be a number in \[0, 1\)\. .* tolerance=0\.001$",
    ),
    (
        {"loss": 3},
        r"^loss=3 must be a function of the module and a batch\. Use .* loss=lambda module, batch",
    ),
]
"""Arguments, and their error."""


def test_models_that_cannot_be_measured_raise_before_training() -> None:
    with each_row() as row:
        for module, sentence in UNSUITABLE:
            with row(sentence), pytest.raises(ConfigError, match=sentence):
                fit(module, SharpnessMonitor())


def test_sharded_parameters_raise_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_adam.monitor.sharpness.callback.is_sharded", lambda optimizer: True
    )
    with pytest.raises(ConfigError, match=r"they are sharded\. Use DDPStrategy"):
        fit(Lit(ADAMW), SharpnessMonitor())


def test_invalid_arguments_raise() -> None:
    with each_row() as row:
        for arguments, sentence in INVALID:
            with row(arguments), pytest.raises(ConfigError, match=sentence):
                SharpnessMonitor(**arguments)


def test_without_logger_it_warns_and_values_are_in_callback_metrics() -> None:
    with pytest.warns(UserWarning, match="SharpnessMonitor has no logger"):
        run = fit(Lit(ADAMW), SharpnessMonitor(1), logger=False)
    assert {KEY, LINE} <= set(run.trainer.callback_metrics)
