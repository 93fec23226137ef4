"""The CPU kernel: fallback to the eager kernel, float64, threads and chunks."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam import AdamStatistics
from lightning_adam._compat.openmp import TORCH, _parallel, _runtime_of_torch, run_in_team
from lightning_adam.statistics import kernels
from lightning_adam.statistics.columns import COLUMNS
from lightning_adam.statistics.kernels import eager, numba
from lightning_adam.statistics.param_states import ParamStates
from lightning_adam.statistics.state_reader import StateReader
from tests.statistics.cases import stepped
from tests.support.tables import each_row

ALL = list(COLUMNS)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def rows(optimizer: Optimizer) -> Tensor:
    return kernels.measure(StateReader().after_step(optimizer), ALL, "numba")


@pytest.fixture(params=[True, False], ids=["team", "pool"])
def _with_and_without_team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(numba, "run_in_team", lambda *_: False)


@pytest.mark.usefixtures("_with_and_without_team")
def test_values_do_not_depend_on_the_number_of_threads() -> None:
    optimizer = stepped(weights((1000, 1000), (300,), (700, 900)), decoupled=True)
    threads = torch.get_num_threads()
    measured = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            states = StateReader().after_step(optimizer)
            measured.append(
                (rows(optimizer), kernels.count_exponents(states, [0, 1, 0], 2, "numba"))
            )
    finally:
        torch.set_num_threads(threads)
    for matrix, counts in measured[1:]:
        assert torch.equal(matrix, measured[0][0])
        assert torch.equal(counts, measured[0][1])


def all_update(parameter: Any, state: dict[str, Tensor]) -> None:
    """Makes the parameter equal to its update, as after the first step from zero."""
    first, second = state["exp_avg"] / (1 - 0.9**3), state["exp_avg_sq"] / (1 - 0.999**3)
    parameter.data.copy_(-1e-3 * first / (second.sqrt() + 1e-8))


def with_gaps(values: Tensor) -> Tensor:
    return torch.stack([values, values], dim=1)[:, 0]


def gaps_in_gradient(parameter: Any, state: dict[str, Tensor]) -> None:
    parameter.grad = with_gaps(parameter.grad)


def gaps_in_all_tensors(parameter: Any, state: dict[str, Tensor]) -> None:
    parameter.data, parameter.grad = with_gaps(parameter.data), with_gaps(parameter.grad)
    state.update({name: with_gaps(state[name]) for name in ("exp_avg", "exp_avg_sq")})


UNSUITABLE: dict[str, Callable[[Any, dict[str, Tensor]], object]] = {
    "small gradients": lambda parameter, state: parameter.grad.mul_(1e-25),
    "large moments": lambda parameter, state: state["exp_avg"].mul_(1e20),
    "nan": lambda parameter, state: parameter.data[3:4].fill_(torch.nan),
    "all update": all_update,
}
"""Changes after which float32 is not accurate."""
WITH_GAPS = (gaps_in_gradient, gaps_in_all_tensors)
"""Changes after which tensors cannot be read as flat arrays."""


def test_eager_kernel_measures_tensors_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    measure = eager.measure

    def spy(states: Any, columns: Any) -> Tensor:
        left.extend(state.name.tensor for state in states)
        return measure(states, columns)

    monkeypatch.setattr(eager, "measure", spy)
    with each_row() as row:
        for change in WITH_GAPS:
            left.clear()
            parameters = weights((50,), (40,), (30,))
            optimizer = stepped(parameters, decoupled=True, weight_decay=0.1)
            change(parameters[1], optimizer.state[parameters[1]])
            with row(change.__name__):
                rows(optimizer)
                assert left == ["group_0.1"]


def test_float64_is_used_only_while_float32_is_not_accurate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager, "measure", None)
    with each_row() as row:
        for name, change in {"healthy": lambda *_: None, **UNSUITABLE}.items():
            parameters = weights((50,), (40,), (30,))
            optimizer = stepped(parameters, decoupled=True, weight_decay=0.1)
            states = StateReader().after_step(optimizer)
            state, grad = optimizer.state[parameters[1]], parameters[1].grad
            assert grad is not None
            tensors = [parameters[1].data, grad, state["exp_avg"], state["exp_avg_sq"]]
            kept = [each.clone() for each in tensors]
            change(parameters[1], state)
            with row(name):
                assert exact_tensors(states) == ([] if name == "healthy" else [1])
                for tensor, values in zip(tensors, kept, strict=True):
                    tensor.copy_(values)
                assert exact_tensors(states) == []


def exact_tensors(states: ParamStates) -> list[int]:
    """Measures twice and returns the tensors that float64 will measure."""
    for _ in range(2):
        kernels.measure(states, ALL, "numba")
    batches = states.layout.prepared["numba"].batches
    return [int(index) for batch in batches for index in batch.indexes[batch.is_exact]]


def test_every_input_agrees_with_the_eager_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    for measure in ("eager", "numba"):
        torch.manual_seed(0)
        for change in UNSUITABLE.values():
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                parameters = weights((50,), (40,), (30,), dtype=dtype)
                optimizer = stepped(parameters, decoupled=True, weight_decay=0.1)
                change(parameters[1], optimizer.state[parameters[1]])
                states = StateReader().after_step(optimizer)
                expected.append(kernels.measure(states, ALL, measure))
                if measure == "eager":
                    continue
                monkeypatch.setattr(eager, "measure", None)
    half = len(expected) // 2
    for one, other in zip(expected[:half], expected[half:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_numpy_warnings_are_suppressed(weight_decay: float) -> None:
    parameters: Any = weights((50,), (40,), (0,))
    optimizer = stepped(parameters, decoupled=True, weight_decay=weight_decay)
    parameters[0].grad[3], parameters[1].data[3] = torch.inf, torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = AdamStatistics("all", ["model", "tensor"], kernel="numba")
        statistics.update(optimizer, histograms=True)
        assert len(statistics.compute()) > 80


@pytest.mark.parametrize("settings", [{"eps": 1e-35}, {"eps": 0.0}, {"lr": float("inf")}], ids=str)
def test_settings_outside_float32_agree_with_the_eager_kernel(settings: dict[str, Any]) -> None:
    optimizer = stepped(weights((50,)), decoupled=True)
    optimizer.param_groups[0].update(settings)
    expected = kernels.measure(StateReader().after_step(optimizer), ALL, "eager")
    torch.testing.assert_close(rows(optimizer), expected, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_dense_tensors_of_any_strides_are_measured_without_the_eager_kernel(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.randn(4, 6, 5, 7).to(memory_format=layout))
    optimizer = stepped([weight], grad=lambda weight, _: torch.randn_like(weight), decoupled=True)
    expected = kernels.measure(StateReader().after_step(optimizer), ALL, "eager")
    monkeypatch.setattr(eager, "measure", None)
    assert torch.allclose(rows(optimizer), expected, rtol=1e-5, atol=0)


def test_many_small_and_empty_tensors_agree_with_the_eager_kernel() -> None:
    number = 1000
    shapes = [(index % 7, 3) for index in range(number)]
    optimizer = stepped(weights(*shapes), decoupled=True, weight_decay=0.1, fused=True)
    states = StateReader().after_step(optimizer)
    measured, expected = rows(optimizer), kernels.measure(states, ALL, "eager")
    signed = ("exp_avg_sum", "exp_avg_times_effective_grad", "undecayed_times_update")
    sums = [name for name in ALL if name not in signed]
    chosen = [ALL.index(name) for name in sums]
    assert torch.allclose(measured[:, chosen], expected[:, chosen], rtol=1e-5, atol=1e-30)
    groups = [index % 3 for index in range(number)]
    counted = kernels.count_exponents(states, groups, 3, "numba")
    assert torch.equal(counted, kernels.count_exponents(states, groups, 3, "eager"))


@pytest.mark.usefixtures("_with_and_without_team")
def test_exception_in_any_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(turns: Any) -> list[tuple[int, int]]:
        taken = list(turns)
        if (0, 1) in taken:
            raise ZeroDivisionError
        return taken

    with pytest.raises(ZeroDivisionError):
        numba._in_threads(work, [(0, 1), (1, 2)])
    (taken,) = filter(None, numba._in_threads(work, [(1, 2)] * 2))
    assert taken == [(1, 2)] * 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux says is loaded")
def test_work_runs_in_the_threads_of_torch() -> None:
    assert _parallel() is not None
    seen = []
    assert run_in_team(lambda: seen.append(threading.get_ident()), 3)
    assert len(set(seen)) == 3
    assert threading.get_ident() in seen


LOADED = [
    ([], None),
    (["/usr/lib/libgomp.so.1"], "/usr/lib/libgomp.so.1"),
    ([f"{TORCH}lib/libgomp.so.1"], f"{TORCH}lib/libgomp.so.1"),
    (["/scikit_learn.libs/libgomp-1.so", f"{TORCH}lib/libgomp.so.1"], f"{TORCH}lib/libgomp.so.1"),
    (["/scikit_learn.libs/libgomp-1.so", "/usr/lib/libgomp.so.1"], None),
    (["/mkl/libiomp5.so", f"{TORCH}lib/libgomp.so.1"], None),
    (["/llvm/libomp.so"], None),
]
"""Loaded OpenMP runtimes, and the one of torch."""


def test_openmp_runtime_is_torchs_own_or_none() -> None:
    with each_row() as row:
        for loaded, expected in LOADED:
            paths = [*loaded, "/lib/libc.so"]
            lines = [f"7f00-7f01 r-xp 00000000 fe:00 12    {path}" for path in paths]
            with row(loaded):
                assert _runtime_of_torch("\n".join(lines)) == expected


def column_after_first_step(name: str, weight: Tensor, grad: float, eps: float) -> float:
    """Measures a column after a first step whose bias corrections are powers of two."""
    parameter = nn.Parameter(weight)
    parameter.grad = torch.full_like(weight, grad)
    adam = torch.optim.Adam([parameter], lr=2.0**-8, betas=(0.5, 0.75), eps=eps)
    adam.state[parameter] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.full_like(weight, grad / 2),
        "exp_avg_sq": torch.full_like(weight, grad**2 / 4),
    }
    return float(kernels.measure(StateReader().after_step(adam), [name], "numba")[0, 0])


def test_ties_round_to_even_in_bfloat16() -> None:
    # p - ηu is 1 + 2⁻⁸, halfway between 1 and p, and the last bit of p is set.
    weight = torch.full((8,), 1 + 2.0**-7, dtype=torch.bfloat16)
    assert column_after_first_step("update_lost", weight, 1.0, 1e-8) == 0


def test_eps_bounds_rms_ratio() -> None:
    lag = column_after_first_step("grad_over_second_moment", torch.ones(8), 1e-3, 1.0)
    assert lag == pytest.approx(8e-6)


def test_chunks_cover_every_item_once() -> None:
    for elements in ([0], [1], [10**6, 5, 0, 3 * 10**6], [1000] * 2000, [7] * 5):
        items, firsts = numba._items(torch.tensor(elements).numpy())
        covered = [0] * len(elements)
        for tensor, start, end in items.tolist():
            assert start == covered[tensor]
            covered[tensor] = end
        assert covered == elements
        assert items[firsts, 1].tolist() == [0] * len(elements)
        turns = numba._chunks(items)
        assert [first for first, _ in turns] == [0, *(last for _, last in turns[:-1])]
        assert turns[-1][1] == len(items)


@pytest.mark.slow
def test_elements_beyond_int32_are_counted() -> None:
    """Memory pages that are never written are not allocated."""
    elements = 2**31 + 5000

    def zeros() -> Tensor:
        # torch.zeros would write to all pages.
        return torch.from_numpy(np.zeros(elements, np.int16)).view(torch.bfloat16)

    weight = nn.Parameter(zeros())
    weight.grad = zeros()
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {
        "step": torch.tensor(1.0),
        "exp_avg": zeros(),
        "exp_avg_sq": zeros(),
    }
    weight.grad[-3:] = 2.0
    statistics = AdamStatistics(["grad_*", "exp_avg_sq_zero_fraction"], ["model"], kernel="numba")
    statistics.update(optimizer, histograms=True)
    values = statistics.compute()
    assert values["adam_gradient/grad_norm"] == 12**0.5
    assert values["adam_gradient/grad_zero_fraction"] == (elements - 3) / elements
    assert values["adam_underflow/exp_avg_sq_zero_fraction"] == 3 / elements
    assert statistics.compute_exponents()["adam_histogram/grad"][128] == 3
