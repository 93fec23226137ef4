"""Every statistic, for the model and each group, against the independent float64 reference."""

import math
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_adam import AdamStatistics
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.kernels import eager
from tests.statistics.boundaries import slack
from tests.statistics.cases import KERNELS, reference_tensors, stepped
from tests.support import oracle
from tests.support.oracle import replay_adam

SIGNED = ("exp_avg_mean", "momentum_alignment", "decay_alignment")


def measured(
    optimizer: Optimizer, group: str | None = None, kernel: str = "eager"
) -> dict[str, float]:
    """All statistics of one scope by their bare name."""
    metric = AdamStatistics("all", kernel=kernel)
    metric.update(optimizer)
    return bare(metric.compute(), "" if group is None else f"/group/{group}")


def bare(values: dict[str, float], suffix: str) -> dict[str, float]:
    return {
        name: values[statistic.key + suffix]
        for name, statistic in STATISTICS.items()
        if statistic.key + suffix in values
    }


def agrees(optimizer: Optimizer) -> None:
    """Every statistic of the model is what the reference says, whatever the kernel."""
    for kernel in KERNELS:
        assert_agree(measured(optimizer, kernel=kernel), reference_tensors(optimizer), kernel)


def assert_agree(
    actual: dict[str, float], tensors: list[oracle.Tensor], kernel: str = "eager"
) -> None:
    relative = 1e-9 if kernel == "eager" else 1e-5
    undecided = {} if kernel == "eager" else slack(tensors)
    expected = oracle.reference_statistics(tensors)
    scale = oracle.signed_sum_scale(tensors)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        tolerance = {"rel": relative, "abs": 0.0}
        if name.endswith(("_fraction", "_count")) and name != "signal_fraction":
            tolerance = {"rel": 1e-15, "abs": undecided.get(name, 0.0)}
        if name in SIGNED:
            tolerance = {"rel": 0.0, "abs": relative * scale.get(name, math.nan)}
        assert actual[name] == pytest.approx(value, nan_ok=True, **tolerance), name


def parameter(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, dtype=torch.float64) * scale).to(dtype))


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    shape=st.sampled_from([(0,), (1,), (3, 5), (7, 4, 3), (300,)]),
    weight_scale=st.sampled_from([1e-3, 1.0, 1e3]),
    grad_scale=st.sampled_from([1e-12, 1e-9, 1e-4, 1.0, 1e4]),
    idle=st.booleans(),
    steps=st.integers(1, 5),
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    lr=st.sampled_from([1e-5, 1e-3, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.99)]),
    eps=st.sampled_from([1e-15, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    fused=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_reference(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weight_scale: float,
    grad_scale: float,
    idle: bool,
    steps: int,
    seed: int,
    **adam: Any,
) -> None:
    torch.manual_seed(seed)
    weights = [parameter(shape, dtype, weight_scale), parameter((2, 3), dtype, weight_scale)]

    def grad(weight: Tensor, step: int) -> Tensor:
        values = torch.randn(weight.shape, dtype=torch.float64) * grad_scale
        if idle:
            values.view(-1)[::3] = 0
        return values.to(dtype)

    optimizer = stepped(weights, steps=steps, grad=grad, **adam)
    agrees(optimizer)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["parameter", "grad", "exp_avg", "exp_avg_sq"])
def test_what_is_not_finite_is_counted_and_propagates(special: float, place: str) -> None:
    weight = parameter((4, 5), torch.float32)
    optimizer = stepped([weight], decoupled=True, weight_decay=0.1)
    target = {"parameter": weight.data, "grad": weight.grad, **optimizer.state[weight]}[place]
    target[1, 2] = special
    actual = measured(optimizer)
    assert actual["nonfinite_count"] == 1
    assert_agree(actual, reference_tensors(optimizer))


def test_groups_with_their_own_hyperparameters_and_the_model_over_them() -> None:
    first, second = parameter((30, 4), torch.float32), parameter((50,), torch.bfloat16, 0.01)
    groups = [
        {"params": [first], "name": "body", "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
        {"params": [second], "name": "head", "betas": (0.5, 0.9), "weight_decay": 0.0},
    ]
    optimizer = stepped(groups, decoupled=True, steps=4)
    assert "lr" not in measured(optimizer), "two learning rates have no one value"
    agrees(optimizer)
    for index, name in enumerate(["body", "head"]):
        for kernel in KERNELS:
            tensors = reference_tensors(optimizer, group=index)
            assert_agree(measured(optimizer, name, kernel), tensors, kernel)


def test_decay_of_both_kinds_has_no_one_norm() -> None:
    groups = [
        {"params": [parameter((3,), torch.float32)], "decoupled_weight_decay": True},
        {"params": [parameter((3,), torch.float32)]},
    ]
    optimizer = stepped(groups, decoupled=False, weight_decay=0.1)
    assert "decay_norm" not in measured(optimizer)
    agrees(optimizer)


def test_a_parameter_without_a_gradient_takes_no_part() -> None:
    seen, unseen = parameter((3, 2), torch.float32), parameter((9,), torch.float32)
    optimizer = stepped([seen, unseen], decoupled=True)
    unseen.grad = None
    optimizer.step()
    agrees(optimizer)
    assert measured(optimizer)["weight_norm"] == pytest.approx(seen.norm().item())


def test_no_gradient_at_all_measures_nothing() -> None:
    metric = AdamStatistics()
    metric.update(Adam([parameter((3,), torch.float32)]))
    assert metric.compute() == {}


def test_a_measurement_replaces_the_last_one() -> None:
    weight = parameter((3, 2), torch.float32)
    metric = AdamStatistics()
    metric.update(stepped([weight], decoupled=True, steps=1))
    optimizer = stepped([weight], decoupled=True, steps=2)
    metric.update(optimizer)
    assert metric.compute()["adam_moments/grad_norm"] == pytest.approx(weight.grad.norm().item())  # type: ignore[union-attr]


def test_scopes_and_optimizer_names_make_the_keys() -> None:
    groups = [{"params": [parameter((3,), torch.float32)], "name": "the head!"}]
    metric = AdamStatistics(scopes=["group"], optimizer_name="generator")
    metric.update(stepped(groups, decoupled=True))
    keys = metric.compute()
    assert "adam_schedule/lr/optimizer/generator/group/the_head_" in keys
    assert all(key.endswith("/optimizer/generator/group/the_head_") for key in keys)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_what_is_measured_is_what_the_papers_step_does(
    decoupled: bool, amsgrad: bool, maximize: bool
) -> None:
    """update_norm, decay_norm and alignment from a float64 replay that never saw torch's state."""
    settings = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "weight_decay": 0.3,
        "amsgrad": amsgrad,
        "maximize": maximize,
    }
    start = torch.randn(40, dtype=torch.float64)
    grads = [torch.randn(40, dtype=torch.float64) for _ in range(6)]
    weight = nn.Parameter(start.clone())
    optimizer = stepped(
        [weight], steps=6, grad=lambda _, step: grads[step], decoupled=decoupled, **settings
    )
    arrays = [each.numpy() for each in grads]
    replay: Any = {**settings, "decoupled": decoupled}
    before = replay_adam(start.numpy(), arrays[:-1], **replay)["parameter"]
    after = replay_adam(start.numpy(), arrays, **replay)
    shrunk = before * (1 - 0.01 * 0.3) if decoupled else before
    actual = measured(optimizer)
    assert actual["update_norm"] == pytest.approx(((after["parameter"] - shrunk) ** 2).sum() ** 0.5)
    strength = 0.01 * 0.3 if decoupled else 0.3
    assert actual["decay_norm"] == pytest.approx((strength**2 * (before**2).sum()) ** 0.5)
    assert actual["exp_avg_rms"] == pytest.approx((after["exp_avg"] ** 2).mean() ** 0.5)
    assert actual["exp_avg_sq_mean"] == pytest.approx(after["exp_avg_sq"].mean())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "expanded_grad"])
def test_more_elements_than_a_piece_in_any_layout(layout: str) -> None:
    size = eager.PIECE + 12345
    if layout == "channels_last":
        data = torch.randn(2, 35, 41, 37).to(memory_format=torch.channels_last)
    elif layout == "transposed":
        data = torch.randn(5, size // 5 + 1).t()
    else:
        data = torch.randn(size)
    weight = nn.Parameter(data)

    def grad(weight: Tensor, step: int) -> Tensor:
        if layout == "expanded_grad":
            return torch.full((), 0.5 + step).expand(weight.shape)
        return torch.randn(weight.shape)

    optimizer = stepped([weight], grad=grad, decoupled=True, weight_decay=0.1)
    assert weight.numel() > eager.PIECE
    agrees(optimizer)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("contiguous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_temporaries_stay_below_32_megabytes(contiguous: bool, kernel: str) -> None:
    """In a process of its own: the peak of its memory is what is asserted."""
    script = f"""
        import resource, torch
        from lightning_adam import AdamStatistics

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def optimizer(rows):
            weight = torch.nn.Parameter(torch.randn(rows, 1000))
            if not {contiguous}:
                weight = torch.nn.Parameter(weight.detach().t())
            weight.grad = torch.randn(weight.shape)
            adam = torch.optim.AdamW([weight], weight_decay=0.1, amsgrad=True, fused=True)
            adam.step()
            return adam

        torch.set_num_threads(1)
        AdamStatistics("all", kernel="{kernel}").update(optimizer(70), histograms=True)
        large = optimizer(20_000)
        before = peak()
        scopes = ["model", "group", "layer", "tensor"]
        metric = AdamStatistics("all", scopes, kernel="{kernel}")
        metric.update(large, histograms=True)
        metric.compute()
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 32
