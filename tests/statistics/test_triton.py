"""The Triton kernel: interpreted on the CPU, compiled without a device, and on a device."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from lightning_adam import AdamStatistics  # noqa: E402
from lightning_adam.statistics.columns import COLUMNS  # noqa: E402
from lightning_adam.statistics.kernels import eager, triton_programs, triton_rows, triton_table  # noqa: E402
from lightning_adam.statistics.kernels import triton as kernel  # noqa: E402
from lightning_adam.statistics.state_reader import StateReader  # noqa: E402
from tests.statistics.triton_agreement import (  # noqa: E402
    ALL,
    assert_counts_agree,
    assert_rows_agree,
)
from tests.support.commands import BIN, REPOSITORY, run  # noqa: E402

HERE = Path(__file__).parent
CHEAP = (
    "adam_decayed and bfloat16 or different or strides or idle_elements or blocks_and_chunks"
    " or some_columns or integer_step or tensors or (nonfinite and grad) or measurements or host"
    " or again"
)
"""The interpreted cases of the default tier; the others run in CI."""


@pytest.mark.parametrize(
    "names",
    [CHEAP, pytest.param(f"not ({CHEAP})", marks=pytest.mark.slow)],
    ids=["cheap", "others"],
)
def test_interpreted_kernel_agrees_with_the_eager_one(names: str, tmp_path: Path) -> None:
    """Runs `triton_cases.py`."""
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'cases'}", "-W", "ignore"]
    plugin = ["-p", "tests.statistics.triton_interpreter"]
    cases = [str(HERE / "triton_cases.py"), "-k", names]
    finished = run([str(BIN / "python"), "-m", "pytest", *options, *plugin, *cases], REPOSITORY)
    assert finished.returncode == 0, finished.output[-15_000:]
    assert " passed" in finished.output


FLOAT32, BFLOAT16 = (
    (triton_rows.DTYPE_CODES[dtype],) * 4 for dtype in (torch.float32, torch.bfloat16)
)
CHUNKS = {"table": "*i64", "grads": "*i64", "settings": "*fp64", "tensors_of_chunks": "*i64"}
SIZES = {"CHUNK": kernel.CHUNK, "ROWS": kernel.ROWS, "LANES": kernel.LANES}


def measuring(number: Any, codes: Any, amsgrad: bool, most: int, **sizes: Any) -> Any:
    constants = {"NEEDED": kernel.ALL_NEEDED, "NUMBER": number, **SIZES, **sizes}
    types = {**CHUNKS, "rows": "*fp64"}
    variant = {"CODES": codes, "AMSGRAD": amsgrad, **constants}
    return triton_programs.measure_chunks, types, variant, most


COMPILED: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "float32": measuring(tl.float32, FLOAT32, False, 144),
    "bfloat16": measuring(tl.float32, BFLOAT16, False, 168),
    "any_dtypes": measuring(tl.float32, kernel.ANY_DTYPES, True, 255),
    "float64": measuring(tl.float64, kernel.ANY_DTYPES, True, 255, ROWS=1),
    "settings": (
        triton_programs.collect_settings,
        {
            "table": "*i64",
            "steps": "*i64",
            "groups": "*i64",
            "settings": "*fp64",
            "tensors": "i32",
        },
        {"BLOCK": kernel.TENSORS},
        128,
    ),
    "adding_up": (
        triton_programs.add_up,
        {
            "table": "*i64",
            "settings": "*fp64",
            "rows": "*fp64",
            "slots": "*i64",
            "result": "*fp64",
            "columns": "i32",
        },
        {"CHUNK": kernel.CHUNK, "PARTS": kernel.PARTS, "PADDED_WIDTH": kernel.PADDED_WIDTH},
        255,
    ),
    "histograms": (
        triton_programs.count_chunks,
        {**CHUNKS, "groups": "*i64", "counts": "*i64"},
        {"CODES": FLOAT32, "AMSGRAD": False, "BINS": 256, **SIZES},
        128,
    ),
}
"""Kernel, argument types, constants, and the largest number of registers per thread."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernel_fits_into_registers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler finds type errors that the interpreter misses. Registers must not spill."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, types, constants, most = COMPILED[name]
    source = triton.compiler.ASTSource(
        fn=function,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=kernel.OPTIONS)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    used = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    assert used["REG"] <= most
    assert used["STACK"] == used["LOCAL"] == 0


def test_maxima_follow_sums() -> None:
    """The kernel distinguishes them by their position."""
    names: tuple[str, ...] = triton_rows.ElementColumns._fields[:-1]
    maxima = [COLUMNS[name].is_maximum for name in names]
    assert maxima == sorted(maxima)


class Program:
    """Replaces a program, and records its launches."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: self.launches.append(self.name)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launched programs."""
    names: list[str] = []
    for name in ("collect_settings", "measure_chunks", "add_up", "count_chunks"):
        monkeypatch.setattr(kernel, name, Program(name, names))
    return names


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The words of each copy to the device."""
    copies: list[list[int]] = []
    own = triton_table._pinned

    def pinned(words: Any, device: torch.device) -> torch.Tensor:
        copies.append(list(words))
        return own(words, device)

    monkeypatch.setattr(triton_table, "_pinned", pinned)
    return copies


def move_gradients(weights: list[nn.Parameter]) -> list[int]:
    """Moves the gradients of all parameters, and returns their new addresses."""
    grads = [torch.ones_like(weight) for weight in weights]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    return [grad.data_ptr() for grad in grads]


@pytest.mark.usefixtures("launches")
def test_next_measurement_sends_what_changed(sent: list[list[int]]) -> None:
    weights = [nn.Parameter(torch.randn(5)) for _ in range(7)]
    adam, reader = AdamW(weights), StateReader()
    step(adam)
    with torch.device("meta"):
        # Copies start on the CPU for any default device of torch.
        kernel.measure(reader.after_step(adam), ALL)
    sent.clear()
    addresses = move_gradients(weights)
    kernel.measure(reader.after_step(adam), ALL)
    assert sent == [addresses]
    sent.clear()
    kernel.measure(reader.after_step(adam), ALL)
    assert not sent
    adam.param_groups[0]["lr"] = 0.5
    kernel.measure(reader.after_step(adam), ALL)
    assert sent == [triton_table._bits([0.5]).tolist()]


def test_host_work_does_not_depend_on_the_number_of_tensors(launches: list[str]) -> None:
    """Except for work once per layout, and within built-in functions."""

    def calls(tensors: int) -> list[str]:
        weights = [nn.Parameter(torch.randn(5)) for _ in range(tensors)]
        adam, reader = AdamW(weights), StateReader()
        step(adam)
        kernel.measure(reader.after_step(adam), ALL)
        move_gradients(weights)
        states = reader.after_step(adam)
        called: list[str] = []

        def note(frame: FrameType, event: str, argument: object) -> None:
            if event == "call":
                called.append(frame.f_code.co_name)

        launches.clear()
        sys.setprofile(note)
        try:
            kernel.measure(states, ALL)
        finally:
            sys.setprofile(None)
        assert launches == ["collect_settings", *["measure_chunks"] * 2, "add_up"]
        return called

    assert calls(3) == calls(300)


without_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def needs_device(test: Callable[..., None]) -> Callable[..., None]:
    marked: Callable[..., None] = pytest.mark.gpu(pytest.mark.slow(without_device(test)))
    return marked


@contextmanager
def sync_is_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(dtype: torch.dtype = torch.float32, tensors: int = 3) -> list[nn.Parameter]:
    shapes = [(300, 700), (17,), ()]
    return [
        nn.Parameter((torch.randn(shapes[index % 3], device="cuda") * 0.1).to(dtype))
        for index in range(tensors)
    ]


def step(optimizer: Optimizer, scale: float = 1e-3) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter) * scale
    optimizer.step()


def assert_agrees(adam: Optimizer) -> None:
    states = StateReader().after_step(adam)
    groups = [index % 2 for index in range(len(states))]
    with sync_is_error():
        rows, counts = kernel.measure(states, ALL), kernel.count_exponents(states, groups, 2)
    assert_rows_agree(states, rows, ALL)
    assert_counts_agree(states, counts, groups)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "fused": lambda weights: AdamW(weights, fused=True),
    "fused_tensor_lr": lambda weights: AdamW(
        weights, lr=torch.tensor(1e-3, device="cuda"), fused=True
    ),
    "capturable": lambda weights: Adam(weights, capturable=True, weight_decay=0.1, amsgrad=True),
    "foreach": lambda weights: AdamW(weights, foreach=True, maximize=True, eps=1e-15),
}


@needs_device
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_agrees_on_the_device(optimizer: str, dtype: torch.dtype) -> None:
    adam = OPTIMIZERS[optimizer](on_device(dtype))
    for _ in range(3):
        step(adam)
    assert_agrees(adam)


@needs_device
@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, float("inf"), float("nan")])
def test_any_magnitude_agrees_on_the_device(scale: float) -> None:
    adam = AdamW(on_device(), fused=True, eps=1e-15)
    step(adam, scale)
    assert_agrees(adam)


@needs_device
def test_subnormal_second_moments_on_the_device() -> None:
    """Some instructions of the device flush subnormal numbers to 0."""
    adam = AdamW(on_device(), fused=True)
    step(adam)
    for state in adam.state.values():
        state["exp_avg_sq"].view(-1)[::2] = 1e-41
    assert_agrees(adam)


@needs_device
def test_number_of_launches_does_not_depend_on_the_number_of_tensors() -> None:
    launches = []
    for tensors in (3, 300):
        adam = AdamW(on_device(tensors=tensors), fused=True)
        step(adam)
        states = StateReader().after_step(adam)
        kernel.measure(states, ALL)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            kernel.measure(states, ALL)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() or [] if event.device_type.name == "CUDA"]
        launches.append([name for name in names if not name.startswith("Mem")])
    assert launches[0] == launches[1]
    assert len(launches[0]) == 4


@needs_device
def test_result_is_deterministic_on_the_device() -> None:
    adam = AdamW(on_device(), fused=True)
    step(adam)
    states = StateReader().after_step(adam)
    first, second = kernel.measure(states, ALL), kernel.measure(states, ALL)
    assert first.cpu().numpy().tobytes() == second.cpu().numpy().tobytes()


@needs_device
@pytest.mark.parametrize("transposed", [False, True])
def test_eager_kernel_measures_on_the_device(transposed: bool) -> None:
    """Pieces of the eager kernel are larger there than on the CPU."""
    side = 1 + int(1.5 * eager.PIECE_ON_A_DEVICE**0.5)
    data = torch.randn(side, side, device="cuda") * 0.1
    weights = [nn.Parameter(data.t() if transposed else data), *on_device()]
    adam = AdamW(weights, fused=True)
    step(adam)
    states = StateReader().after_step(adam)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with sync_is_error():
        rows = eager.measure(states, ALL)
    assert torch.cuda.max_memory_allocated() - before < 200e6
    assert_rows_agree(states, rows, ALL)


@needs_device
def test_elements_beyond_int32_are_counted_on_the_device() -> None:
    elements = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 6 * 2 * elements:
        pytest.skip("needs 26 GB of free memory")
    weight = nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16, device="cuda"))
    weight.data[-1] = 3.0
    weight.grad = torch.zeros_like(weight)
    weight.grad[-2] = 2.0
    adam = AdamW([weight], lr=0.0, fused=True)
    adam.step()
    columns = ["elements", "grad_squares", "weight_squares", "active", "grad_max_abs"]
    row = kernel.measure(StateReader().after_step(adam), columns)[0]
    assert row.tolist() == [elements, 4.0, 9.0, 1.0, 2.0]


@needs_device
def test_measuring_changes_no_parameter_on_the_device() -> None:
    weights = on_device()
    both = [copy.deepcopy(weights), copy.deepcopy(weights)]
    for index, parameters in enumerate(both):
        torch.manual_seed(0)
        adam = AdamW(parameters, fused=True)
        metric = AdamStatistics("all", kernel="triton")
        for _ in range(5):
            step(adam)
            if index:
                with sync_is_error():
                    metric.update(adam, histograms=True)
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)
