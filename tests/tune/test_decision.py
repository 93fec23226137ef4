"""Decisions between two points: Student's test as in SciPy, and the sentence for each case."""

import math
import statistics
import warnings
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from lightning_adam.config.tune import StageConfig
from lightning_adam.tune.archive import Record
from lightning_adam.tune.decision import challenger_of, decide, gain_of, score_of
from lightning_adam.tune.plan import build_stage
from lightning_adam.tune.point import Point
from lightning_adam.tune.story import Outcome, Step, Trial
from tests.support.tables import each_row
from tests.tune.searching import DEFAULT, LR, plan_of
from tests.tune.stories import score

OTHER = DEFAULT.with_values(lr=3e-3)
STAGE = build_stage("lr", StageConfig(space={"lr": {"low": 1e-5, "high": 1e-1}}))

values = st.lists(st.floats(-100, 100).map(lambda each: round(each, 3)), min_size=1, max_size=5)


def records(point: Point, *values: float | None, number: int = 0) -> list[Record]:
    """Returns the runs of a point, one for each seed; None is one that failed."""
    return [
        Record(
            Trial(
                "lr",
                number + turn,
                point,
                turn,
                Outcome.failed if value is None else Outcome.complete,
                value,
            ),
            turn=turn,
            coordinates={"lr": point.lr},
            owner="host/1/a",
        )
        for turn, value in enumerate(values)
    ]


@settings(deadline=None, derandomize=True)
@given(before=values, after=values, sign=st.sampled_from([1.0, -1.0]))
def test_gain_and_spread_match_students_test(
    before: list[float], after: list[float], sign: float
) -> None:
    gain, spread = gain_of(score(DEFAULT, *before), score(OTHER, *after), sign)
    assert gain == pytest.approx(sign * (statistics.fmean(before) - statistics.fmean(after)))
    if len(before) + len(after) < 3:
        assert spread is None
        return
    assert spread is not None
    assume(len(before) > 1 or len(after) > 1)
    assume(spread > 1e-6 and abs(gain or 0) > 1e-6)
    with warnings.catch_warnings():
        # It warns where the values are nearly alike.
        warnings.simplefilter("ignore")
        t = ttest_ind(before, after).statistic
    assert spread == pytest.approx(abs((gain or 0) / t), rel=1e-6)


def test_score_holds_the_metrics_of_finished_runs_in_the_order_of_seeds() -> None:
    known = records(OTHER, 0.3, 0.1) + records(DEFAULT, 9.0, number=5)
    found = score_of(OTHER, reversed(known))
    assert found.values == (0.3, 0.1)
    assert found.mean == pytest.approx(0.2)
    assert found.deviation == pytest.approx(statistics.stdev([0.3, 0.1]))
    failed = score_of(OTHER, records(OTHER, 0.3, None))
    assert math.isnan(failed.mean)
    assert failed.deviation is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_challenger_is_the_best_of_the_first_seed_if_it_beats_the_incumbent(
    sign: float,
) -> None:
    explored = [
        *records(DEFAULT.with_values(lr=1e-4), sign * 0.5, number=0),
        *records(OTHER, sign * 0.3, number=1),
        *records(DEFAULT.with_values(lr=1e-2), sign * 0.3, number=2),
        *records(DEFAULT.with_values(lr=1e-1), None, number=3),
    ]
    assert challenger_of(explored, score(DEFAULT, sign * 0.4, sign * 0.1), sign) == OTHER
    assert challenger_of(explored, score(DEFAULT, sign * 0.3), sign) is None
    assert challenger_of(explored, score(DEFAULT, math.nan), sign) == OTHER
    assert challenger_of(explored[3:], score(DEFAULT, sign * 0.4), sign) is None


CASES: list[tuple[Sequence[float], Sequence[float | None], bool, str]] = [
    ([1.0], [0.9], True, "the spread is unknown"),
    ([1.0, 1.2], [0.5, 0.6], True, "beyond the spread"),
    ([1.0, 1.6], [0.9, 1.5], False, "within the spread"),
    ([1.0, 1.2], [0.9, 1.5], False, "over all of them worse by"),
    ([1.0, 1.2], [0.9], False, "no trial was left for the others"),
    ([1.0, 1.2], [0.9, None], False, "fails with another"),
    ([math.nan, math.nan], [0.9, 0.8], True, "no finite metric, this has 0.85"),
]


def test_challenger_is_taken_only_beyond_the_spread() -> None:
    with each_row() as row:
        for before, after, is_taken, sentence in CASES:
            with row((before, after)):
                step = decision(before, after, n_seeds=len(before))
                assert (step.after.point == OTHER) is is_taken
                assert sentence in step.words
                assert ("taken" in step.words) is is_taken
                assert ("stays" in step.words) is not is_taken


def decision(
    before: Sequence[float], after: Sequence[float | None], n_seeds: int = 2, point: Point = OTHER
) -> Step:
    plan = plan_of(LR, n_seeds=n_seeds)
    return decide(plan, STAGE, score(DEFAULT, *before), records(point, *after), point)


def test_best_value_at_an_end_of_the_range_is_reported() -> None:
    with each_row() as row:
        for lr, override in (
            (1e-1, "space.lr.high=VALUE"),
            (1.02e-5, "space.lr.low=VALUE"),
            (9e-2, ""),
            (1e-3, ""),
        ):
            with row(lr):
                words = decision([1.0, 1.2], [0.5, 0.6], point=DEFAULT.with_values(lr=lr)).words
                assert override in words
                assert ("end of what was searched" in words) is bool(override)


def test_zero_decay_is_at_no_end_of_the_range() -> None:
    stage = build_stage("it", StageConfig(space={"weight_decay": {"low": 1e-4, "high": 1.0}}))
    point = DEFAULT.with_values(weight_decay=0.0)
    plan = plan_of(LR, n_seeds=1)
    step = decide(plan, stage, score(DEFAULT, 1.0), records(point, 0.5), point)
    assert step.after.point == point
    assert "end of what was searched" not in step.words


def test_point_with_one_seed_is_compared_with_the_same_seed() -> None:
    plan = plan_of(LR, n_seeds=3)
    step = decide(plan, STAGE, score(DEFAULT, 1.0, 9.0, 9.0), records(OTHER, 1.5), None)
    assert step.challenger is not None
    assert (step.gain, step.spread) == (-0.5, None)
