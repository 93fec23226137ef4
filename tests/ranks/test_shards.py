"""What ranks measure together is what one process measures of the whole."""

from typing import Any

import pytest
import torch

from tests.ranks.sharded_steps import Net, cases, measured, trained
from tests.support.ranks import launch

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank has measured, by case."""
    world: int = request.param
    folder = tmp_path_factory.mktemp(f"of_{world}")
    return launch("tests.ranks.sharded_steps", world, folder)


def alone(name: str, world: int) -> dict[str, Any]:
    case = cases(world)[name]
    sharded = case.whole(Net(case.dtype))
    trained(sharded, case.dtype)
    return measured(sharded)


@pytest.mark.parametrize("name", cases(4))
def test_ranks_measure_what_one_process_does(ranks: list[dict[str, Any]], name: str) -> None:
    if name not in cases(len(ranks)):
        pytest.skip("needs four ranks")
    expected = alone(name, len(ranks))
    for rank in ranks:
        of_rank = rank[name]
        assert of_rank["values"].keys() == expected["values"].keys()
        assert of_rank["values"] == pytest.approx(expected["values"], rel=1e-5, abs=1e-12)
        counted = [key for key in expected["values"] if "fraction" in key or "count" in key]
        assert counted
        assert {key: of_rank["values"][key] for key in counted if "signal" not in key} == {
            key: expected["values"][key] for key in counted if "signal" not in key
        }
        assert of_rank["exponents"] == expected["exponents"]
        assert [row["tensor"] for row in of_rank["table"]] == [
            row["tensor"] for row in expected["table"]
        ]


@pytest.mark.parametrize("name", cases(4))
def test_a_measurement_is_two_collectives(ranks: list[dict[str, Any]], name: str) -> None:
    if name not in cases(len(ranks)):
        pytest.skip("needs four ranks")
    collectives = cases(len(ranks))[name].collectives
    assert [rank[name]["collectives"] for rank in ranks] == [collectives] * len(ranks)


def test_nan_and_large_counts_reach_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        sums, maxima, exponents, _ = rank["nan"]
        assert sums[0, 0].isnan()
        assert maxima[0, 0].isnan()
        assert maxima[0, 1] == -torch.inf
        assert exponents.item() == 2**40 * len(ranks)


def test_flat_parameters_are_told_from_the_original_ones(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert not any(rank["flat"][True])
        assert rank["flat"][False] == [True]


def test_a_module_without_what_fsdp1_wraps_it_in_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["without its wrapper"].endswith("got Net; write AdamStatistics(module=wrapped)")
