"""Other optimizers of Adam's family: exactly the statistics that their state defines."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, SparseAdam

from lightning_adam import AdamMonitor, AdamStatistics, ConfigError
from lightning_adam.statistics.catalogue import STATISTICS
from tests.statistics.cases import reference_tensors
from tests.support.agreement import assert_agree, bare
from tests.support.monitored import TwoOptimizers
from tests.support.reported import Build, Fit, WithoutMixin, fit, not_measured
from tests.support.tables import each_row
from tests.support.training import (
    Lit,
    assert_same_parameters,
    loss_of,
    network,
    run_training,
)


class Foreign(Optimizer):
    """A third-party optimizer. `move` is its formula for a parameter."""

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
    """The formulas of AdamW in a separate class."""

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
    """Counts one step for the group, as apex does."""

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
    """Three betas, the third of which is that of exp_avg_sq."""

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
    """Groups with momentum_buffer and groups with exp_avg and exp_avg_sq, as Keller Jordan's."""

    settings: ClassVar[dict[str, Any]] = {"weight_decay": 0.1}

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        if group["use_muon"]:
            p.sub_(group["lr"] * decayed(state, "momentum_buffer", 0.9, grad).sign())
        else:
            super().move(p, grad, state, group)


class NoMoments(Foreign):
    """Betas, but no state under a known name."""

    def move(self, p: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * decayed(state, "m", group["betas"][0], grad))


class ClippedAdamW(AdamW):
    """The step of torch, followed by another operation."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-0.2, 0.2)
        return loss


class NamedAdamW(AdamW):
    """The step of torch in a subclass with another name."""


def with_adam_groups(net: nn.Sequential) -> Optimizer:
    matrices = [each for each in net.parameters() if each.dim() == 2]
    others = [each for each in net.parameters() if each.dim() < 2]
    muon = {"params": matrices, "use_muon": True}
    adam = {"params": others, "use_muon": False, "betas": (0.9, 0.95), "eps": 1e-8}
    return MuonWithAuxAdam([muon, adam])


PARTLY_KNOWN: dict[str, Build] = {
    kind.__name__: lambda net, kind=kind: kind(net.parameters())  # type: ignore[misc]
    for kind in (
        *(Adamax, Lion, Adan, AdamMini, NAdam, RAdam),
        *(OwnAdamW, GroupStepAdamW, ClippedAdamW),
    )
}
"""Optimizers for which some statistics are undefined."""
WITH_AUX = {MuonWithAuxAdam.__name__: with_adam_groups}
ADAMS: dict[str, Build] = {
    "Adam": lambda net: Adam(net.parameters()),
    "AdamW": lambda net: AdamW(net.parameters(), weight_decay=0.1),
    "a subclass": lambda net: NamedAdamW(net.parameters()),
}


def expected_of(optimizer: Optimizer) -> dict[str, float]:
    """Returns the statistics that the state of the only group with betas defines, in float64."""
    (group,) = (group for group in optimizer.param_groups if "betas" in group)
    states = [optimizer.state[each] for each in group["params"]]
    p = torch.cat([each.detach().double().flatten() for each in group["params"]])
    g = torch.cat([each.grad.double().flatten() for each in group["params"]])
    m = torch.cat([state["exp_avg"].double().flatten() for state in states])
    expected: dict[str, float] = {}
    for name, x in {"grad": g, "exp_avg": m, "weight": p}.items():
        if name != "exp_avg":
            expected[f"{name}_norm"] = x.square().sum().sqrt().item()
        expected[f"{name}_rms"] = x.square().mean().sqrt().item()
    expected |= {"grad_max": g.abs().max().item(), "exp_avg_max": m.abs().max().item()}
    expected |= {"exp_avg_mean": m.mean().item(), "nonfinite_count": 0.0}
    expected |= {"grad_zero_fraction": (g == 0).double().mean().item()}
    expected |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if isinstance(group.get("eps"), float):
        expected["eps"] = group["eps"]
    for holder in (group, states[0]):
        if "step" in holder:
            expected["step"] = float(holder["step"])
    if len(group["betas"]) == 2:
        expected["beta1"], expected["beta2"] = group["betas"]
    if isinstance(optimizer, NAdam | RAdam | OwnAdamW | AdamW):
        raw = torch.cat([state["exp_avg_sq"].flatten() for state in states])
        v, tiny = raw.double(), torch.finfo(raw.dtype).tiny
        stalled = (v > 0) & ((group["betas"][1] * v).to(raw.dtype) == raw)
        expected["exp_avg_sq_mean"] = v.mean().item()
        expected["exp_avg_sq_max"] = v.max().item()
        expected["exp_avg_sq_subnormal_fraction"] = ((v > 0) & (v < tiny)).double().mean().item()
        expected["exp_avg_sq_stalled_fraction"] = stalled.double().mean().item()
    return expected


def undefined_statistics(expected: dict[str, float]) -> set[str]:
    """Returns the statistics that are reported as not measured."""
    always = {"eps", "step", "beta1", "beta2", "skipped_steps", "loss_scale"}
    always |= {"grad_norm_before_clip", "clip_coefficient"}
    return set(STATISTICS) - {*expected, *always}


def stepped(build: Build, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Optimizer:
    net = network().to(dtype)
    optimizer = build(net)
    for _ in range(4):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) * scale
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", [*PARTLY_KNOWN, *WITH_AUX])
def test_metric_computes_the_statistics_that_the_state_defines(name: str) -> None:
    cases = [(torch.float32, 1.0), (torch.float32, 3e-19), (torch.bfloat16, 1.0)]
    with each_row() as row:
        for dtype, scale in cases:
            optimizer = stepped({**PARTLY_KNOWN, **WITH_AUX}[name], dtype, scale)
            metric = AdamStatistics("all", ["model", "group"], worst={"update_norm": 2})
            metric.update(optimizer, histograms=True)
            expected = expected_of(optimizer)
            values = metric.compute()
            with row(f"{dtype}, scale {scale}"):
                assert bare(values, "") == pytest.approx(expected, rel=1e-6, abs=0)
                groups = optimizer.param_groups
                for index, group in enumerate(groups if len(groups) > 1 else ()):
                    of_group = expected if "betas" in group else {}
                    actual = bare(values, f"group/group_{index}/")
                    assert actual == pytest.approx(of_group, rel=1e-6, abs=0)
                assert {each.name for each in metric.not_measured} == undefined_statistics(expected)
                assert metric.compute_exponents() == {}


def monitored(build: Callable[[], L.LightningModule], **settings: Any) -> Fit:
    """Runs with the monitor, and checks that a run without it has the same parameters."""
    without = fit(build(), data=7)
    monitor = AdamMonitor(**{"every_n_steps": 1, "statistics": "all", **settings})
    watched = fit(build(), monitor, data=7)
    # The step count of the monitor, for any optimizer.
    skipped = [key for key in watched.values if "skipped_steps" in key]
    assert not any(watched.values.pop(key) for key in skipped)
    assert_same_parameters(watched.run.module, without.run.module)
    assert not any("failed" in each for each in watched.warnings)
    return watched


def test_monitor_lists_once_what_it_does_not_measure() -> None:
    with each_row() as row:
        for name, build in PARTLY_KNOWN.items():
            watched = monitored(partial(WithoutMixin, build), histograms_every_n_steps=3)
            expected = expected_of(watched.optimizers[0])
            with row(name):
                assert bare(watched.values, "") == pytest.approx(expected, rel=1e-6, abs=0)
                (line,) = watched.lines
                assert type(watched.optimizers[0]).__name__ in line
                assert not_measured(line) == {*undefined_statistics(expected), "histograms"}


def test_monitor_measures_everything_of_adam_and_lists_nothing() -> None:
    with each_row() as row:
        for name, build in ADAMS.items():
            watched = monitored(partial(WithoutMixin, build), histograms_every_n_steps=3)
            with row(name):
                assert watched.lines == []
                tensors = reference_tensors(watched.optimizers[0])
                assert_agree(bare(watched.values, ""), tensors, "numba")


def test_parameters_without_moments_are_named() -> None:
    watched = monitored(lambda: WithoutMixin(with_adam_groups))
    expected = expected_of(watched.optimizers[0])
    assert bare(watched.values, "") == pytest.approx(expected, rel=1e-6, abs=0)
    (line,) = watched.lines
    for words in ("MuonWithAuxAdam", "update_norm", "2 parameters", "net.0.weight"):
        assert words in line


def test_selection_of_defined_statistics_lists_nothing() -> None:
    watched = monitored(lambda: WithoutMixin(PARTLY_KNOWN["OwnAdamW"]), statistics="grad_norm")
    assert watched.lines == []


def test_adamw_beside_another_optimizer_is_measured() -> None:
    watched = monitored(lambda: TwoOptimizers(torch.optim.SGD))
    values = bare(watched.values, "optimizer/first/")
    assert_agree(values, reference_tensors(watched.optimizers[0]), "numba")
    assert not any("/optimizer/second" in key for key in watched.values)
    assert watched.lines == ["AdamMonitor measures optimizers with betas. It does not measure SGD."]


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
            lambda: WithoutMixin(lambda net: NoMoments(net.parameters())),
            "measures nothing of NoMoments",
        ),
    ],
)
def test_optimizer_with_unknown_state_is_reported_and_not_logged(
    build: Callable[[], L.LightningModule], expected: str
) -> None:
    watched = monitored(build)
    assert not any(key.startswith("adam_") for _, row in watched.run.logger.rows for key in row)
    (line,) = watched.lines
    assert expected in line


def test_optimizer_without_betas_raises() -> None:
    module = WithoutMixin(lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"trains with SGD\. "):
        fit(module, AdamMonitor())


def test_nested_step_counts_once() -> None:
    AdamW([nn.Parameter(torch.ones(1))])
    watched = fit(WithoutMixin(PARTLY_KNOWN["ClippedAdamW"]), AdamMonitor(3))
    assert watched.run.steps_of("adam_weight_decay/weight_norm") == [0, 2, 5]


def test_pair_of_eps_is_not_measured_and_does_not_fail() -> None:
    optimizer = stepped(lambda net: Lion(net.parameters(), eps=(1e-30, 1e-16)))
    values = bare(AdamStatistics("all")(optimizer), "")
    assert values == pytest.approx(expected_of(optimizer), rel=1e-6)


def test_large_parameter_with_a_max_exp_avg_sq_per_row_is_measured() -> None:
    weight = nn.Parameter(torch.ones(300, 300))
    weight.grad = torch.ones(300, 300)
    optimizer = AdamMini([weight], amsgrad=True)
    optimizer.step()
    values = bare(AdamStatistics("all")(optimizer), "")
    assert values == pytest.approx(expected_of(optimizer), rel=1e-6)


class SecondStartsLater(TwoOptimizers):
    """The second optimizer takes its first step in the second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        both = zip(self.optimizers(), (self.first, self.second), strict=True)
        for optimizer, net in list(both)[: batch_idx + 1]:
            optimizer.zero_grad()
            self.manual_backward(loss_of(net, batch))
            optimizer.step()


def test_optimizer_that_begins_later_is_reported_at_its_first_step() -> None:
    watched = fit(SecondStartsLater(NAdam), AdamMonitor(1), data=3)
    (line,) = watched.lines
    assert "of NAdam: its state does not provide denominator_mean" in line


def test_step_count_in_the_group_continues_after_a_resume(tmp_path: Path) -> None:
    module, path = WithoutMixin(PARTLY_KNOWN["GroupStepAdamW"]), str(tmp_path / "last.ckpt")
    run_training(module, data=5).trainer.save_checkpoint(path)
    resumed = run_training(module, AdamMonitor(4), data=5, max_epochs=2, ckpt_path=path)
    assert resumed.steps_of("adam_gradient/grad_norm") == [7]
