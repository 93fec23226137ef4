"""The CPU kernel: what it leaves to the eager one, and what it leaves alone in the process."""

import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam import AdamStatistics
from lightning_adam._private.openmp import TORCH, _parallel, _runtime_of_torch, run_in_team
from lightning_adam.statistics import kernels
from lightning_adam.statistics.accumulators import COLUMNS
from lightning_adam.statistics.kernels import eager, numba
from lightning_adam.statistics.views import Views
from tests.statistics.cases import stepped

ALL = [name for name in COLUMNS if name != "skipped_steps"]


def in_a_new_process(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def rows(optimizer: Optimizer) -> Tensor:
    return kernels.measure(Views().after_step(optimizer), ALL, "numba")


@pytest.mark.slow
@pytest.mark.skipif("x86" not in os.uname().machine, reason="the names of x86's instructions")
def test_the_loops_are_made_of_vector_instructions(tmp_path: Path) -> None:
    """One int64 among the int32, or one index that may be negative, and they are not."""
    script = """
        import torch
        from lightning_adam import AdamStatistics
        from lightning_adam.statistics.kernels.numba_loops import add_items, count_items

        for dtype in (torch.float32, torch.bfloat16):
            for decoupled in (True, False):
                weight = torch.nn.Parameter(torch.randn(2000).to(dtype))
                adam = torch.optim.Adam(
                    [weight], weight_decay=0.1, decoupled_weight_decay=decoupled, fused=True
                )
                weight.grad = torch.randn(2000).to(dtype)
                adam.step()
                AdamStatistics("all", kernel="numba").update(adam, histograms=True)
        for function in (add_items, count_items):
            for assembly in function.inspect_asm().values():
                print(assembly, "\\n=====")
    """
    # What is read back from numba's cache cannot be inspected.
    loops = in_a_new_process(script, NUMBA_CACHE_DIR=str(tmp_path)).split("=====")[:-1]
    assert len(loops) == 8
    for assembly in loops:
        assert re.search(r"\bv?sqrtps\b", assembly), "no square roots of several elements at once"
        assert re.search(r"\bv?divps\b", assembly)
        assert not re.search(r"gather[dq](ps|d)\b", assembly), "elements are not read in a row"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what Linux says is loaded")
def test_no_second_openmp_is_loaded_and_forked_workers_can_measure() -> None:
    script = """
        import re
        import torch
        from torch.utils.data import DataLoader, Dataset
        from lightning_adam import AdamStatistics

        torch.set_num_threads(3)

        def runtimes():
            maps = open("/proc/self/maps").read()
            return set(re.findall(r"/\\S*lib[gi]?omp\\S*", maps))

        def measured():
            torch.manual_seed(0)
            weight = torch.nn.Parameter(torch.randn(2_000_000))
            adam = torch.optim.AdamW([weight])
            weight.grad = torch.randn(2_000_000)
            adam.step()
            statistics = AdamStatistics("all", kernel="numba")
            statistics.update(adam, histograms=True)
            return statistics.compute()

        class Measurements(Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, index):
                # torch itself hangs in a fork if it has more than one.
                torch.get_num_threads = lambda: 3
                return torch.tensor(list(measured().values()))

        torch.randn(100_000).sum()
        before = runtimes()
        here = torch.tensor(list(measured().values()))
        assert runtimes() == before, runtimes() - before
        workers = DataLoader(
            Measurements(), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        for there in workers:
            assert torch.allclose(there, here, equal_nan=True)
        print("done")
    """
    assert "done" in in_a_new_process(script)


@pytest.mark.parametrize("has_team", [True, False])
def test_the_numbers_do_not_depend_on_the_threads(
    has_team: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_team:
        monkeypatch.setattr(numba, "run_in_team", lambda *_: False)
    optimizer = stepped(weights((1000, 1000), (300,), (700, 900)), decoupled=True)
    threads = torch.get_num_threads()
    measured = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            views = Views().after_step(optimizer)
            measured.append((rows(optimizer), kernels.count_exponents(views, [0, 1, 0], "numba")))
    finally:
        torch.set_num_threads(threads)
    for matrix, counts in measured[1:]:
        assert torch.equal(matrix, measured[0][0])
        assert torch.equal(counts, measured[0][1])


def small_gradients(optimizer: Optimizer) -> None:
    parameter = optimizer.param_groups[0]["params"][1]
    parameter.grad.mul_(1e-25)


def large_moments(optimizer: Optimizer) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg"].mul_(1e20)


def nan(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"][1].data[3] = float("nan")


def all_update(optimizer: Optimizer) -> None:
    """As after the first step from zero."""
    parameter = optimizer.param_groups[0]["params"][1]
    state = optimizer.state[parameter]
    first, second = state["exp_avg"] / (1 - 0.9**3), state["exp_avg_sq"] / (1 - 0.999**3)
    parameter.data = -1e-3 * first / (second.sqrt() + 1e-8)


def gaps_in_memory(optimizer: Optimizer) -> None:
    parameter = optimizer.param_groups[0]["params"][1]
    parameter.grad = torch.stack([parameter.grad, parameter.grad], dim=1)[:, 0]


def healthy(optimizer: Optimizer) -> None:
    """Nothing is left."""


@pytest.mark.parametrize(
    ("change", "is_left"),
    [
        (healthy, False),
        (small_gradients, True),
        (large_moments, True),
        (nan, True),
        (all_update, True),
        (gaps_in_memory, True),
    ],
)
def test_what_float32_does_not_do_justice_to_is_left_to_eager(
    change: Any, is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    measure = eager.measure

    def spy(views: Any, columns: Any) -> Tensor:
        left.extend(view.place.tensor for view in views)
        return measure(views, columns)

    optimizer = stepped(weights((50,), (40,), (30,)), decoupled=True, weight_decay=0.1)
    change(optimizer)
    monkeypatch.setattr(eager, "measure", spy)
    rows(optimizer)
    assert left == (["group_0.1"] if is_left else [])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_no_warning_of_numpy_reaches_the_training(weight_decay: float) -> None:
    optimizer = stepped(weights((50,), (40,), (0,)), decoupled=True, weight_decay=weight_decay)
    nan(optimizer)
    optimizer.param_groups[0]["params"][0].grad[3] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = AdamStatistics("all", ["model", "tensor"], kernel="numba")
        statistics.update(optimizer, histograms=True)
        assert len(statistics.compute()) > 80


@pytest.mark.parametrize("settings", [{"eps": 1e-20}, {"lr": float("inf")}])
def test_settings_that_float32_cannot_hold_are_left_too(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = stepped(weights((50,)), decoupled=True)
    optimizer.param_groups[0].update(settings)
    expected = kernels.measure(Views().after_step(optimizer), ALL, "eager")
    assert torch.equal(rows(optimizer).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_one_order_in_memory_is_enough(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = torch.randn(4, 6, 5, 7).to(memory_format=layout)
    weight = nn.Parameter(data)

    def grad(weight: Tensor, step: int) -> Tensor:
        return torch.randn_like(weight)

    optimizer = stepped([weight], grad=grad, decoupled=True)
    expected = kernels.measure(Views().after_step(optimizer), ALL, "eager")
    monkeypatch.setattr(eager, "measure", None)
    assert torch.allclose(rows(optimizer), expected, rtol=1e-5, atol=0)


def test_thousands_of_tensors_and_empty_ones() -> None:
    shapes = [(index % 7, 3) for index in range(3000)]
    optimizer = stepped(weights(*shapes), decoupled=True, weight_decay=0.1, fused=True)
    views = Views().after_step(optimizer)
    measured, expected = rows(optimizer), kernels.measure(views, ALL, "eager")
    signed = ("exp_avg_sum", "exp_avg_times_entered", "decay_times_update")
    sums = [name for name in ALL if name not in signed]
    chosen = [ALL.index(name) for name in sums]
    assert torch.allclose(measured[:, chosen], expected[:, chosen], rtol=1e-5, atol=1e-30)
    groups = [index % 3 for index in range(3000)]
    counted = kernels.count_exponents(views, groups, "numba")
    assert torch.equal(counted, kernels.count_exponents(views, groups, "eager"))


@pytest.mark.parametrize("has_team", [True, False])
def test_a_fault_in_any_thread_is_raised(has_team: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_team:
        monkeypatch.setattr(numba, "run_in_team", lambda *_: False)
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
def test_torchs_own_threads_do_the_work() -> None:
    assert _parallel() is not None
    seen = []
    assert run_in_team(lambda: seen.append(threading.get_ident()), 3)
    assert len(set(seen)) == 3
    assert threading.get_ident() in seen


@pytest.mark.parametrize(
    ("loaded", "taken"),
    [
        ([], None),
        (["/usr/lib/libgomp.so.1"], "/usr/lib/libgomp.so.1"),
        ([f"{TORCH}lib/libgomp.so.1"], f"{TORCH}lib/libgomp.so.1"),
        (
            ["/scikit_learn.libs/libgomp-1.so", f"{TORCH}lib/libgomp.so.1"],
            f"{TORCH}lib/libgomp.so.1",
        ),
        (["/scikit_learn.libs/libgomp-1.so", "/usr/lib/libgomp.so.1"], None),
        (["/mkl/libiomp5.so", f"{TORCH}lib/libgomp.so.1"], None),
        (["/llvm/libomp.so"], None),
    ],
)
def test_the_runtime_is_torchs_own_or_none(loaded: list[str], taken: str | None) -> None:
    lines = [f"7f00-7f01 r-xp 00000000 fe:00 12    {each}" for each in [*loaded, "/lib/libc.so"]]
    assert _runtime_of_torch("\n".join(lines)) == taken


def test_turns_cover_every_item_once() -> None:
    for elements in ([0], [1], [10**6, 5, 0, 3 * 10**6], [1000] * 2000, [7] * 5):
        items, firsts = numba._items(torch.tensor(elements).numpy())
        covered = [0] * len(elements)
        for tensor, start, end in items.tolist():
            assert start == covered[tensor]
            covered[tensor] = end
        assert covered == elements
        assert items[firsts, 1].tolist() == [0] * len(elements)
        turns = numba._turns(items)
        assert [first for first, _ in turns] == [0, *(last for _, last in turns[:-1])]
        assert turns[-1][1] == len(items)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts() -> None:
    """Pages that nobody has written to take no memory."""
    elements = 2**31 + 5000

    def zeros() -> Tensor:
        # torch.zeros would write.
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
    assert values["adam_moments/grad_norm"] == 12**0.5
    assert values["adam_underflow/grad_zero_fraction"] == (elements - 3) / elements
    assert values["adam_underflow/exp_avg_sq_zero_fraction"] == 3 / elements
    assert statistics.compute_exponents()["adam_histogram/grad"][128] == 3
