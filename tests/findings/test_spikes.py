"""Spike detection, compared with `statistics` and numpy."""

import json
import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from lightning_adam.findings.spikes import (
    DEVIATIONS,
    MAX_STREAK,
    MIN_VALUES,
    TENSOR_WARMUP,
    WINDOW,
    SpikeWindow,
    TensorSpikes,
)
from tests.support.tables import each_row


def noise(number: int, seed: int = 0) -> list[float]:
    return [float(each) for each in np.random.default_rng(seed).normal(3.0, 0.1, number)]


def add_all(values: Sequence[float]) -> tuple[SpikeWindow, list[float]]:
    window = SpikeWindow()
    return window, [window.add(value) for value in values]


def first_spike(values: Sequence[float]) -> int | None:
    _, found = add_all(values)
    return next((place for place, each in enumerate(found) if each > DEVIATIONS), None)


def test_value_is_compared_with_the_previous_128() -> None:
    values = noise(300)
    _, found = add_all(values)
    with each_row() as row:
        for place, deviation in enumerate(found):
            with row(place):
                before = values[max(place - WINDOW, 0) : place]
                if len(before) < MIN_VALUES:
                    assert math.isnan(deviation)
                else:
                    expected = (values[place] - statistics.fmean(before)) / statistics.stdev(before)
                    assert deviation == pytest.approx(expected, rel=1e-9)


def test_spike_is_found_at_its_step_and_does_not_hide_the_next_one() -> None:
    values = noise(200)
    for place in (100, 101, 150):
        values[place] = 5.0
    window, found = add_all(values)
    assert [place for place, each in enumerate(found) if each > DEVIATIONS] == [100, 101, 150]
    # Later values are not compared with the spikes.
    deviation_of_noise = statistics.stdev([each for each in values[:150] if each < 5])
    assert found[150] == pytest.approx((5.0 - 3.0) / deviation_of_noise, rel=0.1)
    assert window.streak == 0


def test_streak_counts_consecutive_spikes_until_they_are_the_new_level() -> None:
    window, _ = add_all(noise(100))
    streaks = []
    for value in noise(MAX_STREAK + MIN_VALUES + 5, seed=1):
        deviation = window.add(value + 5.0)
        streaks.append(window.streak)
        if len(streaks) > MAX_STREAK + 1:
            assert not deviation > DEVIATIONS
    assert streaks == [*range(1, MAX_STREAK + 1), *[0] * (MIN_VALUES + 5)]


def test_value_that_falls_or_is_not_finite_is_no_spike() -> None:
    window, _ = add_all(noise(100))
    assert window.add(0.0) < -DEVIATIONS
    for value in (math.nan, math.inf):
        assert math.isnan(window.add(value))
        assert window.streak == 0
    assert window.add(9.0) > DEVIATIONS


def test_equal_values_and_zeros_are_no_spikes() -> None:
    with each_row() as row:
        for level in (1.0, 0.0, 1e-30, -2.0):
            with row(level):
                assert first_spike([level] * 100) is None
                assert first_spike([*[level] * 100, level + 1]) == 100


def test_steady_noise_is_no_spike_and_a_jump_is_found_at_its_step() -> None:
    random = np.random.default_rng(5)
    fall = 2 * np.exp(-np.arange(2000) / 300)
    of = {
        "normal": fall + 0.1 * random.standard_normal(2000),
        "a random walk": 5 + np.cumsum(0.01 * random.standard_normal(2000)),
        "rising": np.arange(2000) / 1000 + 0.01 * random.standard_normal(2000),
        "constant": np.ones(2000),
    }
    with each_row() as row:
        for name, values in of.items():
            with row(name):
                assert first_spike(values.tolist()) is None
                values[1500:] += 10
                assert first_spike(values.tolist()) == 1500


def test_restored_window_continues_as_if_uninterrupted() -> None:
    values = [*noise(90), 9.0, 9.0]
    window, _ = add_all(values)
    restored = SpikeWindow()
    restored.restore(json.loads(json.dumps(window.state())))
    assert restored.streak == 2
    for value in (9.0, *noise(150, seed=1), 9.0):
        assert restored.add(value) == window.add(value)
        assert restored.streak == window.streak


# ---- Tensors


def zclip(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns the scores and the multiples of the earlier maximum for one tensor's values."""
    mean, variance, largest = values[0], 0.0, values[0]
    scores, multiples = [], []
    for number, value in enumerate(values):
        deviation = math.sqrt(variance)
        is_known = number >= TENSOR_WARMUP
        scores.append((value - mean) / max(deviation, 1e-3 * mean) if is_known else math.nan)
        multiples.append(value / largest if is_known else math.nan)
        clipped = min(value, mean + DEVIATIONS * deviation) if is_known else value
        mean = 0.97 * mean + 0.03 * clipped
        variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
        largest = max(largest, value) if number > 1 else value
    return scores, multiples


def test_each_tensor_is_compared_with_its_own_average() -> None:
    of = {"a": noise(80), "b": [each / 100 for each in noise(80, seed=1)]}
    of["a"][60], of["b"][70] = 30.0, 0.3
    expected = {name: zclip(values) for name, values in of.items()}
    spikes = TensorSpikes()
    with each_row() as row:
        for step in range(80):
            spikes.add({name: values[step] for name, values in of.items()})
            found = [spikes.scores, spikes.times_largest]
            for name, (scores, multiples) in expected.items():
                with row((step, name)):
                    if step < TENSOR_WARMUP:
                        assert all(name not in each for each in found)
                    else:
                        assert found[0][name] == pytest.approx(scores[step], rel=1e-9)
                        assert found[1][name] == pytest.approx(multiples[step], rel=1e-9)
    assert [step for step, each in enumerate(expected["a"][0]) if each > DEVIATIONS] == [60]
    assert [step for step, each in enumerate(expected["b"][0]) if each > DEVIATIONS] == [70]


def test_tensor_without_a_finite_value_keeps_its_average() -> None:
    spikes, steady = TensorSpikes(), noise(40)
    for value in steady:
        spikes.add({"a": value, "b": value})
        spikes.add({"b": math.nan})
    spikes.add({"b": 9.0})
    assert [*spikes.scores] == ["b"]
    spikes.add({"a": 9.0, "late": 1.0})
    assert [*spikes.scores] == ["a"]
    assert spikes.scores["a"] == pytest.approx(zclip([*steady, 9.0])[0][-1], rel=1e-9)


def test_restored_averages_continue_as_if_uninterrupted() -> None:
    spikes, restored = TensorSpikes(), TensorSpikes()
    for value in noise(30):
        spikes.add({"a": value})
    restored.restore(json.loads(json.dumps(spikes.state())))
    for each in (spikes, restored):
        each.add({"a": 9.0})
    assert restored.scores == spikes.scores
    assert restored.state() == spikes.state()
