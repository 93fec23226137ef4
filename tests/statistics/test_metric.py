"""All statistics of the model and each group, compared with the independent float64 reference."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_adam import AdamStatistics
from lightning_adam.statistics.kernels import eager
from tests.statistics.cases import KERNELS, noise, reference_tensors, stepped
from tests.support.agreement import assert_agree, bare
from tests.support.tables import each_row


def measured(
    optimizer: Optimizer, group: str | None = None, kernel: str = "eager"
) -> dict[str, float]:
    """Returns all statistics of one scope by name."""
    metric = AdamStatistics("all", ["model", "group"], kernel=kernel)
    metric.update(optimizer)
    return bare(metric.compute(), "" if group is None else f"group/{group}/")


def assert_agrees(optimizer: Optimizer) -> None:
    """Asserts that every kernel agrees with the reference."""
    for kernel in KERNELS:
        assert_agree(measured(optimizer, kernel=kernel), reference_tensors(optimizer), kernel)


def parameter(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape, dtype=torch.float64) * scale).to(dtype))


@settings(max_examples=40, deadline=None)
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
def test_trained_state_agrees_with_the_reference(
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
    assert_agrees(optimizer)


def test_nonfinite_values_are_counted_and_propagate() -> None:
    places = ("parameter", "grad", "exp_avg", "exp_avg_sq")
    with each_row() as row:
        for place, special in itertools.product(places, (math.nan, math.inf, -math.inf)):
            weight = parameter((4, 5), torch.float32)
            optimizer = stepped([weight], decoupled=True, weight_decay=0.1)
            tensors = {"parameter": weight.data, "grad": weight.grad, **optimizer.state[weight]}
            tensors[place][1, 2] = special
            with row((place, special)):
                actual = measured(optimizer)
                assert actual["nonfinite_count"] == 1
                assert_agree(actual, reference_tensors(optimizer))


def test_maximum_left_by_amsgrad_is_not_used_after_it_is_switched_off() -> None:
    weight = parameter((30, 4), torch.float32)
    optimizer = stepped([weight], decoupled=True, steps=4, amsgrad=True)
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.state[weight]["max_exp_avg_sq"].fill_(100.0)
    stale = {kernel: measured(optimizer, kernel=kernel) for kernel in KERNELS}
    del optimizer.state[weight]["max_exp_avg_sq"]
    assert stale == {kernel: measured(optimizer, kernel=kernel) for kernel in KERNELS}


def test_groups_with_different_hyperparameters_agree_with_the_reference() -> None:
    first, second = parameter((30, 4), torch.float32), parameter((50,), torch.bfloat16, 0.01)
    groups = [
        {"params": [first], "name": "body", "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
        {"params": [second], "name": "head", "betas": (0.5, 0.9), "weight_decay": 0.0},
    ]
    optimizer = stepped(groups, decoupled=True, steps=4)
    assert "eps" not in measured(optimizer), "two values of eps are not one value"
    assert_agrees(optimizer)
    for index, name in enumerate(["body", "head"]):
        for kernel in KERNELS:
            tensors = reference_tensors(optimizer, group=index)
            assert_agree(measured(optimizer, name, kernel), tensors, kernel)


def test_decay_norm_sums_coupled_and_decoupled_decay() -> None:
    groups = [
        {"params": [parameter((3,), torch.float32)], "decoupled_weight_decay": True},
        {"params": [parameter((3,), torch.float32)]},
    ]
    optimizer = stepped(groups, decoupled=False, weight_decay=0.1)
    norms = [measured(optimizer, f"group_{index}")["decay_norm"] for index in range(2)]
    assert measured(optimizer)["decay_norm"] == pytest.approx(math.hypot(*norms))
    assert_agrees(optimizer)


def test_parameter_without_gradient_is_not_measured() -> None:
    seen, unseen = parameter((3, 2), torch.float32), parameter((9,), torch.float32)
    optimizer = stepped([seen, unseen], decoupled=True)
    unseen.grad = None
    optimizer.step()
    assert_agrees(optimizer)
    assert measured(optimizer)["weight_norm"] == pytest.approx(seen.norm().item())


def test_no_gradient_gives_no_values() -> None:
    metric = AdamStatistics()
    metric.update(Adam([parameter((3,), torch.float32)]))
    assert metric.compute() == {}


def test_keys_contain_optimizer_name_and_scope() -> None:
    groups = [
        {"params": [parameter((3,), torch.float32)], "name": name} for name in ("the head!", "body")
    ]
    metric = AdamStatistics("lr", scopes=["model", "group"], optimizer_name="generator")
    metric.update(stepped(groups, decoupled=True))
    assert list(metric.compute()) == [
        "adam_schedule/optimizer/generator/lr",
        "adam_schedule/optimizer/generator/group/the_head_/lr",
        "adam_schedule/optimizer/generator/group/body/lr",
    ]


def test_single_group_is_the_model() -> None:
    optimizer = stepped([parameter((3,), torch.float32)], decoupled=True)
    for scopes in (["group"], ["model", "group"]):
        metric = AdamStatistics("lr", scopes)
        assert metric(optimizer, histograms=True) == {"adam_schedule/lr": 1e-3}
        assert len(metric.compute_exponents()) == 4


def test_two_groups_with_the_same_name_have_distinct_keys() -> None:
    weights = [parameter((3,), torch.float32) for _ in range(3)]
    groups = [{"params": [weight], "name": "decay"} for weight in weights]
    metric = AdamStatistics("weight_norm", ["group"])
    values = metric(stepped(groups, decoupled=True))
    norms = {
        f"decay{suffix}": weight.norm().item()
        for suffix, weight in zip(("", "_1", "_2"), weights, strict=True)
    }
    assert {key.split("/")[2]: value for key, value in values.items()} == pytest.approx(norms)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_update_and_decay_equal_the_change_of_the_weights(
    decoupled: bool, amsgrad: bool, maximize: bool
) -> None:
    weight = nn.Parameter(torch.randn(40, dtype=torch.float64))
    before = [weight.detach()]

    def grad(weight: Tensor, step: int) -> Tensor:
        before.append(weight.detach().clone())
        return noise(weight, step)

    flags = {"decoupled": decoupled, "amsgrad": amsgrad, "maximize": maximize}
    optimizer = stepped([weight], steps=6, grad=grad, lr=0.01, weight_decay=0.3, **flags)
    decay = (0.01 * 0.3 if decoupled else 0.3) * before[-1]
    update = before[-1] - weight.detach() - (decay if decoupled else 0)
    actual = measured(optimizer)
    assert actual["update_norm"] == pytest.approx(update.norm().item())
    if not decoupled:
        state = optimizer.state[weight]
        v = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        decay = 0.01 * decay / ((v / (1 - 0.999**6)).sqrt() + 1e-8)
    assert actual["decay_norm"] == pytest.approx(decay.norm().item())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "expanded_grad"])
def test_tensors_longer_than_a_piece_agree_in_any_layout(layout: str) -> None:
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
    assert_agrees(optimizer)
