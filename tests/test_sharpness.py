"""SharpnessMonitor: its number against the dense Hessian, and training as if it were not there."""

import csv
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics import MeanMetric

from lightning_adam import AdamMixin, AdamMonitor, ConfigError, SharpnessMonitor
from tests.ranks import rank_trainings
from tests.support.commands import history, offline_runs
from tests.support.loops import (
    Loop,
    Skipping,
    Timed,
    baseline_fit,
    compiled_whole,
    each_loop,
    run_loop,
)
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import TwoOptimizers
from tests.support.ranks import launch
from tests.support.training import (
    ADAMW,
    Lit,
    assert_same_parameters,
    loader,
    loss_of,
    parameters,
    trainer,
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
    """The definition, written down in float64: a dense Hessian, and numpy's eigenvalues."""
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


class Own(Lit):
    """Plain torch optimizers, as a module without the mixin builds them."""

    def __init__(self, build: Callable[[nn.Sequential], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.build = build

    def configure_optimizers(self) -> Any:
        return self.build(self.net)


def two_groups(net: nn.Sequential) -> torch.optim.Optimizer:
    first: dict[str, Any] = {"params": net[0].parameters(), "lr": 3e-2, "betas": (0.5, 0.9)}
    second: dict[str, Any] = {"params": net[1:].parameters(), "eps": 1e-2, "weight_decay": 0.1}
    return torch.optim.Adam([first, second], lr=1e-3)


def half_frozen(net: nn.Sequential) -> torch.optim.Optimizer:
    net[0].weight.requires_grad_(False)
    return torch.optim.Adam(net.parameters(), lr=1e-2)


def fitted(
    monitor: L.Callback | None, module: L.LightningModule, batches: int = 6, **flags: Any
) -> tuple[L.Trainer, MemoryLogger]:
    recorder = MemoryLogger()
    callbacks = [] if monitor is None else [monitor]
    settings = {"max_epochs": 1, "logger": recorder, "log_every_n_steps": 1, **flags}
    fit = trainer(callbacks=callbacks, **settings)
    fit.fit(module, loader(batches))
    return fit, recorder


def said(recorded: Iterable[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in recorded if "SharpnessMonitor" in str(each.message)]


BUILDS: dict[str, Callable[[nn.Sequential], torch.optim.Optimizer]] = {
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2),
    "amsgrad": lambda net: torch.optim.Adam(net.parameters(), betas=(0.0, 0.5), amsgrad=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1.0),
    "coupled decay": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1.0),
    "maximize": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2, maximize=True),
    "two groups": two_groups,
    "half frozen": half_frozen,
}


@pytest.mark.parametrize("name", BUILDS)
def test_it_is_the_largest_eigenvalue_of_the_dense_hessian(name: str) -> None:
    module = Own(BUILDS[name])
    fit, recorder = fitted(SharpnessMonitor(2, batch=batch(), **EXACT), module)
    assert recorder.steps_of(KEY) == [0, 1, 3, 5]
    expected = exact_sharpness(module, fit.optimizers[0], batch())
    assert abs(expected) > 1e-3
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}, {"fused": False}])
def test_it_measures_what_the_mixin_builds(implementation: dict[str, bool]) -> None:
    module = Lit({**ADAMW, **implementation}, {"name": "constant"})
    fit, _ = fitted(SharpnessMonitor(6, batch=batch(), loss=loss, **EXACT), module)
    expected = exact_sharpness(module, fit.optimizers[0], batch())
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=1e-3)


def test_the_defaults_are_near_enough() -> None:
    module = Own(BUILDS["Adam"])
    fit, _ = fitted(SharpnessMonitor(1, batch=batch()), module, batches=20)
    expected = exact_sharpness(module, fit.optimizers[0], batch())
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=1e-2)


def test_the_first_batch_is_held() -> None:
    module = Own(BUILDS["Adam"])
    fit, _ = fitted(SharpnessMonitor(6, **EXACT), module)
    inputs, targets = next(iter(loader(6)))
    expected = exact_sharpness(module, fit.optimizers[0], [inputs, targets])
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=1e-3)


def test_the_learning_rate_is_that_of_the_step() -> None:
    """The schedule has gone on to 0 when the batch ends."""
    module = Lit(ADAMW, {"name": "linear"})
    fit, _ = fitted(SharpnessMonitor(6, batch=batch(), **EXACT), module)
    (group, _) = fit.optimizers[0].param_groups
    assert group["lr"] == 0
    for group in fit.optimizers[0].param_groups:
        group["lr"] = ADAMW["lr"] / 6
    expected = exact_sharpness(module, fit.optimizers[0], batch())
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=1e-3)


def test_it_is_measured_in_single_precision_at_least() -> None:
    module = Lit(ADAMW)
    fit, _ = fitted(SharpnessMonitor(6, batch=batch(), **EXACT), module, precision="bf16-true")
    assert fit.optimizers[0].param_groups[0]["params"][0].dtype == torch.bfloat16
    of = [each.bfloat16() for each in batch()]
    expected = exact_sharpness(module, fit.optimizers[0], of)
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=2e-2)


def test_double_precision() -> None:
    module = Lit(ADAMW)
    fit, _ = fitted(SharpnessMonitor(6, batch=batch(), **EXACT), module, precision="64-true")
    expected = exact_sharpness(module, fit.optimizers[0], batch())
    assert float(fit.callback_metrics[KEY]) == pytest.approx(expected, rel=1e-6)


def test_it_counts_optimizer_steps_under_accumulation() -> None:
    _, recorder = fitted(SharpnessMonitor(2), Lit(ADAMW), batches=12, accumulate_grad_batches=3)
    assert recorder.steps_of(KEY) == [0, 1, 3]


def test_its_x_axis_is_that_of_the_loss() -> None:
    _, recorder = fitted(SharpnessMonitor(5), Lit(ADAMW), batches=10, log_every_n_steps=5)
    assert recorder.steps_of("loss") == [4, 9]
    assert recorder.steps_of(KEY) == recorder.steps_of(LINE) == [0, 4, 9]


def test_after_a_resume_it_counts_on(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Lit(ADAMW), loader(5))
    first.save_checkpoint(tmp_path / "last.ckpt")
    recorder = MemoryLogger()
    again = trainer(max_epochs=2, callbacks=[SharpnessMonitor(4)], logger=recorder)
    again.fit(Lit(ADAMW), loader(5), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    assert recorder.steps_of(KEY) == [7]


def test_what_it_is_beside_other_callbacks(tmp_path: Path) -> None:
    callbacks = [AdamMonitor(2), SharpnessMonitor(2)]
    recorder = MemoryLogger()
    trainer(max_epochs=1, callbacks=callbacks, logger=recorder).fit(Lit(ADAMW), loader(4))
    assert recorder.steps_of(KEY) == recorder.steps_of("adam_update/update_norm") == [0, 1, 3]


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
def test_training_is_as_without_it(precision: Any) -> None:
    def trained(monitor: L.Callback | None) -> tuple[Careless, L.Trainer, MemoryLogger]:
        L.seed_everything(3, verbose=False)
        module = Careless()
        flags = {"precision": precision, "max_epochs": 2, "accumulate_grad_batches": 2}
        return module, *fitted(monitor, module, batches=6, **flags)

    plain, fit, recorder = trained(None)
    watched, fit_watched, recorder_watched = trained(SharpnessMonitor(1))
    assert len(recorder_watched.steps_of(KEY)) == 6
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    for ours, theirs in zip(watched.gradients, plain.gradients, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
    assert torch.equal(torch.stack(plain.losses), torch.stack(watched.losses))
    assert plain.drawn == watched.drawn
    assert torch.equal(plain.noise.get_state(), watched.noise.get_state())
    assert fit_watched.strict_step == fit.strict_step  # type: ignore[attr-defined]
    metrics = {key: float(value) for key, value in fit_watched.callback_metrics.items()}
    assert metrics.pop(LINE) == 1.0
    assert metrics.pop(KEY) > 0
    assert metrics == {key: float(value) for key, value in fit.callback_metrics.items()}
    rows = [row for row in recorder_watched.rows if KEY not in row[1]]
    assert rows == recorder.rows


def of_any_net(module: L.LightningModule, batch: Any) -> Tensor:
    nets: Any = [each for each in module.children() if isinstance(each, nn.Sequential)]
    outputs: Tensor = sum(net(batch[0][:, : net[0].in_features]).square().mean() for net in nets)
    return outputs


@pytest.mark.slow
@each_loop
def test_any_training_is_as_without_it(loop: Loop) -> None:
    if loop.kind is Timed:
        pytest.skip("its clock stands outside of the module, and goes on with each evaluation")
    without = baseline_fit(loop.name)
    is_automatic = without.module.automatic_optimization
    monitor = SharpnessMonitor(1, loss=None if is_automatic else of_any_net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = run_loop(loop, monitor)
    assert not [each for each in said(caught) if "logger" not in each]
    assert_same_parameters(without.module, watched.module)
    # A module that skips batches by their count may skip the one that is held.
    if loop.is_logged and not isinstance(without.module, Skipping):
        measured = loop.steps if loop.measured is None else len(loop.measured)
        assert len(watched.values(KEY + loop.suffix)) == measured


def test_random_numbers_go_on_after_a_fault() -> None:
    class Failing(Lit):
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
            fitted(monitor, Failing(ADAMW), batches=4)
    assert draws[:4] == draws[4:]


@pytest.mark.parametrize(
    "place",
    [
        "lightning_adam.sharpness.monitor.copied_batch",
        "lightning_adam.sharpness.monitor.stability_of",
        "lightning_adam.sharpness.monitor.evaluated",
        "lightning_adam.sharpness.monitor.largest_eigenvalue",
        "lightning_adam.sharpness.monitor.logging_step",
        "lightning_adam.sharpness.monitor.StepCounter",
    ],
)
@pytest.mark.parametrize("are_errors", [False, True])
def test_a_fault_inside_is_reported_once_and_training_ends_as_without_it(
    place: str, are_errors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("planted")

    undisturbed = Lit(ADAMW)
    fitted(None, undisturbed)
    monkeypatch.setattr(place, planted)
    module = Lit(ADAMW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if are_errors:
            warnings.filterwarnings("error", message="SharpnessMonitor")
        _, recorder = fitted(SharpnessMonitor(2), module)
    if not are_errors:
        (report,) = said(caught)
        assert "ZeroDivisionError: planted" in report
    assert recorder.steps_of(KEY) == []
    assert all(map(torch.equal, parameters(undisturbed), parameters(module)))


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


def test_a_loss_without_a_second_derivative_is_told_in_a_sentence() -> None:
    class Rough(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            squares: Tensor = Once.apply(self.net(batch[0]))  # type: ignore[no-untyped-call]
            return squares.square().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, recorder = fitted(SharpnessMonitor(1), Rough(ADAMW))
    (report,) = said(caught)
    assert "Traceback" not in report
    assert "once_differentiable" in report
    assert "write SharpnessMonitor(loss=...)" in report
    assert recorder.steps_of(KEY) == []


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
    _, recorder = fitted(SharpnessMonitor(1), module, batches=2)
    assert recorder.steps_of(KEY) == [0, 1]


def partly_compiled() -> L.LightningModule:
    module = Lit(ADAMW)
    # What this backend makes has no second derivative.
    module.net = torch.compile(module.net, backend="aot_eager")  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("build", [partly_compiled, lambda: compiled_whole(ADAMW)])
def test_compiled_modules_are_measured(build: Callable[[], L.LightningModule]) -> None:
    values = []
    for module in (build(), Lit(ADAMW)):
        fit, recorder = fitted(SharpnessMonitor(2, batch=batch(), **EXACT), module, batches=2)
        assert recorder.steps_of(KEY) == [0, 1]
        values.append(float(fit.callback_metrics[KEY]))
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_a_module_that_cannot_be_copied_is_told_in_a_sentence() -> None:
    module = Lit(ADAMW)
    module.lock = threading.Lock()  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(SharpnessMonitor(1), module)
    (report,) = said(caught)
    assert "expected a module that can be copied, but TypeError: cannot pickle" in report
    assert "Traceback" not in report


def test_parameters_that_do_not_enter_the_loss_are_flat() -> None:
    class Wasteful(Lit):
        def __init__(self) -> None:
            super().__init__(ADAMW)
            self.head, self.shift = nn.Linear(6, 1), nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            extra = self.head(batch[0]).square().mean() if batch_idx else 0.0
            return loss_of(self.net, batch) + extra + self.shift.sum()

    _, recorder = fitted(SharpnessMonitor(1, batch=batch()), Wasteful(), batches=3)
    assert recorder.steps_of(KEY) == [0, 1, 2]


def test_without_a_gradient_no_step_is_measured() -> None:
    class Skipping(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    _, recorder = fitted(SharpnessMonitor(1), Skipping(ADAMW), batches=3)
    assert recorder.steps_of(KEY) == [0, 2]


def test_nan_is_logged_as_it_is() -> None:
    class Diverging(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.nan

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit, recorder = fitted(SharpnessMonitor(1), Diverging(ADAMW), batches=2)
    assert recorder.steps_of(KEY) == [0, 1]
    assert fit.callback_metrics[KEY].isnan()
    assert not said(caught)


def test_several_optimizers_have_keys_of_their_own() -> None:
    def both(module: L.LightningModule, batch: Any) -> Tensor:
        return loss_of(module.first, batch) + loss_of(module.second, batch)  # type: ignore[arg-type]

    module = TwoOptimizers(torch.optim.Adam)
    _, recorder = fitted(SharpnessMonitor(2, loss=both), module, batches=2)
    assert recorder.steps_of(f"{KEY}/optimizer/first") == [0, 1]
    assert recorder.steps_of(f"{KEY}/optimizer/second") == [0, 1]
    assert recorder.steps_of(LINE) == [0, 1]


def test_beside_another_optimizer_the_adam_is_measured() -> None:
    def first(module: L.LightningModule, batch: Any) -> Tensor:
        return loss_of(module.first, batch)  # type: ignore[arg-type]

    module = TwoOptimizers(torch.optim.SGD)
    _, recorder = fitted(SharpnessMonitor(1, loss=first), module, batches=2)
    assert recorder.steps_of(f"{KEY}/optimizer/first") == [0, 1]
    assert recorder.steps_of(f"{KEY}/optimizer/second") == []


def test_the_csv_file_holds_both_lines() -> None:
    logger = CSVLogger(".")
    fitted(SharpnessMonitor(3), Lit(ADAMW), logger=logger)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row[KEY]]
    assert [row["step"] for row in rows] == ["0", "2", "5"]
    assert {row[LINE] for row in rows} == {"1.0"}


def test_the_wandb_run_holds_both_lines(tmp_path: Path) -> None:
    fitted(SharpnessMonitor(3), Lit(ADAMW), logger=WandbLogger(offline=True, save_dir=tmp_path))
    wandb.finish()
    (offline_run,) = offline_runs(tmp_path)
    rows = [row for row in history(offline_run) if KEY in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 2, 5]
    assert {row[LINE] for row in rows} == {1.0}


def test_after_training_nothing_is_left_in_the_optimizer() -> None:
    monitor = SharpnessMonitor(1)
    fit, _ = fitted(monitor, Lit(ADAMW), batches=2)
    assert not fit.optimizers[0]._optimizer_step_post_hooks
    assert not fit.optimizers[0]._optimizer_step_pre_hooks
    _, recorder = fitted(monitor, Lit(ADAMW), batches=2)
    assert recorder.steps_of(KEY) == [0, 1]


class Sgd(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Nadam(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.NAdam(self.parameters(), lr=0.1)


class Mixed(Lit):
    def configure_optimizers(self) -> Any:
        first: dict[str, Any] = {"params": self.net[0].parameters(), "maximize": True}
        return torch.optim.Adam([first, {"params": self.net[3].parameters()}])


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (Sgd, r"expected torch\.optim\.Adam or AdamW, but the model trains with SGD; train with"),
        (Nadam, r"but the model trains with NAdam"),
        (lambda: TwoOptimizers(torch.optim.Adam), r"write SharpnessMonitor\(loss=lambda module"),
        (Mixed, r"groups that all minimize, or all maximize"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    module: Callable[[], L.LightningModule], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fitted(SharpnessMonitor(), module())


def test_sharded_parameters_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_adam.sharpness.monitor.is_sharded", lambda optimizer: True)
    with pytest.raises(ConfigError, match="they are sharded; train with DDPStrategy"):
        fitted(SharpnessMonitor(), Lit(ADAMW))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"every_n_steps": 0},
            r"\(every_n_steps=0\): expected a whole number of at least 1; write",
        ),
        ({"iterations": 1.5}, r"write for example SharpnessMonitor\(iterations=20\)"),
        ({"tolerance": 1.0}, r"\(tolerance=1\.0\): expected a number in \[0, 1\)"),
        ({"loss": 3}, r"\(loss=3\): expected a function of the module and a batch"),
    ],
)
def test_bad_arguments_are_refused_when_it_is_built(
    arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        SharpnessMonitor(**arguments)


def test_no_logger_is_a_warning_and_the_numbers_are_in_callback_metrics() -> None:
    with pytest.warns(UserWarning, match="SharpnessMonitor has no logger"):
        fit, _ = fitted(SharpnessMonitor(1), Lit(ADAMW), logger=False)
    assert {KEY, LINE} <= set(fit.callback_metrics)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has kept."""
    return launch("tests.ranks.sharpness_ranks", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_ranks_log_what_one_process_logs(ranks: list[dict[str, Any]]) -> None:
    recorder = MemoryLogger()
    rank_trainings.fit("DDP", [SharpnessMonitor(2, batch=batch(), **EXACT)], recorder)
    expected = [row[KEY] for _, row in recorder.rows if KEY in row]
    assert len(expected) == 4
    for rank in ranks:
        assert rank["of a batch"]["rows"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["of a batch", "of the first batch", "fault on rank 1"])
def test_all_ranks_have_the_number_of_the_first(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["rows"] == second["rows"]
    assert first["metric"] == second["metric"] == first["rows"][-1]
    assert ranks[0]["of the first batch"]["rows"] == first["rows"] or name == "of a batch"
    assert not first["said"] + second["said"]


@pytest.mark.slow
def test_a_fault_on_the_first_rank_ends_it_on_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["fault on rank 0"] for rank in ranks)
    assert len(first["said"]) == 1
    assert not second["said"] + first["rows"] + second["rows"]


@pytest.mark.slow
def test_ranks_train_as_without_it_stop_together_and_refuse_shards(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        for name in ("of a batch", "of the first batch", "fault on rank 0", "fault on rank 1"):
            assert all(map(torch.equal, rank["plain"], rank[name]["parameters"])), name
        assert rank["stopped"] == 3
        assert "they are sharded; train with DDPStrategy" in rank["refused"]
