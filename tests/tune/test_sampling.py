"""Proposed points: inside the space, never twice, and better than chance."""

import math
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adam.tune.sampling import bounded, propose
from tests.tune.searching import DEFAULT

LR = {"lr": {"low": 1e-5, "high": 1e-1}}


def loss_of(lr: float) -> float:
    return abs(math.log10(lr / 3e-3))


def test_minimum_is_found_sooner_than_by_chance() -> None:
    seen: list[Any] = []
    for number in range(8):
        point = propose(LR, DEFAULT, seen, seed=number)
        assert point is not None
        seen.append(({"lr": point.lr}, loss_of(point.lr)))
    luck = random.Random(0)
    by_chance = sorted(
        min(loss_of(10 ** luck.uniform(-5, -1)) for _ in range(8)) for _ in range(200)
    )
    assert min(loss for _, loss in seen) < by_chance[20]


def test_region_of_failures_is_avoided() -> None:
    """Runs that diverge return no number, but none is proposed near them again."""
    lrs = [1e-5, 1e-4, 1e-3, 3e-3]
    seen: list[Any] = [({"lr": lr}, -math.log10(lr)) for lr in lrs]
    open_end = propose(LR, DEFAULT, seen, seed=0)
    failed: list[Any] = [*seen, *(({"lr": lr}, math.nan) for lr in (1e-2, 3e-2, 0.1))]
    closed_end = propose(LR, DEFAULT, failed, seed=0)
    assert open_end is not None
    assert closed_end is not None
    assert closed_end.lr < 1e-2 < open_end.lr


def test_running_points_are_not_proposed_again() -> None:
    seen: list[Any] = [({"lr": lr}, loss_of(lr)) for lr in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    batch = []
    for _ in range(4):
        point = propose(LR, DEFAULT, seen, seed=len(seen))
        assert point is not None
        batch.append(point.lr)
        seen.append(({"lr": point.lr}, None))
    assert len(set(batch)) == 4


@settings(deadline=None, derandomize=True, max_examples=10)
@given(known=st.sets(st.integers(-8, -5)), seed=st.integers(0, 100))
def test_no_known_point_is_proposed(known: set[int], seed: int) -> None:
    space = {"eps": {"low": 1e-8, "high": 1e-5}}
    seen: list[Any] = [({"log10_eps": each}, float(each)) for each in known]
    point = propose(space, DEFAULT, seen, seed)
    if len(known) == 4:
        assert point is None
    else:
        assert point is not None
        assert point.eps is not None
        assert round(math.log10(point.eps)) in {-8, -7, -6, -5} - known


def test_several_dimensions_are_sampled_together() -> None:
    space: dict[str, Any] = {"lr": {"low": 1e-4, "high": 1e-2}, "amsgrad": [False, True]}
    points = [propose(space, DEFAULT, [], seed) for seed in range(12)]
    assert {point.amsgrad for point in points if point} == {False, True}
    assert all(1e-4 <= point.lr <= 1e-2 for point in points if point)


BOUNDED: list[tuple[list[float | None], list[float | None]]] = [
    ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    # Twice as far above the middle as the best is below it.
    ([1.0, 2.0, 900.0], [1.0, 2.0, 4.0]),
    ([1.0, 2.0, 900.0, math.nan], [1.0, 2.0, 4.0, 4.0]),
    ([1.0, math.nan, None], [1.0, 1.0, None]),
    ([math.nan, math.inf], [0.0, 0.0]),
    ([2.0, 2.0, 2.0, math.nan], [2.0, 2.0, 2.0, 2.0]),
    ([], []),
]


def test_outliers_and_failures_are_bounded() -> None:
    assert [bounded(values) for values, _ in BOUNDED] == [expected for _, expected in BOUNDED]
