"""The benchmark runs, and its stand-ins for the peers compute their numbers.

No time is asserted.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.monitor_cost.peers import composer, olmo
from benchmarks.monitor_cost.plain_read import plain_read
from benchmarks.monitor_cost.saving import save
from benchmarks.monitor_cost.tensors import SHAPES, Named, build
from benchmarks.small_gpt import SmallGPT
from tests.support.commands import BIN, REPOSITORY, environment, run

ARMS = {
    "fused step",
    "fused step again",
    "plain read",
    "headline",
    "all",
    "all + histograms",
    "all, eager",
    "Composer",
    "OLMo",
    "wandb.watch",
}
INTERVALS = {"none", "none again", "every 50", "every 10", "every step"}
README = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
TINY = ["--sizes", "tiny", "--workloads", "tiny", "--batches", "2", "--logger", "csv"]
PNG = b"\x89PNG\r\n\x1a\n"

Array = np.ndarray[Any, np.dtype[np.float64]]


class BenchmarkRun(NamedTuple):
    printed: str
    folder: Path
    results: Any


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkRun:
    """Runs the benchmark at its smallest size, and saves the results with a README."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "README.md").write_text(README)
    rounds = ["--rounds", "2", "--training-rounds", "2"]
    command = [str(BIN / "python"), "-m", "benchmarks.monitor_cost", *TINY, *rounds]
    variables = environment(WANDB_MODE="offline")
    finished = run([*command, "--save", str(folder)], REPOSITORY, variables)
    assert finished.returncode == 0, finished.output
    results = json.loads((folder / "monitor_cost.json").read_text())
    # Progress messages come first.
    tables = finished.output.index("### One measurement")
    return BenchmarkRun(finished.output[tables:], folder, results)


@pytest.mark.slow
def test_every_arm_is_measured(result: BenchmarkRun) -> None:
    size = result.results["step"]["cpu"]["sizes"]["tiny"]
    assert size["arms"].keys() == ARMS
    for arm in size["arms"].values():
        assert len(arm["ratios"]) == len(arm["milliseconds"]) == 2
    for ratios in size["after"].values():
        assert [len(each) for each in ratios.values()] == [2, 2]
    assert [len(each) for each in result.results["step"]["cpu"]["in_between"].values()] == [
        2,
        2,
        2,
    ]


@pytest.mark.slow
def test_every_interval_is_measured_in_training(result: BenchmarkRun) -> None:
    segments = result.results["training"]["cpu"]["workloads"]["tiny"]
    assert segments.keys() == INTERVALS
    assert {len(each["totals"]) for each in segments.values()} == {2}
    assert [name for name, each in segments.items() if each["measurement_ms"]] == ["every step"]


@pytest.mark.slow
def test_tables_are_printed(result: BenchmarkRun) -> None:
    for title in ("One measurement", "The step after", "A step in between", "A training"):
        assert f"### {title}\n" in result.printed
    for name in ARMS:
        assert f"\n| {name} |" in result.printed
    for name in INTERVALS:
        assert f"\n| tiny: {name} |" in result.printed
    assert f"torch {torch.__version__}" in result.printed
    assert "python -m benchmarks.monitor_cost --sizes tiny" in result.printed


@pytest.mark.slow
def test_tables_are_written_into_the_readme(result: BenchmarkRun) -> None:
    text = (result.folder / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n\n### One measurement\n")
    assert text.endswith("|\n\n<!-- /results -->\nafter\n")
    assert result.printed.strip() in text


@pytest.mark.slow
def test_chart_is_drawn(result: BenchmarkRun) -> None:
    assert (result.folder / "monitor_cost.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_saved_results_of_other_parts_are_kept(result: BenchmarkRun, tmp_path: Path) -> None:
    step, training = result.results["step"], result.results["training"]
    save({"step": step, "training": {}}, tmp_path)
    save({"step": {}, "training": training}, tmp_path)
    kept = json.loads((tmp_path / "monitor_cost.json").read_text())
    assert kept == {"step": step, "training": training}


SIZES = {
    "resnet18": (62, 11_689_512),
    "gpt2": (148, 124_439_808),
    "small": (2000, 2_000_000),
    "1B": (388, 985_379_328),
}
"""Numbers of tensors and elements."""


def test_sizes_are_those_of_the_models() -> None:
    for size, expected in SIZES.items():
        shapes = SHAPES[size]()
        assert (len(shapes), sum(map(math.prod, shapes))) == expected, size
    parameters = [*SmallGPT().parameters()]
    assert (len(parameters), sum(each.numel() for each in parameters)) == (77, 4_902_912)


@pytest.fixture
def tiny() -> tuple[Named, torch.optim.AdamW]:
    return build(SHAPES["tiny"](), "cpu")


def as_array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def four_of(
    named: Named, optimizer: torch.optim.AdamW
) -> Iterator[tuple[str, tuple[Array, Array, Array, Array]]]:
    """Returns name, p, g, m and v."""
    for name, parameter in named:
        state = optimizer.state[parameter]
        assert parameter.grad is not None
        four = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        yield name, tuple(map(as_array, four))  # type: ignore[misc]


def test_plain_read_reads_every_element(tiny: tuple[Named, torch.optim.AdamW]) -> None:
    named, optimizer = tiny
    read = plain_read(optimizer)
    expected = sum(array.sum() for _, four in four_of(named, optimizer) for array in four)
    assert read() == pytest.approx(expected, rel=1e-4)


def test_stand_in_for_composer_computes_its_norms(tiny: tuple[Named, torch.optim.AdamW]) -> None:
    named, optimizer = tiny
    group = optimizer.param_groups[0]
    (beta1, beta2), steps = group["betas"], 3
    expected, squares = {}, 0.0
    for name, (p, g, m, v) in four_of(named, optimizer):
        direction = m / (1 - beta1**steps) / (np.sqrt(v / (1 - beta2**steps)) + group["eps"])
        # The decay of the first group for all tensors, unscaled and with the sign of Composer.
        update = group["lr"] * direction - group["weight_decay"] * p
        for what, array in (("param", p), ("grad", g), ("moment", m), ("update", update)):
            expected[f"l2_norm/{what}/{name}"] = np.linalg.norm(array)
        squares += float((g**2).sum())
    expected["l2_norm/grad/global"] = np.sqrt(squares)
    assert composer(named, optimizer) == pytest.approx(expected, rel=1e-4)


NUMBERS: dict[str, Callable[[Array], float]] = {
    "min": lambda array: float(np.abs(array).min()),
    "max": lambda array: float(np.abs(array).max()),
    "avg": lambda array: float(array.mean()),
    "norm": lambda array: float(np.linalg.norm(array)),
}


def test_stand_in_for_olmo_computes_its_statistics(tiny: tuple[Named, torch.optim.AdamW]) -> None:
    named, optimizer = tiny
    expected = {
        f"{what}/{name}.{key}": of(array)
        for name, four in four_of(named, optimizer)
        for what, array in zip(("param", "grad", "exp_avg", "exp_avg_sq"), four, strict=True)
        for key, of in NUMBERS.items()
    }
    assert olmo(named, optimizer) == pytest.approx(expected, rel=1e-4, abs=1e-9)
