"""All statistics and histograms of generated states, compared with the float64 reference."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from torch.optim import Optimizer

from lightning_adam import AdamStatistics
from tests.statistics.cases import KERNELS, reference_tensors
from tests.statistics.generated_states import PAIRS_OF_DTYPES, build, parameter_groups
from tests.support.agreement import ULPS, assert_agree, bare, count_maybe_idle
from tests.support.oracle import reference_magnitudes


def check(optimizer: Optimizer) -> None:
    """Checks all scopes of the optimizer, and its histograms, with all kernels."""
    for kernel in KERNELS:
        check_kernel(optimizer, kernel)


def check_kernel(optimizer: Optimizer, kernel: str) -> None:
    metric = AdamStatistics("all", scopes=["model", "group", "tensor"], kernel=kernel)
    metric.update(optimizer, histograms=True)
    values, exponents = metric.compute(), metric.compute_exponents()
    scopes: dict[str, int | None] = {"": None}
    if len(optimizer.param_groups) > 1:
        scopes |= {f"group/group_{i}/": i for i in range(len(optimizer.param_groups))}
    for scope, group in scopes.items():
        tensors = reference_tensors(optimizer, group)
        assert_agree(bare(values, scope), tensors, kernel)
        for quantity, magnitudes in reference_magnitudes(tensors).items():
            # Scopes without elements are absent.
            counts = exponents.get(f"adam_histogram/{scope}{quantity}", [0] * 256)
            if kernel == "eager":
                assert_counts(counts, magnitudes, 2.0**-50, maybe_idle=0)
            else:
                assert_counts(counts, magnitudes, ULPS, count_maybe_idle(tensors))
    for index, param_group in enumerate(optimizer.param_groups):
        tensors = reference_tensors(optimizer, index)
        assert len(tensors) == len(param_group["params"])
        for number, tensor in enumerate(tensors):
            assert_agree(bare(values, f"tensor/group_{index}.{number}/"), [tensor], kernel)


def assert_counts(
    counts: list[int], magnitudes: np.ndarray[Any, Any], tolerances: float, maybe_idle: int
) -> None:
    """Asserts the count of each octave.

    Elements within the relative tolerances of an edge may move, and as many as may be idle are not
    counted, or in the lowest octave.
    """
    assert len(magnitudes) - maybe_idle <= sum(counts) <= len(magnitudes)
    finite = np.sort(magnitudes[np.isfinite(magnitudes)])
    for exponent in range(1, 256):
        below, edge = sum(counts[:exponent]), 2.0 ** (exponent - 127)
        least, most = np.searchsorted(finite, [edge * (1 - tolerances), edge * (1 + tolerances)])
        assert least - maybe_idle <= below <= most


@settings(max_examples=30, deadline=None)
@given(groups=parameter_groups(), seed=st.integers(0, 2**31))
def test_any_state_agrees_with_the_reference(groups: list[dict[str, Any]], seed: int) -> None:
    check(build(groups, seed))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(groups=parameter_groups(PAIRS_OF_DTYPES), seed=st.integers(0, 2**31))
def test_mixed_dtypes_agree_with_the_reference(groups: list[dict[str, Any]], seed: int) -> None:
    check(build(groups, seed))
