"""The dimensions of a search: how values are sampled, written and read."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_adam.tune.dimensions import DIMENSIONS
from lightning_adam.tune.point import Point
from tests.support.tables import each_row
from tests.tune.searching import DEFAULT

RANGES = {
    "lr": (1e-5, 1e-1),
    "beta1": (0.5, 0.99),
    "beta2": (0.9, 0.9999),
    "eps": (1e-12, 1e-3),
    "weight_decay": (1e-6, 1e-1),
    "decay_per_step": (1e-6, 1e-2),
    "decay_timescale": (1e2, 1e6),
    "warmup_ratio": (0.01, 0.3),
}


@settings(deadline=None, derandomize=True)
@given(name=st.sampled_from(list(RANGES)), place=st.floats(0, 1))
def test_sampled_value_is_written_and_read_back(name: str, place: float) -> None:
    """To the three digits that are typed in the end, and without a change to anything else."""
    dimension = DIMENSIONS[name]
    low, high = RANGES[name]
    distribution = dimension.distribution({"low": low, "high": high})
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(distribution, IntDistribution):
        coordinate = round(distribution.low + place * (distribution.high - distribution.low))
    else:
        assert distribution.log
        coordinate = distribution.low * (distribution.high / distribution.low) ** place
    point = dimension.sampled(DEFAULT, coordinate, {"low": low, "high": high})
    value = dimension.read(point)
    assert low * 0.99 <= value <= high * 1.01
    again = dimension.to_coordinate(value)
    assert math.isclose(again, coordinate, rel_tol=0.012)
    assert dimension.write(point, dimension.read(DEFAULT)).lr == (
        DEFAULT.lr if name == "lr" else point.lr
    )


def test_betas_are_sampled_as_their_distance_from_one() -> None:
    with each_row() as row:
        for beta, coordinate in (("beta1", 0.1), ("beta1", 0.0123456), ("beta2", 0.0001234)):
            with row((beta, coordinate)):
                point = DIMENSIONS[beta].sampled(DEFAULT, coordinate, {})
                value = DIMENSIONS[beta].read(point)
                assert math.isclose(1 - value, coordinate, rel_tol=5e-3)
                # The override has no digits that come from a subtraction.
                assert len(repr(value)) <= len("0.9998766")
                other = "beta2" if beta == "beta1" else "beta1"
                assert DIMENSIONS[other].read(point) == DIMENSIONS[other].read(DEFAULT)


def test_eps_is_sampled_by_decades() -> None:
    distribution = DIMENSIONS["eps"].distribution({"low": 1e-12, "high": 1e-3})
    assert distribution == IntDistribution(-12, -3)
    for exponent in range(-12, -2):
        point = DIMENSIONS["eps"].sampled(DEFAULT, exponent, {})
        assert point.eps == float(f"1e{exponent}")
        assert DIMENSIONS["eps"].to_coordinate(point.eps) == exponent


def test_decay_per_step_is_lr_times_weight_decay() -> None:
    point = DIMENSIONS["decay_per_step"].write(DEFAULT.with_values(lr=2e-3), 1e-4)
    assert (point.weight_decay, point.decoupled_weight_decay) == (0.05, True)
    assert DIMENSIONS["decay_timescale"].read(point) == pytest.approx(1e4)
    same = DIMENSIONS["decay_timescale"].write(DEFAULT.with_values(lr=2e-3), 1e4)
    assert same == point


def test_coupled_decay_has_no_rate_and_zero_decay_has_rate_zero() -> None:
    coupled = DEFAULT.with_values(decoupled_weight_decay=False)
    assert DIMENSIONS["decay_per_step"].read(coupled) is None
    assert DIMENSIONS["decay_per_step"].read(coupled.with_values(weight_decay=0.0)) == 0
    assert DIMENSIONS["decay_timescale"].read(coupled.with_values(weight_decay=0.0)) == 0


def test_listed_values_are_used_unchanged() -> None:
    distribution = DIMENSIONS["lr"].distribution([1e-3, 3e-3])
    assert isinstance(distribution, CategoricalDistribution)
    assert DIMENSIONS["lr"].sampled(DEFAULT, 0.00123456, [0.00123456]).lr == 0.00123456


def test_setting_that_the_optimizer_lacks_reads_as_none() -> None:
    assert {name: each.read(Point(lr=1e-3)) for name, each in DIMENSIONS.items()} == {
        name: 1e-3 if name == "lr" else None for name in DIMENSIONS
    }
