"""Every statistic and histogram on generated state, against the float64 reference.

State and gradients are made up rather than trained: of any dtype, layout and magnitude, also such
as no training would produce.
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_adam import AdamStatistics
from tests.statistics.boundaries import ULPS
from tests.statistics.cases import KERNELS, reference_tensors
from tests.statistics.test_metric import assert_agree, bare
from tests.support.oracle import reference_magnitudes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "permuted": lambda values: (
        values.movedim(0, -1).contiguous().movedim(-1, 0) if values.ndim else values
    ),
    "every_second": lambda values: torch.stack([values, values], dim=-1)[..., 1],
    "transposed": lambda values: values.T.contiguous().T if values.ndim == 2 else values,
}
SHAPES = [(0,), (1,), (), (7,), (3, 0), (5, 4), (2, 3, 4), (33, 17)]
MAGNITUDES = [(-30, 30), (-30, -20), (-12, -6), (-3, 3), (0, 0), (20, 30), (-46, -37)]
"""Powers of ten; the last are subnormal in float32 and bfloat16."""
SPECIALS = [float("nan"), float("inf"), -float("inf")]


FEW_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64]).map(lambda d: [d] * 3)
"""A kernel is compiled for each combination, which takes longer than it to measure."""
ANY_DTYPES = st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3)


@st.composite
def parameter_groups(
    draw: st.DrawFn, dtypes: st.SearchStrategy[list[torch.dtype]] = FEW_DTYPES
) -> list[dict[str, Any]]:
    """Groups as a recipe: hyperparameters, and of each tensor how it is made."""
    tensor = st.fixed_dictionaries(
        {
            "shape": st.sampled_from(SHAPES),
            "dtypes": dtypes,
            "layouts": st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4),
            "weight": st.sampled_from(MAGNITUDES),
            "grad": st.sampled_from(MAGNITUDES),
            "zeros": st.sampled_from([0.0, 0.3, 1.0]),
            "idle": st.sampled_from([0.0, 0.5, 0.9]),
            "special": st.one_of(
                st.none(), st.tuples(st.sampled_from(SPECIALS), st.integers(0, 3))
            ),
            "step": st.integers(1, 100_000),
        }
    )
    group = st.fixed_dictionaries(
        {
            "tensors": st.lists(tensor, min_size=1, max_size=3),
            "lr": st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.99), (0.9, 0.99999)]),
            "eps": st.sampled_from([1e-15, 1e-8, 1e-3]),
            "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
            "decoupled": st.booleans(),
        }
    )
    return draw(st.lists(group, min_size=1, max_size=3))


def made(groups: list[dict[str, Any]], seed: int) -> Optimizer:
    """An optimizer in the state that the recipe describes."""
    generator = torch.Generator().manual_seed(seed)
    param_groups = []
    state: dict[Tensor, dict[str, Tensor]] = {}
    for index, group in enumerate(groups):
        parameters = []
        for recipe in group["tensors"]:
            parameter, own = made_tensor(recipe, group["amsgrad"], generator)
            parameters.append(parameter)
            state[parameter] = own
        hyperparameters = {
            key: value for key, value in group.items() if key not in ("tensors", "decoupled")
        }
        param_groups.append(
            {
                **hyperparameters,
                "decoupled_weight_decay": group["decoupled"],
                "params": parameters,
                "name": f"group_{index}",
            }
        )
    optimizer = Adam(param_groups)
    optimizer.state.update(state)
    return optimizer


def made_tensor(
    recipe: dict[str, Any], amsgrad: bool, generator: torch.Generator
) -> tuple[nn.Parameter, dict[str, Tensor]]:
    shape, (p_dtype, g_dtype, state_dtype) = recipe["shape"], recipe["dtypes"]

    def random(magnitudes: tuple[int, int]) -> Tensor:
        low, high = magnitudes
        exponents = low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)
        values = torch.randn(shape, dtype=torch.float64, generator=generator) * 10.0**exponents
        keep: Tensor = torch.rand(shape, generator=generator) >= recipe["zeros"]
        return values * keep

    p, g = random(recipe["weight"]), random(recipe["grad"])
    m, v = random(recipe["grad"]), random(recipe["grad"]) ** 2
    v_max = v * (1 + torch.rand(shape, dtype=torch.float64, generator=generator))
    idle = torch.rand(shape, generator=generator) < recipe["idle"]
    for values in (g, m, v, v_max):
        values[idle] = 0
    if recipe["special"] is not None and p.numel():
        special, place = recipe["special"]
        # A sum of squares is never negative.
        (p, g, m, v)[place].view(-1)[p.numel() // 2] = abs(special) if place == 3 else special
    laid_out = [LAYOUTS[name] for name in recipe["layouts"]]
    parameter = nn.Parameter(laid_out[0](p.to(p_dtype)))
    parameter.grad_dtype = None
    parameter.grad = laid_out[1](g.to(g_dtype))
    state = {
        "step": torch.tensor(float(recipe["step"])),
        "exp_avg": laid_out[2](m.to(state_dtype)),
        "exp_avg_sq": laid_out[3](v.to(state_dtype)),
    }
    if amsgrad:
        state["max_exp_avg_sq"] = laid_out[3](v_max.to(state_dtype))
    return parameter, state


def check(optimizer: Optimizer) -> None:
    """All scopes of the optimizer, and its histograms, by all kernels."""
    for kernel in KERNELS:
        check_kernel(optimizer, kernel)


def check_kernel(optimizer: Optimizer, kernel: str) -> None:
    metric = AdamStatistics("all", scopes=["model", "group", "tensor"], kernel=kernel)
    metric.update(optimizer, histograms=True)
    values, exponents = metric.compute(), metric.compute_exponents()
    scopes = {"": None} | {f"/group/group_{i}": i for i in range(len(optimizer.param_groups))}
    for suffix, group in scopes.items():
        tensors = reference_tensors(optimizer, group)
        assert_agree(bare(values, suffix), tensors, kernel)
        for quantity, magnitudes in reference_magnitudes(tensors).items():
            # What has no elements is left out.
            counts = exponents.get(f"adam_histogram/{quantity}{suffix}", [0] * 256)
            assert_counts(counts, magnitudes, ULPS if kernel != "eager" else 2.0**-50)
    position = 0
    for index, param_group in enumerate(optimizer.param_groups):
        for number in range(len(param_group["params"])):
            tensor = reference_tensors(optimizer)[position : position + 1]
            assert_agree(bare(values, f"/tensor/group_{index}.{number}"), tensor, kernel)
            position += 1


def assert_counts(counts: list[int], magnitudes: np.ndarray[Any, Any], slack: float) -> None:
    """Each octave's count, but for elements within the slack, relative, of an edge."""
    assert sum(counts) == len(magnitudes)
    finite = np.sort(magnitudes[np.isfinite(magnitudes)])
    for exponent in range(1, 256):
        below, edge = sum(counts[:exponent]), 2.0 ** (exponent - 127)
        least, most = np.searchsorted(finite, [edge * (1 - slack), edge * (1 + slack)])
        assert least <= below <= most


@settings(max_examples=80, deadline=None)
@given(groups=parameter_groups(), seed=st.integers(0, 2**31))
def test_any_state_agrees_with_the_reference(groups: list[dict[str, Any]], seed: int) -> None:
    check(made(groups, seed))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@settings(max_examples=200, deadline=None)
@given(groups=parameter_groups(ANY_DTYPES), seed=st.integers(0, 2**31))
def test_any_state_agrees_with_the_reference_many_times(
    groups: list[dict[str, Any]], seed: int
) -> None:
    check(made(groups, seed))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_million_elements(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(10**7).to(dtype))
    optimizer = AdamW([weight], weight_decay=0.1, fused=True)
    for _ in range(2):
        weight.grad = torch.randn(10**7).to(dtype) * 1e-4
        optimizer.step()
    check(optimizer)
