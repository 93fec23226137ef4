"""Comparison of runs: different settings, and the first different step."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adam.reports.comparison import TOLERANCE, config_differences, first_difference
from lightning_adam.reports.keys import Scope
from lightning_adam.reports.runs import Run
from lightning_adam.statistics.catalogue import STATISTICS
from tests.reports.run_files import run_of

# ---- Configs

LEAVES = st.none() | st.integers(0, 2) | st.sampled_from(["a", "b"]) | st.just([1, 2])
CONFIGS = st.recursive(
    st.dictionaries(st.sampled_from("xyz"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), LEAVES | inner, max_size=3),
    max_leaves=6,
)


def dotted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config by dotted name; an empty dict is a setting."""
    found: dict[str, Any] = {}
    left = [("", config)]
    while left:
        prefix, inner = left.pop()
        for name, value in inner.items():
            if isinstance(value, dict) and value:
                left.append((f"{prefix}{name}.", value))
            else:
                found[prefix + name] = value
    return found


def runs_of(*configs: dict[str, Any]) -> list[Run]:
    return [run_of({}, config=config) for config in configs]


@settings(max_examples=50, deadline=None)
@given(st.lists(CONFIGS, min_size=1, max_size=4))
def test_differences_are_settings_that_are_not_equal_in_all_runs(
    configs: list[dict[str, Any]],
) -> None:
    flat = [dotted(config) for config in configs]
    expected = {}
    for name in {name for each in flat for name in each}:
        values = [each.get(name, "-") for each in flat]
        if any(value != values[0] for value in values):
            expected[name] = values
    assert config_differences(runs_of(*configs)) == expected


def optimizer(lr: float, **groups: float) -> dict[str, Any]:
    param_groups = {name: {"lr": group_lr} for name, group_lr in groups.items()}
    return {"optimizer": {"lr": lr, "param_groups": param_groups}}


def test_differences_that_a_group_repeats_are_omitted() -> None:
    first, second = optimizer(1.0, decay=1.0, head=1.0), optimizer(2.0, decay=2.0, head=20.0)
    assert config_differences(runs_of(first, second)) == {
        "optimizer.lr": [1.0, 2.0],
        "optimizer.param_groups.head.lr": [1.0, 20.0],
    }
    same_optimizer = optimizer(1.0, decay=3.0, head=1.0)
    assert config_differences(runs_of(first, same_optimizer)) == {
        "optimizer.param_groups.decay.lr": [1.0, 3.0]
    }
    without = optimizer(2.0, decay=2.0)
    assert config_differences(runs_of(first, without)) == {
        "optimizer.lr": [1.0, 2.0],
        "optimizer.param_groups.head.lr": [1.0, "-"],
    }
    dotted_names = [optimizer(lr, **{"net.0": lr, "net.1_no_decay": lr}) for lr in (1.0, 2.0)]
    assert config_differences(runs_of(*dotted_names)) == {"optimizer.lr": [1.0, 2.0]}


def test_runs_with_equal_configs_have_no_differences() -> None:
    for value, copy in (
        (math.nan, float("nan")),
        (math.inf, float("inf")),
        ([1, math.nan], [1, float("nan")]),
    ):
        assert config_differences(runs_of({"a": {"b": value}}, {"a": {"b": copy}})) == {}


# ---- The first difference

COSINES = ("grad_momentum_cosine", "decay_alignment")
NOT_COMPARED = ("exp_avg_mean", "lr", "beta1", "step")
RELATIVE = ("update_norm", "grad_norm")
FRACTIONS = ("idle_fraction", "signal_fraction")
MEASURED = (*RELATIVE, *FRACTIONS, *COSINES, *NOT_COMPARED)
SCOPES = {
    "": Scope(),
    "group/decay/": Scope("", "group", "decay"),
    "layer/net.0/": Scope("", "layer", "net.0"),
    "tensor/net.0.weight/": Scope("", "tensor", "net.0.weight"),
    "optimizer/gan/": Scope("gan"),
    "optimizer/gan/layer/a_b/": Scope("gan", "layer", "a_b"),
    "worst_1/": Scope("", "worst", "1"),
}
KEYS = [STATISTICS[name].key_of(scope) for name in MEASURED for scope in SCOPES]
VALUES = (
    st.sampled_from([0.0, 1.0, 1.05, 1.2, -1.0, 0.1, 1e-300, math.nan, math.inf, -math.inf])
    | st.floats()
)
SERIES = st.dictionaries(st.integers(0, 5), VALUES, min_size=1, max_size=4)
RUNS = st.lists(st.sampled_from([*KEYS, "train/loss"]), max_size=5, unique=True).flatmap(
    lambda keys: st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(keys, SERIES)), min_size=2, max_size=2
    )
)
Values = dict[str, dict[int, float]]


class Difference(NamedTuple):
    distance: float
    step: int
    statistic: str
    scope: Scope
    values: tuple[float, float]


def distance(statistic: str, one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    apart = abs(one - other)
    is_absolute = STATISTICS[statistic].unit == "fraction" or statistic in COSINES
    return apart if is_absolute else apart / max(abs(one), abs(other))


def first_differences(first: Values, second: Values, tolerance: float) -> list[Difference]:
    """Returns all differences at the first different step, or those of layers if there are any."""
    found = []
    for name in set(MEASURED) - set(NOT_COMPARED):
        for part, scope in SCOPES.items():
            key = STATISTICS[name].key_of(part)
            for step in first.get(key, {}).keys() & second.get(key, {}).keys():
                values = first[key][step], second[key][step]
                apart = distance(name, *values)
                if apart > tolerance:
                    found.append(Difference(apart, step, name, scope, values))
    start = min((place.step for place in found), default=0)
    at_start = [place for place in found if place.step == start]
    return [each for each in at_start if each.scope.kind in ("layer", "tensor")] or at_start


@settings(max_examples=100, deadline=None)
@given(RUNS, st.sampled_from([0.0, TOLERANCE, 1.0]))
def test_first_difference_is_the_largest_of_the_first_different_step(
    runs: list[Values], tolerance: float
) -> None:
    first, second = runs
    assert first_difference(run_of(first), run_of(first), 0) is None
    found = first_difference(run_of(first), run_of(second), tolerance)
    places = first_differences(first, second, tolerance)
    if found is None:
        assert places == []
        return
    farthest = max(place.distance for place in places)
    assert repr(tuple(vars(found).values())) in [
        repr(tuple(place[1:])) for place in places if place.distance == farthest
    ]


UPDATE_NORM, IDLE = STATISTICS["update_norm"].key, STATISTICS["idle_fraction"].key


def test_tolerance_is_relative_except_for_fractions_and_cosines() -> None:
    for key, value, near, far in (
        (UPDATE_NORM, 100.0, 111.0, 112.0),
        (IDLE, 0.5, 0.59, 0.61),
        (STATISTICS["decay_alignment"].key, 0.0, 0.1, 0.11),
    ):
        run = run_of({key: {0: value}})
        assert first_difference(run, run_of({key: {0: near}})) is None
        assert first_difference(run, run_of({key: {0: far}})) is not None
