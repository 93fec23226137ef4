"""Optimizers of Adam's family: what their state tells is right, and nothing else is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, SparseAdam

from lightning_adam import AdamMonitor, AdamStatistics, ConfigError
from lightning_adam.statistics.catalogue import STATISTICS
from tests.statistics.cases import reference_tensors
from tests.support.agreement import assert_agree, bare
from tests.support.memory_logger import MemoryLogger
from tests.support.monitored import TwoOptimizers
from tests.support.training import Lit, loader, loss_of, network, parameters, trainer

Build = Callable[[nn.Module], Optimizer]


class Foreign(Optimizer):
    """An optimizer from elsewhere; `move` is its formula for a parameter."""

    settings: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, {"lr": 1e-2, **self.settings, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        raise NotImplementedError


def decayed(state: Any, name: str, beta: float, value: Tensor) -> Tensor:
    average: Tensor = state.setdefault(name, torch.zeros_like(value))
    return average.lerp_(value, 1 - beta)


class OwnAdamW(Foreign):
    """AdamW's formulas, its own class."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        (beta1, beta2), step = group["betas"], self.count(state, group)
        first = decayed(state, "exp_avg", beta1, grad) / (1 - beta1**step)
        second = decayed(state, "exp_avg_sq", beta2, grad**2) / (1 - beta2**step)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * first / (second.sqrt() + group["eps"]))

    def count(self, state: Any, group: dict[str, Any]) -> float:
        state["step"] = state.get("step", 0) + 1
        return float(state["step"])


class GroupStepAdamW(OwnAdamW):
    """As apex counts: one step for the group."""

    def count(self, state: Any, group: dict[str, Any]) -> float:
        return float(group["step"])

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


class Lion(Foreign):
    settings: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.99), "weight_decay": 0.1}

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        first = state.setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * first.lerp(grad, 1 - beta1).sign())
        first.lerp_(grad, 1 - beta2)


class Adan(Foreign):
    """Three betas, of which the third is exp_avg_sq's."""

    settings: ClassVar[dict[str, Any]] = {**Foreign.settings, "betas": (0.98, 0.92, 0.99)}

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        beta1, beta2, beta3 = group["betas"]
        first = decayed(state, "exp_avg", beta1, grad)
        change = decayed(state, "exp_avg_diff", beta2, grad - state.get("previous_grad", grad))
        second = decayed(state, "exp_avg_sq", beta3, (grad + beta2 * change) ** 2)
        state["previous_grad"] = grad.clone()
        p.sub_(group["lr"] * (first + beta2 * change) / (second.sqrt() + group["eps"]))


class AdamMini(Foreign):
    """One second moment for each row."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        rows = (grad**2).flatten(1).mean(1) if grad.dim() > 1 else (grad**2).mean()[None]
        second = decayed(state, "exp_avg_sq", beta2, rows)
        state["max_exp_avg_sq"] = second.clone()
        first = decayed(state, "exp_avg", beta1, grad)
        shape = (-1,) + (1,) * (p.dim() - 1)
        p.sub_(group["lr"] * first / (second.sqrt().view(shape) + group["eps"]))


class MuonWithAuxAdam(OwnAdamW):
    """Groups of momentum_buffer beside groups of exp_avg and exp_avg_sq, as Keller Jordan's."""

    settings: ClassVar[dict[str, Any]] = {"weight_decay": 0.1}

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        if group["use_muon"]:
            p.sub_(group["lr"] * decayed(state, "momentum_buffer", 0.9, grad).sign())
        else:
            super().move(p, grad, state, group)


class NoMoments(Foreign):
    """Betas, but nothing kept under a name that is known."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * decayed(state, "m", group["betas"][0], grad))


class ClippedAdamW(AdamW):
    """Torch's step, and what is torch's no longer."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-0.2, 0.2)
        return loss


class NamedAdamW(AdamW):
    """Torch's step, another name."""


def with_adam_groups(net: nn.Module) -> Optimizer:
    matrices = [each for each in net.parameters() if each.dim() == 2]
    others = [each for each in net.parameters() if each.dim() < 2]
    muon = {"params": matrices, "use_muon": True}
    adam = {"params": others, "use_muon": False, "betas": (0.9, 0.95), "eps": 1e-8}
    return MuonWithAuxAdam([muon, adam])


def of(kind: Any, **settings: Any) -> Any:
    return pytest.param(lambda net: kind(net.parameters(), **settings), id=kind.__name__)


WITH_AUX = pytest.param(with_adam_groups, id=MuonWithAuxAdam.__name__)
FIRST = [of(Adamax), of(Lion), of(Adan), of(AdamMini)]
SECOND = [of(NAdam), of(RAdam), of(OwnAdamW), of(GroupStepAdamW), of(ClippedAdamW)]
WHOLE = [of(Adam), of(AdamW, weight_decay=0.1), of(NamedAdamW)]


def expected_of(optimizer: Optimizer) -> dict[str, float]:
    """What the state tells, of the one group that has betas."""
    (group,) = (group for group in optimizer.param_groups if "betas" in group)
    states = [optimizer.state[each] for each in group["params"]]
    p = torch.cat([each.detach().double().flatten() for each in group["params"]])
    g = torch.cat([each.grad.double().flatten() for each in group["params"]])
    m = torch.cat([state["exp_avg"].double().flatten() for state in states])
    told: dict[str, float] = {}
    for name, x in {"grad": g, "exp_avg": m, "weight": p}.items():
        told[f"{name}_norm"] = x.square().sum().sqrt().item()
        told[f"{name}_rms"] = x.square().mean().sqrt().item()
    told |= {"grad_max": g.abs().max().item(), "exp_avg_max": m.abs().max().item()}
    told |= {"exp_avg_mean": m.mean().item(), "nonfinite_count": 0.0}
    told |= {"grad_zero_fraction": (g == 0).double().mean().item()}
    told |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if isinstance(group.get("eps"), float):
        told["eps"] = group["eps"]
    for holder in (group, states[0]):
        if "step" in holder:
            told["step"] = float(holder["step"])
    if len(group["betas"]) == 2:
        told["beta1"], told["beta2"] = group["betas"]
    if isinstance(optimizer, NAdam | RAdam | OwnAdamW | AdamW):
        raw = torch.cat([state["exp_avg_sq"].flatten() for state in states])
        v, tiny = raw.double(), torch.finfo(raw.dtype).tiny
        stalled = (v > 0) & ((group["betas"][1] * v).to(raw.dtype) == raw)
        told["exp_avg_sq_mean"] = v.mean().item()
        told["exp_avg_sq_max"] = v.max().item()
        told["exp_avg_sq_subnormal_fraction"] = ((v > 0) & (v < tiny)).double().mean().item()
        told["exp_avg_sq_stalled_fraction"] = stalled.double().mean().item()
    return told


def not_told_by(told: dict[str, float]) -> set[str]:
    """An optimizer without eps is not told to lack it; the steps it skipped are not its own."""
    return set(STATISTICS) - {*told, "eps", "step", "beta1", "beta2", "skipped_steps"}


def stepped(build: Build, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Optimizer:
    net = network().to(dtype)
    optimizer = build(net)
    for _ in range(4):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) * scale
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("build", [*FIRST, *SECOND, WITH_AUX])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 3e-19), (torch.bfloat16, 1.0)]
)
def test_the_metric_tells_what_the_state_tells(
    build: Build, dtype: torch.dtype, scale: float
) -> None:
    optimizer = stepped(build, dtype, scale)
    metric = AdamStatistics("all", worst={"update_norm": 2})
    metric.update(optimizer, histograms=True)
    told = expected_of(optimizer)
    values = metric.compute()
    assert bare(values, "") == pytest.approx(told, rel=1e-6, abs=0)
    for index, group in enumerate(optimizer.param_groups):
        group_told = told if "betas" in group else {}
        actual = bare(values, f"/group/group_{index}")
        assert actual == pytest.approx(group_told, rel=1e-6, abs=0)
    assert {each.name for each in metric.not_measured} == not_told_by(told)
    assert metric.compute_exponents() == {}


class Built(Lit):
    """A module that is trained by what is asked for."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.build = build

    def configure_optimizers(self) -> Any:
        return self.build(self.net)


class Fit(NamedTuple):
    optimizers: list[Optimizer]
    parameters: list[Tensor]
    values: dict[str, float]
    recorder: MemoryLogger
    lines: list[str]
    warnings: list[str]


def fitted(module: L.LightningModule, monitor: AdamMonitor | None, batches: int = 7) -> Fit:
    recorder, lines, warnings = MemoryLogger(), list[str](), list[str]()
    fit = trainer(max_epochs=1, logger=recorder, callbacks=[monitor] if monitor else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_adam.monitor.rank_zero_info", lines.append)
        patch.setattr("lightning_adam.monitor.rank_zero_warn", warnings.append)
        fit.fit(module, loader(batches))
    values = {key: float(value) for key, value in fit.callback_metrics.items()}
    # The monitor's own count, whatever the optimizer is.
    assert not any(values.pop(key) for key in list(values) if "skipped_steps" in key)
    return Fit(fit.optimizers, parameters(module), values, recorder, lines, warnings)


def monitored(build: Callable[[], L.LightningModule], **settings: Any) -> Fit:
    """A training with the monitor, whose parameters are those of one without it."""
    without = fitted(build(), None)
    fit = fitted(build(), AdamMonitor(**{"every_n_steps": 1, "statistics": "all", **settings}))
    for parameter, other in zip(fit.parameters, without.parameters, strict=True):
        assert torch.equal(parameter, other)
    assert not any("failed" in each for each in fit.warnings)
    return fit


@pytest.mark.parametrize("build", [*FIRST, *SECOND])
def test_the_monitor_says_once_what_it_does_not_measure(build: Build) -> None:
    fit = monitored(lambda: Built(build), histograms_every_n_steps=3)
    told = expected_of(fit.optimizers[0])
    assert bare(fit.values, "") == pytest.approx(told, rel=1e-6, abs=0)
    (line,) = fit.lines
    listed = line.rstrip(".").partition("state tells, not ")[2].split(", ")
    assert type(fit.optimizers[0]).__name__ in line
    assert set(listed) == {*not_told_by(told), "histograms"}


@pytest.mark.parametrize("build", WHOLE)
def test_of_adam_the_monitor_says_nothing(build: Build) -> None:
    fit = monitored(lambda: Built(build), histograms_every_n_steps=3)
    assert fit.lines == []
    assert_agree(bare(fit.values, ""), reference_tensors(fit.optimizers[0]), "numba")


def test_parameters_without_moments_are_named_beside_those_with() -> None:
    fit = monitored(lambda: Built(with_adam_groups))
    told = expected_of(fit.optimizers[0])
    assert bare(fit.values, "") == pytest.approx(told, rel=1e-6, abs=0)
    (line,) = fit.lines
    for words in ("MuonWithAuxAdam", "update_norm", "2 parameters", "net.0.weight"):
        assert words in line


def test_asked_for_what_the_state_tells_it_says_nothing() -> None:
    fit = monitored(lambda: Built(lambda net: OwnAdamW(net.parameters())), statistics="grad_*")
    assert fit.lines == []


class MuonBesideAdamW(TwoOptimizers):
    def __init__(self) -> None:
        super().__init__(AdamW)

    def configure_optimizers(self) -> Any:
        matrices = [each for each in self.first.parameters() if each.dim() == 2]
        return [torch.optim.Muon(matrices), AdamW(self.second.parameters())]


HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")


@HAS_MUON
def test_muon_beside_adamw() -> None:
    fit = monitored(MuonBesideAdamW)
    assert_agree(
        bare(fit.values, "/optimizer/second"), reference_tensors(fit.optimizers[1]), "numba"
    )
    assert not any("/optimizer/first" in key for key in fit.values)
    assert fit.lines == ["AdamMonitor does not measure Muon: without betas."]


class Sparse(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=True)

    def configure_optimizers(self) -> Any:
        return SparseAdam(self.table.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.table(batch[0].argmax(1)).square().mean()
        return loss


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Sparse, "measures nothing of SparseAdam"),
        (
            lambda: Built(lambda net: NoMoments(net.parameters())),
            "measures nothing of NoMoments",
        ),
    ],
)
def test_where_nothing_is_known_that_is_said_and_nothing_is_logged(
    build: Callable[[], L.LightningModule], expected: str
) -> None:
    fit = monitored(build)
    assert not any(key.startswith("adam_") for _, row in fit.recorder.rows for key in row)
    (line,) = fit.lines
    assert expected in line


@pytest.mark.parametrize("name", ["SGD", pytest.param("Muon", marks=HAS_MUON)])
def test_an_optimizer_without_betas_is_refused(name: str) -> None:
    def build(net: nn.Module) -> Optimizer:
        matrices = [each for each in net.parameters() if each.dim() == 2]
        optimizer: Optimizer = getattr(torch.optim, name)(matrices, lr=0.1)
        return optimizer

    with pytest.raises(ConfigError, match=f"trains with {name}; "):
        fitted(Built(build), AdamMonitor())


def test_a_step_within_a_step_counts_once() -> None:
    AdamW([nn.Parameter(torch.ones(1))])
    fit = fitted(Built(lambda net: ClippedAdamW(net.parameters())), AdamMonitor(3))
    assert fit.recorder.steps_of("adam_weight_decay/weight_norm") == [0, 2, 5]


def test_two_eps_are_no_fault() -> None:
    optimizer = stepped(lambda net: Lion(net.parameters(), eps=(1e-30, 1e-16)))
    metric = AdamStatistics("all")
    metric.update(optimizer)
    assert bare(metric.compute(), "") == pytest.approx(expected_of(optimizer), rel=1e-6)


def test_a_large_parameter_with_an_amsgrad_of_rows() -> None:
    weight = nn.Parameter(torch.ones(300, 300))
    weight.grad = torch.ones(300, 300)
    optimizer = AdamMini([weight], amsgrad=True)
    optimizer.step()
    metric = AdamStatistics("all")
    metric.update(optimizer)
    assert bare(metric.compute(), "") == pytest.approx(expected_of(optimizer), rel=1e-6)


class Later(TwoOptimizers):
    """The second optimizer takes its first step in the second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        both = zip(self.optimizers(), (self.first, self.second), strict=True)
        for optimizer, net in list(both)[: batch_idx + 1]:
            optimizer.zero_grad()
            self.manual_backward(loss_of(net, batch))
            optimizer.step()


def test_an_optimizer_that_begins_later_is_told_of_then() -> None:
    fit = fitted(Later(NAdam), AdamMonitor(1), batches=3)
    (line,) = fit.lines
    assert "of NAdam what its state tells, not denominator_mean" in line


def test_steps_that_the_group_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    module = Built(lambda net: GroupStepAdamW(net.parameters()))
    first = trainer(max_epochs=1)
    first.fit(module, loader(5))
    first.save_checkpoint(tmp_path / "last.ckpt")
    recorder = MemoryLogger()
    again = trainer(max_epochs=2, callbacks=[AdamMonitor(4)], logger=recorder)
    again.fit(module, loader(5), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    assert recorder.steps_of("adam_moments/grad_norm") == [7]
