"""Trainings of two ranks: what is measured, logged, saved and decided, and what one fault does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import rank_trainings
from tests.ranks.rank_trainings import FAULTS, KINDS, STEPS
from tests.support.ranks import launch

MEASURED = [1, 2, 3, 4, 6]
"""Every second step and, for histograms, every third."""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank has kept."""
    return launch("tests.ranks.rank_trainings", request.param, tmp_path_factory.mktemp("ranks"))


def are_close(first: list[Tensor], second: list[Tensor]) -> bool:
    """Gradients of more than two ranks are not always added up in the same order."""
    return all(torch.allclose(*pair, rtol=1e-5) for pair in zip(first, second, strict=True))


def are_alike(first: Any, second: Any) -> None:
    assert [step for step, _ in first] == [step for step, _ in second]
    for (_, values), (_, others) in zip(first, second, strict=True):
        assert values.keys() == others.keys()
        assert values == pytest.approx(others, rel=1e-5, abs=1e-7)


def are_same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged_is_what_one_process_logs(ranks: list[dict[str, Any]], kind: str) -> None:
    expected = rank_trainings.monitored(kind)["rows"]
    assert expected
    for rank in ranks:
        rows = rank[kind]["monitored"]["rows"]
        are_alike(rows, expected)
        for (_, values), (_, of_one) in zip(rows, expected, strict=True):
            counted = [key for key in of_one if "fraction" in key and "signal" not in key]
            assert {key: values[key] for key in counted} == {key: of_one[key] for key in counted}


@pytest.mark.parametrize("kind", KINDS)
def test_the_monitor_changes_nothing(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        assert are_same(rank[kind]["plain"]["parameters"], rank[kind]["monitored"]["parameters"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_is_two_collectives(ranks: list[dict[str, Any]], kind: str) -> None:
    expected = KINDS[kind].collectives * len(MEASURED) + KINDS[kind].at_start
    for rank in ranks:
        without = rank[kind]["plain"]["collectives"]
        assert rank[kind]["monitored"]["collectives"] - without == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    for rank in ranks:
        straight, resumed = rank[kind]["monitored"], rank[kind]["resumed"]
        assert are_close(straight["parameters"], resumed["parameters"])
        later = [row for row in straight["rows"] if row[0] >= STEPS // 2]
        assert later
        are_alike(resumed["rows"], later)


@pytest.mark.parametrize("kind", KINDS)
def test_a_monitor_that_is_attached_later_counts_on(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        straight, later = rank[kind]["monitored"]["rows"], rank[kind]["attached later"]["rows"]
        are_alike(later, [row for row in straight if row[0] >= STEPS // 2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_stops_all_ranks_at_the_same_step(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    assert {rank[kind]["stopped"]["step"] for rank in ranks} == {3}


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_rank_has_found_stops_all_ranks_at_the_same_step(
    ranks: list[dict[str, Any]], kind: str
) -> None:
    # It is asked for at every second batch.
    assert {rank[kind]["stopped by a finding"]["step"] for rank in ranks} == {2}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_fault_on_one_rank_ends_the_monitoring_and_no_training(
    ranks: list[dict[str, Any]], kind: str, name: str
) -> None:
    for rank in ranks:
        trained = rank[f"{kind}, {name}"]
        assert trained["step"] == STEPS
        assert are_same(trained["parameters"], rank[kind]["plain"]["parameters"])


@pytest.mark.parametrize("name", FAULTS)
def test_where_ranks_measure_together_the_first_that_fails_says_why(
    ranks: list[dict[str, Any]], name: str
) -> None:
    _, failing = FAULTS[name]
    said = [rank[f"FSDP2, {name}"]["said"] for rank in ranks]
    assert len(said[failing]) == 1
    assert "ZeroDivisionError: planted" in said[failing][0]
    if failing:
        assert said[0] == [
            "AdamMonitor has failed on rank 1, which says why, and is off from here on; training is"
            " not affected."
        ]
    assert not any(said[1:failing] + said[failing + 1 :])
    rows = [len(rank[f"FSDP2, {name}"]["rows"]) for rank in ranks]
    assert max(rows) <= 4
