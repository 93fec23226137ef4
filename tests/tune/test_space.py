"""Coordinates of configurations: scales, ranges, and values at their ends."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adam.config.tune import Range, SpaceConfig
from lightning_adam.tune.configuration import Configuration
from lightning_adam.tune.space import DRAWS, Space
from tests.support.tables import each_row
from tests.tune.simulation import START, STEPS

FEW_EXAMPLES = settings(max_examples=50, deadline=None)


NARROW = SpaceConfig(lr=Range(1e-4, 1e-2))


def space_of(start: Configuration = START, config: SpaceConfig | None = None) -> Space:
    return Space(start, config or SpaceConfig(), STEPS, search_eps=True)


def timescale(configuration: Configuration, steps: float) -> float:
    """Returns the timescale of Wang & Aitchison 2024, in lengths of the run."""
    assert configuration.weight_decay is not None
    return 1 / (configuration.lr * configuration.weight_decay * steps)


@FEW_EXAMPLES
@given(st.floats(0, 1), st.sampled_from([1.0, 1 / 3, 1 / 8]), st.booleans())
def test_coordinates_survive_a_round_trip(share: float, length: float, is_decoupled: bool) -> None:
    space = space_of(replace(START, decoupled_weight_decay=is_decoupled))
    x = space.low + share * (space.high - space.low)
    # The learning rate of a short run is larger, and stays within the range.
    x[0] = min(x[0], space.high[0] - 0.3)
    found = space.coordinates(space.configuration(x, length), length)
    # Values have three digits.
    assert found == pytest.approx(x, abs=0.005)


@FEW_EXAMPLES
@given(st.floats(-4, -1), st.floats(-0.9, 2.9), st.sampled_from([1.0, 1 / 3, 1 / 8]))
def test_decay_timescale_does_not_depend_on_learning_rate_and_length(
    lr: float, scale: float, length: float
) -> None:
    space = space_of()
    x = space.default.copy()
    x[[space.index("lr"), space.index("decay_timescale")]] = lr, scale
    configuration = space.configuration(x, length)
    assert timescale(configuration, STEPS * length) == pytest.approx(10**scale, rel=0.02)


def test_weak_end_of_the_range_turns_weight_decay_off() -> None:
    space = space_of()
    x = space.default.copy()
    x[space.index("decay_timescale")] = 3.0
    assert space.configuration(x, 1.0).weight_decay == 0.0
    l2 = space_of(replace(START, decoupled_weight_decay=False))
    assert l2.index("decay_timescale") is None
    x = l2.default.copy()
    x[l2.index("weight_decay")] = -7.0
    assert l2.configuration(x, 1.0).weight_decay == 0.0


def test_only_existing_hyperparameters_are_searched() -> None:
    rows = [
        (START, ["lr", "beta1", "beta2", "eps", "decay_timescale", "warmup_ratio"]),
        (replace(START, betas=None, eps=None), ["lr", "decay_timescale", "warmup_ratio"]),
        (Configuration(1e-3, weight_decay=0.0), ["lr", "weight_decay"]),
        (Configuration(1e-3, warmup_steps=100), ["lr", "warmup_ratio"]),
    ]
    with each_row() as row:
        for start, names in rows:
            with row(start):
                assert [each.name for each in space_of(start).dimensions] == names
    config = SpaceConfig(lr=None, beta1=None, decay_timescale=None, warmup_ratio=None)
    fixed = Space(START, config, STEPS, search_eps=False)
    assert [each.name for each in fixed.dimensions] == ["beta2"]
    assert fixed.configuration(np.array([-1.5]), 1.0) == replace(START, betas=(0.9, 0.9684))


def test_warmup_in_steps_becomes_a_fraction_of_the_run() -> None:
    start = replace(START, warmup_ratio=None, warmup_steps=100)
    space = space_of(start)
    index = space.index("warmup_ratio")
    assert space.coordinates(start)[index] == pytest.approx(0.1)
    configuration = space.configuration(space.default, 1.0)
    assert (configuration.warmup_ratio, configuration.warmup_steps) == (0.2, None)


def test_value_near_an_end_of_its_range_is_reported() -> None:
    beta1 = (0.989, 0.9)
    rows = [
        (replace(START, lr=0.15), [("lr", "high")]),
        (replace(START, lr=2e-5), [("lr", "low")]),
        # On a linear scale, it would be at the low end.
        (replace(START, lr=0.005), []),
        (replace(START, betas=beta1), [("beta1", "high"), ("beta2", "low")]),
        # No decay and no warm-up are not reported; large values are.
        (replace(START, weight_decay=0.0, warmup_ratio=0.0), []),
        (replace(START, weight_decay=9.0), [("decay_timescale", "low")]),
        (replace(START, warmup_ratio=0.5), [("warmup_ratio", "high")]),
    ]
    with each_row() as row:
        for configuration, expected in rows:
            with row(configuration):
                assert space_of().at_an_end(configuration) == expected


def test_proposals_stay_in_the_ranges_and_move_at_most_three_coordinates() -> None:
    space = space_of(config=NARROW)
    for use_prior in (True, False):
        draws = space.draw(space.low, np.random.default_rng(0), use_prior)
        assert draws.shape == (DRAWS, len(space.low))
        assert ((draws >= space.low) & (draws <= space.high)).all()
    draws = space.draw(space.low, np.random.default_rng(0), use_prior=True)
    moved = np.minimum((draws != space.low).sum(1), (draws != space.default).sum(1))
    assert set(moved.tolist()) == {0, 1, 2, 3}


def test_start_outside_of_a_range_widens_it_in_optuna() -> None:
    space = space_of(config=NARROW)
    params, distributions = space.params(replace(START, lr=0.1, weight_decay=0.0), 0.125)
    assert params["lr"] == pytest.approx(0.1)
    assert all(distributions[name]._contains(value) for name, value in params.items())
    assert set(params) == {
        *("lr", "one_minus_beta1", "one_minus_beta2", "eps"),
        *("decay_timescale", "warmup_ratio", "length"),
    }
    assert all(math.isfinite(each) for each in params.values())
    unknown, _ = Space(START, SpaceConfig(), None, search_eps=True).params(START, 1.0)
    assert "decay_timescale" not in unknown
