"""Axes of the charts: positions of values, ticks and their labels."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adam.tune.scale import TICKS, scale_of

FEW_EXAMPLES = settings(max_examples=50, deadline=None)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(1e-290, 1e290)


@FEW_EXAMPLES
@given(st.lists(NUMBERS, max_size=5))
def test_larger_numbers_have_larger_positions(values: list[float]) -> None:
    scale = scale_of(values, 10.0, 90.0, is_log=False)
    places = [scale.place(each) for each in sorted(values)]
    assert places == sorted(places)
    assert all(10 <= each <= 90 for each in places)


@FEW_EXAMPLES
@given(st.lists(POSITIVE, max_size=5))
def test_logarithmic_axis_places_equal_ratios_at_equal_distances(values: list[float]) -> None:
    scale = scale_of(values, 90.0, 10.0, is_log=True)
    low, high = math.log10(scale.low), math.log10(scale.high)
    for each in values:
        share = (math.log10(each) - low) / (high - low)
        assert scale.place(each) == pytest.approx(90 - 80 * share, abs=0.1)


@FEW_EXAMPLES
@given(st.lists(POSITIVE, max_size=5), st.booleans())
def test_tick_stands_at_the_position_of_its_label(values: list[float], is_log: bool) -> None:
    scale = scale_of(values, 0.0, 1000.0, is_log=is_log)
    ticks = scale.ticks()
    assert 0 < len(ticks) <= TICKS + 1
    assert len({tick.text for tick in ticks}) == len(ticks)
    for tick in ticks:
        assert tick.place == pytest.approx(scale.place(float(tick.text)), abs=0.2)


TICK_TEXTS = (
    ([0.21, 0.31], False, {"0.22", "0.24", "0.26", "0.28", "0.3"}),
    ([1e-5, 1e-1], True, {"1e-5", "1e-4", "1e-3", "0.01", "0.1"}),
    ([-1e6, 1e6], False, {"-1e6", "-5e5", "0", "5e5", "1e6"}),
    ([1234567.1, 1234567.4], False, {"1234567.1", "1234567.2", "1234567.3", "1234567.4"}),
)


def test_tick_labels_are_round_and_short() -> None:
    for values, is_log, texts in TICK_TEXTS:
        ticks = scale_of(values, 0.0, 400.0, is_log=is_log).ticks()
        assert texts <= {tick.text for tick in ticks}
