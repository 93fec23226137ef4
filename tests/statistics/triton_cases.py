"""The Triton kernel, interpreted: `test_triton.py` runs these in a separate process.

By hand: `pytest -p tests.statistics.triton_interpreter tests/statistics/triton_cases.py`.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.optim import Adam, NAdam, Optimizer

from lightning_adam import AdamStatistics
from lightning_adam.statistics.columns import COLUMNS, Capabilities
from lightning_adam.statistics.kernels import eager, triton, triton_table
from lightning_adam.statistics.state_reader import StateReader
from tests.statistics.cases import reference_tensors, stepped
from tests.statistics.generated_states import build, parameter_groups
from tests.statistics.triton_agreement import ALL, assert_counts_agree, assert_rows_agree
from tests.support.agreement import assert_agree, bare

STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses small chunks, so that tensors of several chunks are interpreted quickly."""
    monkeypatch.setattr(triton, "CHUNK", 1024)


def assert_agrees(
    optimizer: Optimizer, columns: list[str] = ALL, reader: StateReader | None = None
) -> Tensor:
    states = (reader or StateReader()).after_step(optimizer)
    rows = triton.measure(states, columns)
    assert_rows_agree(states, rows, columns)
    groups = [index % 2 for index in range(len(states))]
    assert_counts_agree(states, triton.count_exponents(states, groups, 3), groups)
    return rows


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]


def noisy(scale: float) -> Callable[[Tensor, int], Tensor]:
    return lambda parameter, step: (torch.randn(parameter.shape) * scale).to(parameter.dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "adam",
    [
        {"decoupled": True, "weight_decay": 0.01, "eps": 1e-8},
        {"decoupled": True, "weight_decay": 0.0, "eps": 1e-15, "amsgrad": True},
        {"decoupled": True, "weight_decay": 1e-7, "eps": 1e-3, "lr": 1e-5, "maximize": True},
        {"decoupled": False, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True, "maximize": True},
        {"decoupled": False, "weight_decay": 0.0, "eps": 1e-15, "betas": (0.0, 0.0)},
    ],
    ids=["adamw", "adamw_amsgrad", "adamw_maximize", "adam_decayed", "adam_without_memory"],
)
def test_agrees(dtype: torch.dtype, adam: dict[str, Any]) -> None:
    shapes = [(1100,), (5, 7), (0,)]
    assert_agrees(stepped(weights(*shapes, dtype=dtype), grad=noisy(1e-3), **adam))


@pytest.mark.parametrize("elements", [1, 512, 513, 1024, 1025])
def test_agrees_at_the_edges_of_blocks_and_chunks(elements: int) -> None:
    assert_agrees(stepped(weights((elements,)), decoupled=True))


@pytest.mark.parametrize("place", ["parameter", "grad", *STATE])
@pytest.mark.parametrize(("special", "decoupled"), [(math.nan, True), (math.inf, False)])
def test_nonfinite_values_propagate(special: float, place: str, decoupled: bool) -> None:
    weight = weights((1500,))
    optimizer = stepped(weight, decoupled=decoupled, amsgrad=True, weight_decay=0.1)
    tensors = {"parameter": weight[0].data, "grad": weight[0].grad, **optimizer.state[weight[0]]}
    tensors[place][1200] = special
    assert_agrees(optimizer)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("decoupled", [True, False])
def test_agrees_for_idle_elements_and_zero_second_moments(eps: float, decoupled: bool) -> None:
    def grad(parameter: Tensor, step: int) -> Tensor:
        values = torch.randn(parameter.shape)
        values.view(-1)[::3] = 0
        return values

    parameters = weights((40, 20))
    optimizer = stepped(parameters, grad=grad, decoupled=decoupled, eps=eps, weight_decay=0.1)
    optimizer.state[parameters[0]]["exp_avg_sq"].view(-1)[::5] = 0
    optimizer.state[parameters[0]]["exp_avg"].view(-1)[::15] = 0
    assert_agrees(optimizer)


def test_agrees_for_different_settings_and_steps() -> None:
    parameters = weights(*[(90,)] * 4)
    groups = [
        {"params": parameters[:1], "lr": 1e-2, "betas": (0.5, 0.6), "weight_decay": 0.3},
        {"params": parameters[1:3], "eps": 1e-3, "maximize": True, "amsgrad": True},
        {"params": parameters[3:], "lr": 0.0},
    ]
    optimizer = stepped(groups, decoupled=True)
    optimizer.state[parameters[2]]["step"].fill_(1000)
    assert_agrees(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_settings_in_tensors_are_those_in_numbers(dtype: torch.dtype) -> None:
    optimizer = stepped(weights((90,), (5,)), decoupled=True)
    numbers = [torch.tensor(number, dtype=dtype) for number in (1e-3, 0.9, 0.99)]
    rows = []
    for lr, *betas in (numbers, [number.item() for number in numbers]):
        optimizer.param_groups[0].update(lr=lr, betas=tuple(betas))
        rows.append(triton.measure(StateReader().after_step(optimizer), ALL))
    assert torch.equal(*rows)
    assert_agrees(optimizer)


def test_agrees_for_an_integer_step() -> None:
    parameters = weights((90,), (5,), (7,))
    optimizer = stepped(parameters, decoupled=True)
    optimizer.state[parameters[0]]["step"] = optimizer.state[parameters[0]]["step"].long()
    optimizer.state[parameters[1]]["step"] = 3
    assert_agrees(optimizer)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "channels_last": lambda values: values.to(memory_format=torch.channels_last),
    "every_second": lambda values: torch.stack([values, values], dim=-1)[..., 1],
    "expanded": lambda values: values[:1].expand(values.shape),
}


@pytest.mark.parametrize(
    ("weight_layout", "grad_layout"),
    [
        ("channels_last", "channels_last"),
        ("channels_last", "contiguous"),
        ("every_second", "every_second"),
        ("contiguous", "expanded"),
        ("expanded", "contiguous"),
    ],
)
def test_agrees_for_any_strides(weight_layout: str, grad_layout: str) -> None:
    parameters = [nn.Parameter(LAYOUTS[weight_layout](torch.randn(4, 6, 3, 5))), *weights((7,))]
    optimizer = Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
        if parameter.ndim == 4:
            parameter.grad = LAYOUTS[grad_layout](parameter.grad)
        state = {name: torch.empty_like(parameter).normal_().abs_() for name in STATE[:2]}
        optimizer.state[parameter].update(step=torch.tensor(3.0), **state)
    assert_agrees(optimizer)


def test_agrees_for_different_dtypes() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    parameters = [each for dtype in dtypes for each in weights((90,), dtype=dtype)]
    optimizer = stepped(parameters, decoupled=True, weight_decay=0.1)
    assert_agrees(optimizer)
    for parameter, dtype in zip(parameters, [torch.float16, torch.float32] * 2, strict=True):
        state = optimizer.state[parameter]
        state.update({name: state[name].to(dtype) for name in STATE[:2]})
        parameter.grad_dtype = None
        assert parameter.grad is not None
        parameter.grad = parameter.grad.to(torch.bfloat16)
    assert_agrees(optimizer)


def test_agrees_for_some_columns_only() -> None:
    optimizer, reader = stepped(weights((90,), (0,)), decoupled=True), StateReader()
    for columns in (["elements"], ["exp_avg_sq_roots"], ["step", "grad_max_abs"], ["elements"]):
        assert_agrees(optimizer, columns, reader)


def test_next_measurements_agree() -> None:
    """Changes are detected by address."""
    parameters = weights((90,), (1100,), (5,))
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1}]
    optimizer, reader = stepped(groups, decoupled=True, weight_decay=0.1), StateReader()
    other = {name: copy.deepcopy(value) for name, value in optimizer.state_dict().items()}
    with torch.device("meta"):
        states = reader.after_step(optimizer)
        first = triton.measure(states, ALL)
    assert_rows_agree(states, first, ALL)

    def replace_gradients() -> None:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)

    def change_settings() -> None:
        optimizer.param_groups[1].update(lr=0.3, maximize=True)
        optimizer.param_groups[0].update(betas=(0.8, torch.tensor(0.9)), eps=1e-3)

    def replace_data() -> None:
        parameters[1].data = torch.randn(1100)

    def leave_out_a_parameter() -> None:
        parameters[0].grad = None

    changes = (replace_gradients, optimizer.step, change_settings, replace_data)
    for change in (*changes, lambda: optimizer.load_state_dict(other), leave_out_a_parameter):
        change()
        assert_agrees(optimizer, reader=reader)


def test_steps_on_the_host_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_table, "_is_on", lambda *_: False)
    optimizer, reader = stepped(weights((90,), (5,)), decoupled=True), StateReader()
    for _ in range(2):
        assert_agrees(optimizer, reader=reader)
        optimizer.step()


def test_agrees_for_an_optimizer_without_step() -> None:
    parameters = weights((90,))
    optimizer = NAdam(parameters)
    parameters[0].grad = torch.randn(90)
    optimizer.step()
    del optimizer.state[parameters[0]]["step"]
    columns = [name for name in ALL if COLUMNS[name].needs < Capabilities.STEP]
    states = StateReader().after_step(optimizer)
    assert_rows_agree(states, triton.measure(states, columns), columns)


def test_agrees_for_empty_tensors_only() -> None:
    assert_agrees(stepped(weights((0,), (3, 0)), decoupled=True))


def test_result_is_deterministic() -> None:
    states = StateReader().after_step(stepped(weights((3000,), (5,)), decoupled=True))
    first, second = triton.measure(states, ALL), triton.measure(states, ALL)
    assert first.numpy().tobytes() == second.numpy().tobytes()


def test_only_extreme_chunks_are_measured_again_in_float64() -> None:
    """In float64, the sums agree with `eager` to more digits than float32 has."""
    parameters = weights((1000,), (1000,))
    optimizer = stepped(parameters, decoupled=True)
    parameters[1].data *= 1e-20
    states = StateReader().after_step(optimizer)
    columns = ["weight_squares", "normalized_update_squares"]
    error = (triton.measure(states, columns) / eager.measure(states, columns) - 1).abs()
    assert (error[0] > 1e-14).all()
    assert (error[1] < 1e-14).all()


def test_chunk_with_a_decay_that_float32_cannot_square_is_measured_again() -> None:
    parameters = weights((900,))
    optimizer = stepped(parameters, decoupled=False, lr=0.0, weight_decay=0.1)
    parameters[0].data.fill_(1e-12)
    optimizer.state[parameters[0]]["exp_avg_sq"].fill_(1e14)
    assert_agrees(optimizer)


def test_element_is_active_by_a_decay_that_underflows_in_float32() -> None:
    parameters = weights((90,))
    optimizer = stepped(parameters, grad=noisy(0.0), decoupled=False, lr=0.0, weight_decay=0.01)
    parameters[0].data.fill_(1e-44)
    for name in STATE[:2]:
        optimizer.state[parameters[0]][name].zero_()
    assert_agrees(optimizer)


def test_metric_uses_the_kernel() -> None:
    optimizer = stepped(weights((90,)), decoupled=True)
    ours, theirs = (AdamStatistics("all", kernel=name)(optimizer) for name in ("triton", "eager"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours != theirs


@settings(max_examples=15, deadline=None)
@given(groups=parameter_groups(), seed=st.integers(0, 2**31))
def test_any_state_agrees(groups: list[dict[str, Any]], seed: int) -> None:
    """Compares columns with the eager kernel and statistics with the reference."""
    optimizer = build(groups, seed)
    assert_agrees(optimizer)
    values = AdamStatistics("all", scopes=["model"], kernel="triton")(optimizer)
    assert_agree(bare(values, ""), reference_tensors(optimizer), "triton")
